"""The demos' table: a line for each kind of prompts with its interval, chance and what training read."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import untrained
from tiny import ROOT

from dalle.cli import command
from dalle.data.scenes import draw
from dalle.data.shapes import prompts
from dalle.evaluation import demo
from dalle.metrics.intervals import of_share


def kinds(n: int) -> tuple[torch.Tensor, list[str]]:
    """Real pictures and captions of all four kinds, in the demo's order."""
    made = [prompts(kind, seen, n) for kind in ("one", "two") for seen in (True, False)]
    return torch.cat([draw(scenes, 32) for _, scenes in made]), [c for captions, _ in made for c in captions]


def test_a_share_stands_beside_its_interval_chance_and_what_was_read():
    images, captions = kinds(20)
    images[:5] = images[20:25]  # five of the first kind show something else
    table = demo.verdicts(images, captions, read=set(captions[:10]))
    first = "judge/one object, seen"
    assert table[f"{first}/all"] == pytest.approx(0.75, abs=0.06)
    assert (table[f"{first}/low"], table[f"{first}/high"]) == pytest.approx(
        of_share(torch.arange(20) < round(20 * table[f"{first}/all"]))[1:]
    )
    assert table[f"{first}/read_in_training"] == 0.5
    assert table[f"{first}/new"] == 1  # the wrong ones were read
    assert table["judge/two objects, relation, unseen/read_in_training"] == 0
    assert 0 <= table["judge/two objects, relation, unseen/chance"] < table[f"{first}/chance"] < 0.03
    assert table["judge_residual"] < 0.01
    lines = demo.shares(table)
    assert len(lines) == 5
    assert "50%, of the others right 100.0%" in lines[1]
    assert lines[4].split()[:4] == ["two", "objects,", "relation,", "unseen"]


def test_the_command(tmp_path, monkeypatch, capsys):
    untrained("dvae", tmp_path / "logs")
    untrained("dalle", tmp_path / "logs")
    runs = tmp_path / "logs" / "default"
    for split in ("val", "test"):
        words = ["demo", str(runs), "--pipeline", "dalle", "--n", "2", "--split", split]
        monkeypatch.setattr(sys, "argv", words)
        demo.main()
        said = capsys.readouterr().out
        assert "one object, seen" in said
        assert "distance from clean drawings" in said
        assert json.loads((runs / "report-dalle.json").read_text())["split"] == split


@pytest.mark.parametrize("target", ["demo", "demo-dalle"])
def test_the_command_that_a_demo_ends_with(target, untrained_stages, tmp_path, monkeypatch, capsys):
    """As it stands in the Makefile, on stages that never trained."""
    recipe = (ROOT / "Makefile").read_text().split(f"\n{target}: ")[1].split("\n\n")[0]
    *_, last = recipe.splitlines()
    assert last.startswith("\t$(PY) -m dalle demo logs/demo")
    shutil.copytree(untrained_stages / "default", tmp_path / "logs" / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dalle", *last.split()[3:], "--n", "2"])
    command.main()
    said = capsys.readouterr().out.splitlines()
    assert sum(line.strip().startswith(("one object", "two objects")) for line in said) == 4
    counts = {line.split()[2] for line in said if line.startswith("parameters of ")}
    of_demo = {"demo": {"clip", "prior", "decoder"}, "demo-dalle": {"clip", "image_tokenizer", "dalle"}}
    assert counts == of_demo[target]
    name = "report.json" if target == "demo" else "report-dalle.json"
    assert json.loads(Path("logs", "demo", name).read_text())["n"] == 2
