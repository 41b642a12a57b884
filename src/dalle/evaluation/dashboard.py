"""The runs of a folder on one page that needs no server or account: `dalle.evaluation.dashboard`.

It holds, by stage, facts, the panels of `dalle.training.dashboard_spec` and pictures over time, and is made
from what every run leaves in its directory whatever its loggers: metrics.csv, manifest.json, samples/.
"""

import argparse
import base64
import html
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dalle.data.frozen import FROZEN
from dalle.errors import UserError, printable
from dalle.evaluation.plots import plain
from dalle.evaluation.report import STYLE, belongs, number
from dalle.files import write_text
from dalle.run_dir import Run
from dalle.training.dashboard_spec import is_curve, matching, panels

Table = dict[str, dict[int, float]]  # metrics by name, values by step

DRAWINGS = 4  # of a kind, evenly over the time of a run


def runs_below(folder: Path) -> dict[str, list[Run]]:
    """Runs by stage, begun or finished, in the order of their names. Raises UserError where none are."""
    found: dict[str, list[Run]] = defaultdict(list)
    for metrics in sorted(folder.rglob("metrics.csv")):
        run = Run(metrics.parent)
        if (run.path / "config.yaml").exists():
            found[run.config("stage")["stage"]].append(run)
    if not found:
        raise UserError(f"{folder} holds no runs; give the folder of a training, such as logs/default")
    return dict(found)


def draw(title: str, metrics: Sequence[str], tables: dict[str, Table]) -> bytes | None:
    """A panel over several runs as a PNG; None where no run has anything of it."""
    canvas = Figure(figsize=(6, 3.4), layout="constrained")
    axes = canvas.subplots()
    shown = {run: [n for m in metrics for n in matching(m, table)] for run, table in tables.items()}
    for run, names in shown.items():
        for name in names if is_curve(metrics) else []:
            label = [*([run] if len(tables) > 1 else []), *([name] if len(names) > 1 else [])]
            axes.plot(
                *zip(*tables[run][name].items(), strict=True), label=plain(" ".join(label)), linewidth=1
            )
        if names and not is_curve(metrics):
            values = [last(tables[run][name]) for name in names]
            axes.plot(values, [plain(name.removeprefix("test/")) for name in names], "o", label=plain(run))
    if not any(shown.values()):
        return None
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=7)
    axes.set_title(title, fontsize=10)
    png = io.BytesIO()
    canvas.savefig(png, dpi=110, format="png")
    return png.getvalue()


def last(column: dict[int, float]) -> float:
    return column[max(column)]


def drawings(run: Run) -> dict[str, list[Path]]:
    """The pictures of a run by kind (step, reconstruction, test), a few of each from first to last."""
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((run.path / "samples").glob("*.png")):
        if not belongs(path, run.path):
            continue
        kinds[path.stem.rpartition("-")[0] or path.stem].append(path)
    chosen = {}
    for kind, paths in kinds.items():
        n = min(DRAWINGS, len(paths))
        chosen[kind] = [paths[round(i * (len(paths) - 1) / max(1, n - 1))] for i in range(n)]
    return chosen


def facts(run: Run, table: Table) -> list[str]:
    """What a run is, in a few words; of one that is not finished how far it is."""
    if not run.finished:
        steps = max((max(column) for column in table.values()), default=0)
        return ["not finished", f"step {steps:,}"]
    about = run.manifest("parameters", "steps", "seconds_training", "data", "weights")
    data = about["data"]
    upstream = {key: about[key]["weights"] for key in FROZEN if key in about}
    return [
        f"{about['parameters']:,} parameters",
        f"{about['steps']:,} steps in {about['seconds_training']:.0f} s",
        f"{data['source']}, {data['items'].get('train', 0):,} items, {data['fingerprint'].get('train', '')}",
        *(f"{key} {weights}" for key, weights in upstream.items()),
        f"weights {about['weights']}",
    ]


def make(folder: Path) -> Path:
    """Writes the page."""
    found, name = runs_below(folder), html.escape(str(folder))
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>',
        f"<h1>{name}</h1>",
    ]
    for stage, runs in found.items():
        tables = {str(run.path.relative_to(folder)): run.metrics() for run in runs}
        parts.append(f"<h2>{html.escape(stage)}</h2>")
        for run, (name, table) in zip(runs, tables.items(), strict=True):
            about = html.escape("; ".join(facts(run, table)))
            parts.append(f"<p><b>{html.escape(name)}</b> <small>{about}</small></p>")
        plots = {title: draw(title, metrics, tables) for title, metrics in panels(stage).items()}
        parts += figures({title: png for title, png in plots.items() if png is not None})
        for run, (name, table) in zip(runs, tables.items(), strict=True):
            for kind, paths in drawings(run).items():
                parts.append(f"<h3>{html.escape(f'{name}: {kind}')}</h3>")
                parts += figures({path.stem: path.read_bytes() for path in paths})
            parts += tested(name, table)
    page = folder / "dashboard.html"
    write_text(page, "\n".join([*parts, "</html>\n"]))
    return page


def figures(pngs: dict[str, bytes]) -> list[str]:
    """Pictures with their titles, within the page."""
    parts = ["<div class=grids>"]
    for title, png in pngs.items():
        data = base64.b64encode(png).decode()
        source = f"data:image/png;base64,{data}"
        parts.append(f'<figure><img alt="{html.escape(title)}" src="{source}"></figure>')
    return [*parts, "</div>"]


def tested(name: str, table: Table) -> list[str]:
    """All numbers of a run's test, folded up."""
    numbers = {key: last(column) for key, column in table.items() if key.startswith("test/")}
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{number(v)}</td></tr>" for k, v in numbers.items())
    summary = f"<details><summary>{html.escape(name)}: tests</summary><table>{rows}</table></details>"
    return [summary] if numbers else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dalle dashboard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="a folder of runs, such as logs/demo")
    print(printable(str(make(parser.parse_args(arguments).runs))))
