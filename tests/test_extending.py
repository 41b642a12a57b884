"""The pages on extending are what they say: their files are written, and their commands run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ENVIRONMENT, ROOT, SECONDS

PAGES = sorted(path for path in (ROOT / "docs" / "extending").glob("*.md") if path.stem != "index")
BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
QUICK = (
    "trainer=cpu", "trainer.enable_progress_bar=false", "datamodule.val_items=16",
    "datamodule.test_items=16", "callbacks.generation.items=8",
)  # fmt: skip


def write_files(text: str, folder: Path) -> None:
    for _, title, content in BLOCK.findall(text):
        if title:
            path = folder / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    lines = [block for kind, title, block in BLOCK.findall(text) if kind == "bash" and not title]
    return [shlex.split(line, comments=True) for block in lines for line in block.splitlines() if line]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works_through_to_its_end(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    write_files(text, tmp_path)
    assert commands(text)
    starts = {"python": [sys.executable], "dalle": [sys.executable, "-m", "dalle"]}
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [ENVIRONMENT.get("PYTHONPATH")])])
    for name, *words in commands(text):
        quick = QUICK if words[0] == "train" else ()
        ended = subprocess.run(
            [*starts[name], *words, *quick],
            cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)


def test_every_addition_has_its_page():
    assert {page.stem for page in PAGES} == {"sampler", "network", "stage", "source", "metric", "pipeline"}
