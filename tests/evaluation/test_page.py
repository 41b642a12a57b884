"""Offline pages: what hostile names can do, what is embedded, and how the pages behave in a browser."""

import html
import json
import math
import re
from pathlib import Path

import pytest
from browser import BINARY, Browser
from PIL import Image
from webpage import parts_of

from dalle.evaluation import dashboard
from dalle.evaluation.page import Album, label, plain, render, thinned
from dalle.evaluation.report import write_report
from dalle.evaluation.results import Result
from dalle.metrics.intervals import Figure, exact
from dalle.pipelines.edit_report import report

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
MARKUP = ("<script>window", "<img src=x", "<svg", "onerror=window.hacked=1>")


def hostile_report(folder: Path) -> Path:
    """A report in which whatever can be named is named by an attacker."""
    results = []
    for k in range(3):
        options = {"decoder": {"sampler": {"method": HOSTILE, "steps": 10}, "guidance": float(k)}}
        target = {"kind": HOSTILE, "weights": {}, "paths": {"x": f"{HOSTILE}/{k}"}, "options": options}
        figures = {f"fid_{HOSTILE}": Figure(math.nan, 1, math.inf), "seconds_per_image": exact(1 + k)}
        figures |= {"clip_score": exact(20 + k), "judge/all": exact(0.5), f"training/{HOSTILE}": exact(1)}
        result = Result(target, {HOSTILE: HOSTILE}, ["fid"], figures, notes=[HOSTILE])
        result.path = folder / str(k)
        result.path.mkdir()
        Image.new("RGB", (64, 64), (20, 40 * k, 90)).save(result.path / "grid.png")
        results.append(result)
    return write_report(results, folder / "report", [HOSTILE], [HOSTILE]) / "report.html"


def hostile_runs(folder: Path) -> Path:
    """A dashboard of two runs, of which one has a hostile stage and metric."""
    for name, stage in (("good", "clip"), ("bad", f"clip{HOSTILE}")):
        run = folder / "logs" / name
        (run / "samples").mkdir(parents=True)
        (run / "config.yaml").write_text(
            f"model: {{_target_: x}}\nstage: {json.dumps(stage)}\ncommand: {json.dumps(HOSTILE)}\n"
        )
        rows = "".join(f"{step},{10 / step},{1 / step},nan,0.5\n" for step in range(1, 100))
        columns = f"step,train/loss,val/loss,lr-{HOSTILE},test/judge/{HOSTILE}"
        (run / "metrics.csv").write_text(f"{columns}\n{rows}")
        Image.new("RGB", (32, 32), (200, 40, 90)).save(
            run / "samples" / "<img src=x onerror=window.hacked=1>-1.png"
        )
    edited(folder / "logs" / "samples" / "001", HOSTILE, {f"kept/{HOSTILE}": 0.5})
    return dashboard.make(folder / "logs")


def edited(folder: Path, prompt: str, means: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), (10, 200, 90)).save(folder / "grid.png")
    found = report("inpaint", prompt, [], {}, {"kept_psnr": math.inf})
    (folder / "edit.json").write_text(json.dumps(found | {"means": means}))


@pytest.mark.parametrize("make", [hostile_report, hostile_runs])
def test_nothing_that_is_named_becomes_markup(tmp_path, make):
    charts, own = parts_of(make(tmp_path).read_text(encoding="utf-8"))
    assert not [tag for tag in MARKUP if tag in own]
    assert "&lt;/script&gt;" in own
    texts = json.dumps(charts)
    assert charts
    assert not [tag for tag in MARKUP if tag in texts], "plotly.js reads tags in names"


def test_a_dashboard_shows_what_was_typed(tmp_path):
    """Each command once, for the runs that it has started; nothing of a run from before it was kept."""
    typed = {"a": "dalle train -m model=clip 'data.root=my pictures'", "c": "dalle train model=clip name=c"}
    typed["b"] = typed["a"]
    for name in ("a", "b", "c", "old"):
        run = tmp_path / name / "clip"
        run.mkdir(parents=True)
        command = f"command: {json.dumps(typed[name])}\n" if name in typed else ""
        (run / "config.yaml").write_text(f"model: {{_target_: x}}\nstage: clip\n{command}")
        (run / "metrics.csv").write_text("step,train/loss\n1,2\n")
    _, page = parts_of(dashboard.make(tmp_path).read_text(encoding="utf-8"))
    shown = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert shown
    lines = html.unescape(shown[1]).splitlines()
    assert lines == ["# a, b", typed["a"], "# c", typed["c"]]


