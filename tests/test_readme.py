"""The command lines of the README and of the documentation are real ones."""

import re
import shlex
import shutil

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from tiny import ROOT

from dalle.cli import entry

PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.parent.name != "extending"]  # test_extending.py runs those
FILES = [*PAGES, ROOT / "Makefile", *sorted((ROOT / "conf").rglob("*.yaml"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
FOUND = set(re.findall(r"(?:python|\$\(PY\)) ((?:train|sample|evaluate)\.py\b[^`\n|]*)", TEXT))
FOUND |= set(re.findall(r"(?:^|`)dalle ((?:train|sample|evaluate) [^`\n|]*)", TEXT, re.MULTILINE))
COMMANDS = sorted(line for line in FOUND if "..." not in line and " -sc " not in line)  # for the shell


def test_there_are_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python train.py" in readme
    assert "python sample.py" in readme


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compose(line):
    words = shlex.split(re.split(r" : | # ", line)[0], comments=True)
    script, arguments = words[0], [entry.quoted(word) for word in words[1:]]
    sweep = "-m" in arguments
    overrides = [word for word in arguments if word not in ("-m", "--cfg", "job")]
    assert all("=" in word for word in overrides), line
    for job in jobs(overrides) if sweep else [overrides]:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose(script.removesuffix(".py"), job)
        if "hydra=sweep" not in job:  # its directory is named by the job, which only a real run has
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def jobs(overrides: list[str]) -> list[list[str]]:
    """One list of overrides for each first and last of several comma-separated values."""
    keys_values = [word.split("=", 1) for word in overrides]
    return [[f"{key}={value.split(',')[k]}" for key, value in keys_values] for k in (0, -1)]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:conf|src|tests|docs)/[\w./-]+)`", TEXT))))
def test_files_named_are_there(path):
    assert (ROOT / path).exists()


EDITS = [
    line for line in COMMANDS if "name=demo" in line and " edit=" in line and "logs/demo/samples" in line
]


def test_edits_of_the_readme_run_after_the_demo(untrained_stages, command, tmp_path):
    """On tiny stages, whose pictures are of 16 px."""
    shutil.copytree(untrained_stages / "default", tmp_path / "logs" / "demo")
    (tmp_path / "prompts").mkdir()
    with Image.open(ROOT / "prompts" / "right_half.png") as mask:
        assert mask.size == (32, 32)
        mask.resize((16, 16)).save(tmp_path / "prompts" / "right_half.png")
    fast = ("steps=2", "pipeline.prior_sampler.steps=2", "precision=fp32")
    assert command("sample.py", "name=demo", "prompt=a red ring", *fast).code == 0
    assert len(EDITS) >= 3
    for line in EDITS:
        ended = command(*shlex.split(line), *fast)
        assert ended.code == 0, (line, ended)
        assert "each picture's in logs/demo/samples/" in ended.out
