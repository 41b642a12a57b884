"""The lines of the pages on edits and repair as they stand, on tiny stages with random weights."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import untrained
from PIL import Image
from tiny import ROOT

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("editing", "repair")}
LINES = [
    line.split("  #")[0].removeprefix("python ")
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines()
    if "sample.py" in line
]
FAST = " precision=fp32 steps=2 pipeline.prior_sampler.steps=2"


@pytest.fixture
def stages(untrained_stages, tmp_path, monkeypatch):
    """logs/first and others, and pictures of all the names that lines have."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "demo", "clipart"):
        shutil.copytree(untrained_stages / "default", tmp_path / "logs" / name)
    inpaint = tmp_path / "logs" / "demo" / "inpaint"
    untrained("decoder", untrained_stages, "inpaint=true", f"paths.run='{inpaint}'")
    (tmp_path / "prompts").mkdir()
    for path in (ROOT / "prompts").glob("*.png"):  # of decoders of 32 px
        with Image.open(path) as picture:
            picture.resize((picture.width // 2,) * 2).save(tmp_path / "prompts" / path.name)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    masks, small = {"mask.png", "hole.png"}, {"small.png"}
    for name in {name for line in LINES for name in re.findall(r"(?:image|other|mask)=(\w+\.png)", line)}:
        side = 8 if name in small else 32
        picture = Image.new("L", (32, 32)) if name in masks else Image.fromarray(noise[:side, :side])
        picture.paste(255, (8, 8, 20, 20)) if name in masks else None
        picture.save(tmp_path / name)


def within(text: str) -> str:
    """Components that an embedding of 8 numbers has."""
    return re.sub(r"dims=\[[\d, ]*\]", "dims=[0,4,8]", text)


def test_there_are_lines_of_every_edit():
    said = {edit for line in LINES for edit in re.findall(r"edit=(\w+)", line)}
    repairs = {"denoise", "restore", "enhance", "restyle"}
    assert said == repairs | {"variations", "interpolate", "text_diff", "reconstruct", "inpaint", "outpaint"}


@pytest.mark.slow
def test_the_lines_edit_as_they_stand(shell, stages, tmp_path):
    for number, line in enumerate(LINES):
        fast = " precision=fp32" if "pipeline=dalle" in line else FAST
        shell(f"{within(line)}{fast} out=out/{number}")
        assert list((tmp_path / "out" / str(number)).glob("*.png")), line


@pytest.mark.parametrize("page", PAGES)
def test_the_functions_are_as_they_stand(page, stages):
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    picture = torch.rand(3, 16, 16) * 2 - 1
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:8] = True
    names = dict.fromkeys(("image", "another", "noisy", "soft", "torn"), picture)
    names |= {"mask": mask, "hole": mask, "small": picture[:, :8, :8]}
    exec(within(code), names)
