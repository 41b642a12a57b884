"""Reports: what distinguishes results, signs, a page that needs nothing but itself, the Pareto front."""

import csv
import math
import re

import pytest
from PIL import Image
from webpage import parts_of

from dalle.evaluation.plots import MOST_BARS, charts, distance_of, guidance_of, pareto
from dalle.evaluation.report import as_text, labels, number, shown, write_report
from dalle.evaluation.results import FILE, Result
from dalle.metrics.intervals import Figure, exact


def result(
    method="ddim", steps=10, guidance=1.0, fid=3.0, seconds=0.1, kind="unclip", pictures=100, name="demo"
):
    sampler = {"method": method, "steps": steps}
    options = {"prior": {"guidance": 9.0}, "decoder": {"sampler": sampler, "guidance": guidance}}
    paths = {"decoder": f"logs/{name}/decoder"}
    target = {"kind": kind, "weights": {"decoder": name}, "paths": paths, "options": options}
    figures = {
        "fid_clip": Figure(fid, fid - 1, fid + 1),
        "clip_score": Figure(70 + guidance, 69.0, 80.0),
        "seconds_per_image": exact(seconds),
        "judge/all": Figure(0.5, 0.4, 0.6),
        "judge/seen/all": exact(0.6),
        "judge/colour": exact(0.7),
        "judge/unseen/colour": exact(0.4),
        "parameters": exact(12345),
    }
    protocol = {"pictures": pictures, "real_pictures": pictures, "note": "<b>&"}
    return Result(target, protocol, ["fid"], figures)


def sweep() -> list[Result]:
    return [result(method, steps, g, fid=g + 100 / steps, seconds=steps / 100)
            for method in ("ddim", "dpmpp") for steps in (10, 50) for g in (1.0, 2.0)]  # fmt: skip


def test_results_are_called_by_what_differs():
    names = labels(sweep())
    assert names[0] == "method=ddim steps=10 guidance=1.0"
    assert len(set(names)) == 8
    assert labels([result(), result(kind="gan")]) == ["unclip", "gan"]
    assert labels([result(), result(name="other")]) == ["unclip (demo)", "unclip (other)"]
    assert labels([result()]) == ["unclip"]
    both = [result(), result()]
    for some, prior in zip(both, ("prior", "ar_prior"), strict=True):
        some.target["paths"] = {"prior": f"logs/demo/{prior}", **some.target["paths"]}
    assert labels(both) == ["unclip (demo) (prior, decoder)", "unclip (demo) (ar_prior, decoder)"]


def test_everything_is_written(tmp_path):
    results = [*sweep(), result(guidance=4.0, pictures=50)]
    for k, some in enumerate(results):
        some.path = tmp_path / str(k)
        some.path.mkdir()
        (some.path / FILE).write_text(some.to_json())
        Image.new("RGB", (4, 4)).save(some.path / "grid.png")
    folder = write_report(
        results, tmp_path / "report", ["evaluate.py -m <x>"], ["steps=0: a sampler needs a step"]
    )
    made = {path.name for path in folder.iterdir()}
    assert made == {"table.md", "figures.csv", "report.html"}
    with (folder / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["fid_clip"]) for row in rows] == [some.figures["fid_clip"].value for some in results]
    assert rows[0]["fid_clip.low"] == "10.0"
    assert rows[0]["options.decoder.sampler.steps"] == "10"
    table = (folder / "table.md").read_text()
    assert "| method=ddim steps=10 guidance=1.0 | 11 ± 1 | 71 ± 9 | 0.5 ± 0.1 | 0.6 | 0.1 | 12,345 |" in table
    assert "guidance=4.0 * |" in table
    assert "* measured by another protocol, not to be compared: pictures is 50 instead of 100" in table
    assert "failed: steps=0: a sampler needs a step" in table


def test_the_page_needs_nothing_but_itself(tmp_path):
    results = sweep()
    for some in results:
        some.path = tmp_path
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    folder = write_report(results, tmp_path / "report", ["evaluate.py <x>", "evaluate.py y"])
    page = (folder / "report.html").read_text()
    _, own = parts_of(page)
    assert set(re.findall(r'(?:src|href)="?([^"]{5})', own)) == {"data:"}
    assert "://" not in own
    assert own.count("data:image/png;base64,") == len(results)
    assert "<pre>evaluate.py &lt;x&gt;\nevaluate.py y</pre>" in own
    assert "&lt;b&gt;&amp;" in own
    size = float(re.search(r"One file of ([\d.]+) MB", own)[1])
    assert size == pytest.approx((folder / "report.html").stat().st_size / 1e6, abs=0.1)


def test_charts_show_every_result():
    results = [*sweep(), result(guidance=4.0, pictures=50)]
    names = [f"result {k}" for k in range(9)]
    guidance, time, judge = charts(results, names, [""] * 8 + ["*"])
    assert [trace["name"] for trace in guidance["data"]] == [
        "unclip ddim 10 steps", "unclip ddim 50 steps", "unclip dpmpp 10 steps", "unclip dpmpp 50 steps",
    ]  # fmt: skip
    assert [trace["text"] for trace in guidance["data"]] == [["1", "2"]] * 4
    front, others, other_protocol = time["data"]
    assert front["hovertext"] == ["result 0", "result 4", "result 2", "result 6"]
    assert sorted(front["text"] + others["text"] + other_protocol["text"]) == [str(k) for k in range(1, 10)]
    assert other_protocol["text"] == ["9"]
    assert time["log"]
    shown = [trace for trace in judge["data"] if trace["type"] == "bar"]
    assert len(shown) == MOST_BARS
    assert shown[0]["x"] == ["colour", "all"]
    assert shown[0]["error_y"]["array"] == [0, pytest.approx(0.1)]


def test_charts_only_of_what_is_there(tmp_path):
    alone = result()
    alone.figures = {"retrieval/image_to_text_r1": exact(0.4)}
    folder = write_report([alone], tmp_path / "report")
    charts_there, own = parts_of((folder / "report.html").read_text())
    assert charts_there == []
    assert "--share: 40.0%" in own


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (3.0, 3.0), (2.0, 3.0)], [0, 1, 2]),
        ([(1.0, 1.0), (2.0, 2.0)], [0]),
        ([(1.0, 1.0), (1.0, 1.0)], [0, 1]),
        ([(1.0, 2.0), (1.0, 1.0)], [1]),
    ],
)
def test_pareto(points, front):
    assert pareto(points) == front


def test_guidance_is_that_of_the_pictures():
    assert guidance_of(result(guidance=3.0)) == 3.0
    assert distance_of([result(), result()]) == "fid_clip"
    other = result()
    other.figures = {"fid": exact(1)}
    assert distance_of([result(), other]) is None


def test_numbers_are_short():
    assert [number(x) for x in (0.12345, 12.345, 123.456, 3022573.0, math.nan, -math.inf)] == [
        "0.123", "12.3", "123.5", "3,022,573", "nan", "-inf",
    ]  # fmt: skip
    assert shown(Figure(1.0, 0.5, 1.2)) == "1 ± 0.5"
    assert shown(None) == ""
    assert "2 to 4" in as_text(result())
