"""Results as people read them: a table, a CSV, plots, and one HTML page that needs nothing but itself.

table.md      the main figures; what was measured by another protocol bears a sign
figures.csv   every figure with its interval, a row for each result
*.png         the plots, which are also in report.html
report.html   all of it, with the first pictures of every result side by side
"""

import base64
import csv
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dalle.evaluation.plots import draw_plots
from dalle.evaluation.results import Result, flat, marks
from dalle.files import as_cell, write_text
from dalle.metrics.intervals import Figure

MAIN_FIGURES = (  # of the table, in this order; a prefix takes all that begin so
    "fid", "kid", "inception_score", "precision", "recall", "clip_score", "retrieval/image_to_text_r1",
    "hard_negatives/all", "hard_negatives/shape", "judge/all", "chance/all", "judge/seen/all",
    "chance/seen/all", "judge/seen_new/all", "judge/unseen/all", "chance/unseen/all", "judge_residual",
    "zero_shot/top1", "psnr", "ssim", "code_usage",
    "seconds_per_image", "peak_memory_gb", "gflops_per_image", "parameters", "training/",
)  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .25em .7em; text-align: right }
tr { border-bottom: 1px solid #ddd } td:first-child, th:first-child { text-align: left }
small { color: #777 } img { max-width: 100%; image-rendering: auto } pre { font-size: 12px; overflow: auto }
.grids { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; max-width: 24em }
.wide { overflow-x: auto }
"""


def write_report(results: Sequence[Result], folder: Path, command: str, failed: Sequence[str] = ()) -> Path:
    """Writes everything into a new folder."""
    names, (signs, lines) = labels(results), marks(results)
    folder.mkdir(parents=True, exist_ok=True)
    marked = [f"{name} {sign}".strip() for name, sign in zip(names, signs, strict=True)]
    columns = table_columns(results)
    cells = [[shown(result.figures.get(column)) for column in columns] for result in results]
    write_text(folder / "table.md", markdown(["", *columns], marked, cells, lines, failed))
    write_text(folder / "figures.csv", as_csv(results, marked))
    plots = draw_plots(results, marked, signs, folder)
    page = as_html(results, marked, columns, lines, plots, command, failed)
    write_text(folder / "report.html", page)
    return folder


def labels(results: Sequence[Result]) -> list[str]:
    """What distinguishes each result: its kind, its folder and the settings that are not those of all."""
    settings = [settings_of(result) for result in results]
    common = [key for key in settings[0] if all(key in own for own in settings)]
    differing = [key for key in common if len({repr(own[key]) for own in settings}) > 1]
    kinds = {result.target["kind"] for result in results}
    names = []
    for result, own in zip(results, settings, strict=True):
        said = [result.target["kind"]] if len(kinds) > 1 else []
        if len(kinds) == 1:  # settings of other kinds are other settings: their names say nothing here
            said += [f"{key.rsplit('.', 1)[-1]}={own[key]}" for key in differing if own.get(key) is not None]
        names.append(" ".join(said) or result.target["kind"])
    if len(set(names)) < len(names):  # other weights with the same settings
        names = [f"{name} ({home(result)})" for name, result in zip(names, results, strict=True)]
    return names


def settings_of(result: Result) -> dict[str, Any]:
    facts = {key: value for key, value in result.target.items() if key not in ("weights", "paths", "kind")}
    return flat(facts)


def home(result: Result) -> str:
    """The folder of the runs, or of the pictures."""
    last = Path(list(result.target["paths"].values())[-1])
    return last.name if result.target["kind"] == "folder" else last.parent.name


def table_columns(results: Sequence[Result]) -> list[str]:
    there = list(dict.fromkeys(name for result in results for name in result.figures))
    chosen: list[str] = []
    for wanted in MAIN_FIGURES:
        chosen += [name for name in there if matches(name, wanted) and name not in chosen]
    return chosen


def matches(name: str, wanted: str) -> bool:
    """`fid` is also `fid_clip`; `precision` is not `recall`; `clip_score` is not that of real pictures."""
    if wanted.endswith("/"):
        return name.startswith(wanted)
    return name == wanted or (
        wanted in ("fid", "kid", "precision", "recall") and name.startswith(f"{wanted}_")
    )


def number(value: float) -> str:
    if value != value:
        return "nan"
    if value == int(value) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def shown(figure: Figure | None) -> str:
    """A value, and half its interval where it has one: 12.3 ± 0.4."""
    if figure is None:
        return ""
    half = max(figure.high - figure.value, figure.value - figure.low)
    return number(figure.value) + (f" ± {number(half)}" if half > 0 else "")


def as_text(result: Result) -> str:
    """One result, for a terminal."""
    width = max(map(len, result.figures), default=0)
    lines = [""]
    for name, figure in result.figures.items():
        interval = "" if figure.low == figure.high else f"   {number(figure.low)} to {number(figure.high)}"
        lines.append(f"{name:<{width}}  {number(figure.value):>10}{interval}")
    pictures = result.protocol["pictures"] or result.protocol["real_pictures"]
    lines += [f"over {pictures} pictures; intervals of 95 %", *result.notes]
    return "\n".join(lines)


def markdown(
    header: Sequence[str],
    names: Sequence[str],
    cells: Sequence[Sequence[str]],
    lines: Iterable[str],
    failed: Iterable[str],
) -> str:
    rows = [header, ["---"] + ["--:"] * (len(header) - 1)]
    rows += [[name, *cell] for name, cell in zip(names, cells, strict=True)]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        "\n".join([text, *(f"\n{line}" for line in lines), *(f"\nfailed: {line}" for line in failed)]) + "\n"
    )


def as_csv(results: Sequence[Result], names: Sequence[str]) -> str:
    """Every figure of every result, its interval, settings and protocol."""
    rows = []
    for result, name in zip(results, names, strict=True):
        row: dict[str, Any] = {"result": name, "id": result.id, "protocol": result.protocol_id}
        row |= {"kind": result.target["kind"], **settings_of(result)}
        for figure_name, figure in result.figures.items():
            row[figure_name] = figure.value
            row |= {f"{figure_name}.low": figure.low, f"{figure_name}.high": figure.high}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows({key: as_cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def as_html(
    results: Sequence[Result],
    names: Sequence[str],
    columns: Sequence[str],
    lines: Sequence[str],
    plots: dict[str, Path],
    command: str,
    failed: Sequence[str],
) -> str:
    """One page without a link to anything."""
    say: Callable[[Any], str] = lambda value: html.escape(str(value))  # noqa: E731
    parts = [f"<h1>Evaluation</h1><p><code>{say(command)}</code></p>", "<div class=wide><table><tr><th></th>"]
    parts += [f"<th>{say(column)}</th>" for column in columns]
    for result, name in zip(results, names, strict=True):
        parts.append(f"</tr><tr><td>{say(name)}</td>")
        parts += [f"<td>{say(shown(result.figures.get(column)))}</td>" for column in columns]
    parts.append("</tr></table></div>")
    parts += [f"<p><small>{say(line)}</small></p>" for line in lines]
    parts += [f"<p><b>failed</b>: {say(line)}</p>" for line in failed]
    notes = dict.fromkeys(note for result in results for note in result.notes)
    parts += [f"<p><small>{say(note)}</small></p>" for note in notes]
    parts += [f"<h2>{say(title)}</h2>{image(path, title)}" for title, path in plots.items()]
    parts.append("<h2>First pictures</h2><div class=grids>")
    for result, name in zip(results, names, strict=True):
        if result.path and belongs(grid := result.path / "grid.png", result.path):
            parts.append(f"<figure>{image(grid, name)}<figcaption>{say(name)}</figcaption></figure>")
    parts.append("</div><h2>Protocol</h2>")
    for identity in dict.fromkeys(result.protocol_id for result in results):
        first = next(result for result in results if result.protocol_id == identity)
        facts = "\n".join(f"{key}: {value}" for key, value in flat(first.protocol).items())
        parts.append(f"<pre>protocol {identity}\n{say(facts)}</pre>")
    versions = ", ".join(f"{name} {version}" for name, version in results[0].environment.items())
    parts.append(f"<p><small>{say(versions)}. Intervals of 95 %, as plus or minus.</small></p>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{STYLE}'
    return head + "</style>" + "\n".join(parts) + "</html>\n"


def belongs(path: Path, folder: Path) -> bool:
    """Whether it is a file of this folder, and no link to one elsewhere."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
