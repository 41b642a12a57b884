"""Results as people read them: a table, a CSV, and one HTML page that needs nothing but itself.

table.md      the main figures; what was measured by another protocol bears a sign
figures.csv   every figure with its interval, a row for each result
report.html   all of it, with charts and the first pictures of every result side by side
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.evaluation.page import Album, render
from dalle.evaluation.plots import charts
from dalle.evaluation.results import Result, flat, marks
from dalle.files import as_cell, write_text
from dalle.metrics.intervals import Figure

MAIN_FIGURES = (  # of the table, in this order; a prefix takes all that begin so
    "fid", "kid", "inception_score", "precision", "recall", "clip_score", "cosine_image", "cosine_caption",
    "cosine_caption_of_data", "retrieval/image_to_text_r1", "retrieval_of_data/image_to_text_r1",
    "hard_negatives/all", "hard_negatives/shape", "judge/all", "chance/all", "judge/seen/all",
    "chance/seen/all", "judge/seen_new/all", "judge/unseen/all", "chance/unseen/all", "judge_residual",
    "zero_shot/top1", "before_psnr", "psnr", "better", "ssim", "to_original", "to_caption", "kept/",
    "code_usage",
    "seconds_per_embedding", "seconds_per_image", "peak_memory_gb", "gflops_per_image", "parameters",
    "training/",
)  # fmt: skip
SHARES = (  # figures from 0 to 1, by how their names begin
    "judge/", "chance/", "retrieval/", "retrieval_of_data/", "hard_negatives/", "zero_shot/", "precision",
    "recall", "code_usage", "better", "kept/",
)  # fmt: skip


def write_report(
    results: Sequence[Result], folder: Path, commands: Sequence[str] = (), failed: Sequence[str] = ()
) -> Path:
    """Writes everything into a new folder.

    Args:
        commands: what made the results, a line each.
        failed: a line for each result that there is not, and why.
    """
    names, (signs, lines) = labels(results), marks(results)
    folder.mkdir(parents=True, exist_ok=True)
    marked = [f"{name} {sign}".strip() for name, sign in zip(names, signs, strict=True)]
    columns = table_columns(results)
    cells = [[shown(result.figures.get(column)) for column in columns] for result in results]
    write_text(folder / "table.md", markdown(["", *columns], marked, cells, lines, failed))
    write_text(folder / "figures.csv", as_csv(results, marked))
    write_text(folder / "report.html", as_html(results, marked, signs, columns, lines, commands, failed))
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
    for place in (home, runs):  # other weights with the same settings
        if len(set(names)) < len(names):
            names = [f"{name} ({place(result)})" for name, result in zip(names, results, strict=True)]
    return names


def settings_of(result: Result) -> dict[str, Any]:
    facts = {key: value for key, value in result.target.items() if key not in ("weights", "paths", "kind")}
    return flat(facts)


def home(result: Result) -> str:
    """The folder of the runs, or of the pictures."""
    last = Path(list(result.target["paths"].values())[-1])
    return last.name if result.target["kind"] == "folder" else last.parent.name


def runs(result: Result) -> str:
    """The folders of the stages: those of a prior and an ar_prior have one home."""
    return ", ".join(Path(path).name for path in result.target["paths"].values())


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
    if not math.isfinite(value):
        return str(value)
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


@dataclass(frozen=True)
class Cell:
    """A number of a table; `share`: how much of its width is coloured, from 0 to 1."""

    text: str
    share: float | None = None

    @classmethod
    def of(cls, name: str, figure: Figure | None) -> "Cell":
        share = name.startswith(SHARES) and figure is not None and 0 <= figure.value <= 1
        return cls(shown(figure), figure.value if figure is not None and share else None)


def as_html(
    results: Sequence[Result],
    names: Sequence[str],
    signs: Sequence[str],
    columns: Sequence[str],
    lines: Sequence[str],
    commands: Sequence[str],
    failed: Sequence[str],
) -> str:
    """One page that fetches nothing. The results are numbered: charts refer to the numbers."""
    numbered = [f"{k}. {name}" for k, name in enumerate(names, 1)] if len(names) > 1 else list(names)
    rows = [
        (name, [Cell.of(column, result.figures.get(column)) for column in columns])
        for name, result in zip(numbered, results, strict=True)
    ]
    album, pictures = Album(), []
    for result, name in zip(results, numbered, strict=True):
        if result.path:
            pictures += album.add(name, result.path / "grid.png", result.path)
    protocols = {
        result.protocol_id: {"id": result.protocol_id, "sign": sign, "facts": flat(result.protocol)}
        for result, sign in zip(results, signs, strict=True)
    }
    return render(
        "report.html",
        charts(results, numbered, signs),
        album,
        title="Evaluation",
        commands=commands,
        failed=failed,
        columns=columns,
        rows=rows,
        marks=lines,
        notes=list(dict.fromkeys(note for result in results for note in result.notes)),
        pictures=pictures,
        protocols=list(protocols.values()),
        versions=", ".join(f"{name} {version}" for name, version in results[0].environment.items()),
    )
