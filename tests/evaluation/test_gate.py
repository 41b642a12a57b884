"""The gate: shut where a figure has left its interval, open where not; a word where nothing can be said."""

import json
import sys
from pathlib import Path

import pytest

from dalle.errors import UserError
from dalle.evaluation import gate
from dalle.evaluation.results import Result
from dalle.metrics.intervals import Figure


def result(judge=0.5, fid=3.0, weights="a", clip="c", n=512) -> Result:
    protocol = {
        "pictures": n,
        "machine": "mine",
        "features": {"network": "clip", "weights": clip},
        "scorer": {"clip": clip},
    }
    figures = {"judge/all": Figure(judge, 0.4, 0.6), "fid_clip": Figure(fid, 2.0, 4.0)}
    return Result({"kind": "unclip", "weights": {"decoder": weights}, "paths": {}}, protocol, [], figures)


@pytest.fixture
def recorded(tmp_path) -> dict:
    gate.record(result(), ["n=512"], tmp_path / "gate.json")
    return json.loads((tmp_path / "gate.json").read_text())


def test_within_and_out_of_the_intervals(recorded):
    assert gate.compare(result(judge=0.41, fid=3.9), recorded) == []
    assert gate.compare(result(judge=0.39, fid=4.5), recorded) == [
        "judge/all is 0.39, outside its interval 0.4 to 0.6",
        "fid_clip is 4.5, outside its interval 2 to 4",
    ]


def test_a_figure_that_is_gone(recorded):
    gone = result()
    del gone.figures["judge/all"]
    assert gate.compare(gone, recorded) == ["judge/all is missing; recorded was 0.5"]


def test_another_clip_makes_other_figures_but_the_judge_is_the_same(recorded):
    assert gate.compare(result(fid=99.0, clip="other"), recorded) == []
    assert len(gate.compare(result(judge=0.1, fid=99.0, clip="other"), recorded)) == 1


def test_another_machine_is_no_matter_and_another_protocol_is(recorded):
    other = result()
    other.protocol["machine"] = "yours"
    assert gate.compare(other, recorded) == []
    with pytest.raises(
        UserError, match=r"of another protocol \(pictures was 512, is 64\); make gate RECORD=1"
    ):
        gate.compare(result(n=64), recorded)


def main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gate", *arguments])
    gate.main()


def test_the_command(monkeypatch, tmp_path, capsys):
    file = tmp_path / "gate.json"
    with pytest.raises(UserError, match=r"no recorded figures at .*; make gate RECORD=1 writes them"):
        main(monkeypatch, "logs/demo", f"--file={file}")
    found = result()
    monkeypatch.setattr(gate, "measure", lambda folder, settings: found)
    main(monkeypatch, "logs/demo", f"--file={file}", "--record")
    assert json.loads(file.read_text())["settings"] == list(gate.SETTINGS)
    main(monkeypatch, "logs/demo", f"--file={file}")
    assert "within their recorded intervals" in capsys.readouterr().out
    (tmp_path / "list.json").write_text("[1]")
    monkeypatch.setattr(gate, "measure", None)  # not asked for
    with pytest.raises(UserError, match=r"list.json is damaged .* is kept; give another --file"):
        main(monkeypatch, "logs/demo", f"--file={tmp_path / 'list.json'}", "--record")
    assert (tmp_path / "list.json").read_text() == "[1]"
    monkeypatch.setattr(gate, "measure", lambda folder, settings: found)
    found = result(judge=0.1, weights="b")
    with pytest.raises(UserError, match=r"1 figures left .* trained again, .*: judge/all is 0.1, outside"):
        main(monkeypatch, "logs/demo", f"--file={file}")


def test_without_a_run_it_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished run to measure; `make demo` trains one"):
        gate.measure(tmp_path, [])


def test_it_measures_afresh_and_leaves_nothing(untrained_stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fast = [
        "steps=2",
        "pipeline.prior_sampler.steps=2",
        "n=8",
        "metrics=[judge]",
        "trainer=cpu",
        "precision=fp32",
    ]
    before = sorted(untrained_stages.rglob("*"))
    found = gate.measure(untrained_stages / "default", fast)
    assert "judge/all" in found.figures
    assert sorted(untrained_stages.rglob("*")) == before
    assert list(Path().iterdir()) == []
