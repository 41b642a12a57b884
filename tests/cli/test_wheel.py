"""The package as others get it: a wheel in an environment of its own, used from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tiny import COMMON, NETS, ROOT, SECONDS

MINE = {
    "experiment/tiny.yaml": "# @package _global_\ntrainer:\n  max_steps: 2\n",
    "model/mine.yaml": "# @package _global_\ndefaults: [vae]\nmodel:\n  kl_weight: 0.5\n",
}


def run(*command: object, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=environment, timeout=SECONDS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout


@pytest.fixture
def installed(tmp_path) -> Path:
    """The programs of an environment that has the wheel, and of ours all but our source."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    built = ("--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT)
    run(*pip, "wheel", *built, cwd=tmp_path)
    (wheel,) = tmp_path.glob("dalle-*.whl")
    made = tmp_path / "venv"
    venv.create(made, symlinks=True)
    python = made / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = made.glob("lib/*/site-packages")
    # an editable install lives in a .pth file, and those in folders that a .pth file names are not read
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "others.pth").write_text("".join(f"{library}\n" for library in libraries))
    return made / "bin"


@pytest.mark.slow
def test_a_user_without_the_checkout(installed, tmp_path):
    """Own configurations in the jobs of `-m`, two steps of two stages, and pictures."""
    empty, dalle = tmp_path / "empty", installed / "dalle"
    for name, text in MINE.items():
        path = empty / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = run(installed / "python", "-c", "import dalle; print(dalle.__path__[0])", cwd=empty).strip()
    assert Path(found).is_relative_to(installed.parent)
    assert (Path(found) / "py.typed").exists()
    assert (Path(found) / "conf" / "train.yaml").exists()
    assert "  train " in run(dalle, cwd=empty)

    own = ("--config-dir", "own", "experiment=tiny", "name=first")
    few = ("data.size=16", "datamodule.val_items=8", "datamodule.test_items=8")
    clip = [word for word in NETS["clip"] if word not in COMMON]
    run(dalle, "train", "model=clip", *own, *COMMON, *few, *clip, cwd=empty)
    run(dalle, "train", "-m", "model=mine", *own, *COMMON, *few, *NETS["vae"], cwd=empty)
    assert "kl_weight: 0.5" in (empty / "logs" / "first" / "vae" / "config.yaml").read_text()
    run(dalle, "sample", "pipeline=vae", "name=first", "n=2", "precision=fp32", cwd=empty)
    samples = empty / "logs" / "first" / "samples" / "001"
    assert {path.name for path in samples.iterdir()} >= {"grid.png", "recipe.yaml", "000-01.png"}