def test_numbers_that_json_does_not_know_are_gaps():
    assert plain({"a": (1.5, math.nan), "b": [math.inf, 2, "nan"]}) == {
        "a": [1.5, None],
        "b": [None, 2, "nan"],
    }


def test_labels_are_no_tags_and_steer_no_terminal():
    assert label('<a href="x">&amp;\x1b') == '&lt;a href="x"&gt;&amp;amp;\\x1b'


def test_long_curves_keep_their_spikes_and_ends():
    column = {step: 1.0 + step * 1e-4 for step in range(10_001)} | {5_003: 99.0, 7_001: -99.0}
    steps, values = thinned(column, 200)
    assert len(steps) <= 204
    assert (steps[0], steps[-1]) == (0, 10_000)
    assert values[steps.index(5_003)] == 99
    assert values[steps.index(7_001)] == -99
    assert thinned({2: 1.0, 1: 3.0}) == ([1, 2], [3.0, 1.0])


def test_a_dashboard_shows_edits_with_their_figures(tmp_path):
    run = tmp_path / "clip"
    run.mkdir()
    (run / "config.yaml").write_text("model: {_target_: x}\nstage: clip\n")
    (run / "metrics.csv").write_text("step,train/loss\n1,2\n")
    _, page = parts_of(dashboard.make(tmp_path).read_text(encoding="utf-8"))
    assert 'id="edits"' not in page
    edited(tmp_path / "samples" / "001", "a red ring", {"to_original": 0.875})
    edited(tmp_path / "samples" / "002", "", {"kept/all": 1.0})
    _, page = parts_of(dashboard.make(tmp_path).read_text(encoding="utf-8"))
    section = page[page.index('id="edits"') : page.rindex("</section>")]
    assert section.count("<img") == 2
    assert "samples/001: inpaint a red ring" in section
    for text in ("to_original", "0.875", "kept/all"):
        assert text in section


def test_pictures_have_a_limit_and_links_are_not_followed(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"x" * 40)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "a.png")
    album = Album(most_bytes=100)
    assert album.add("link", inside / "link.png", inside) == []
    assert [len(album.add(name, tmp_path / f"{name}.png", tmp_path)) for name in "abc"] == [1, 1, 0]
    page = render(
        "dashboard.html",
        [],
        album,
        title="",
        stages=[],
        edits={"names": []},
        thinned=False,
        most_points=1,
        colours=["red"],
    )
    assert "1 more pictures would make it too large" in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not BINARY:
        pytest.skip("no chromium or google-chrome is installed")
    browser = Browser(tmp_path_factory.mktemp("profile"), width=390)
    yield browser
    browser.close()


@pytest.mark.parametrize("make", [hostile_report, hostile_runs])
def test_pages_in_a_browser(tmp_path, browser, make):
    """Curves are switched by the legend, scales by the button, pictures enlarge and Esc closes them; nothing
    is fetched, nothing hostile runs, and a phone has nothing to scroll sideways.
    """
    page = make(tmp_path)
    browser.events.clear()
    browser.open(page)
    browser.wait("document.querySelectorAll('.legendtoggle').length > 1")
    assert browser.value("window.hacked") is None
    assert browser.value("document.documentElement.scrollWidth") == 390

    plot = "document.querySelector('.legendtoggle').closest('[data-chart]')"
    browser.click("document.querySelector('.legendtoggle')")
    browser.wait(f"{plot}.data.filter((trace) => trace.visible === 'legendonly').length === 1")

    button = "document.querySelector('[data-scale]')"
    axis = browser.value(f"{button}.dataset.scale")
    chart = f"{button}.closest('.chart').querySelector('[data-chart]')"
    before = browser.value(f"{chart}._fullLayout.{axis}.type")
    browser.click(button)
    browser.wait(f"{chart}._fullLayout.{axis}.type !== {json.dumps(before)}")

    browser.click("document.querySelector('.picture')")
    browser.wait("document.querySelector('dialog').open")
    assert browser.value("document.querySelector('dialog img').getBoundingClientRect().width") > 300
    browser.press("Escape", 27)
    browser.wait("!document.querySelector('dialog').open")
    assert browser.errors() == []
    assert [url for url in browser.fetched() if url != page.resolve().as_uri()] == []
