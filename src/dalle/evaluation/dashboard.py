"""The runs of a folder on one page that needs no server or account: `dalle.evaluation.dashboard`.

It holds, by stage, facts, the panels of `dalle.training.dashboard_spec` and pictures over time, and is made
from what every run leaves in its directory whatever its loggers: metrics.csv, manifest.json, samples/.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle import schemas
from dalle.data.frozen import FROZEN
from dalle.errors import UserError, Words, printable
from dalle.evaluation.page import MOST_POINTS, Album, Chart, Picture, belongs, label, render, thinned
from dalle.evaluation.plots import COLOURS, DASHES, NUMBER, chart, named
from dalle.evaluation.report import Cell
from dalle.files import write_text
from dalle.metrics.intervals import exact
from dalle.pipelines import edit_report
from dalle.reading import read_json
from dalle.run_dir import Run
from dalle.training.dashboard_spec import is_curve, matching, panels

Table = dict[str, dict[int, float]]  # metrics by name, values by step

DRAWINGS = 4  # of a kind, evenly over the time of a run
WIDE = 5  # largest to smallest value of curves from which a logarithmic scale is of use


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


def draw(title: str, metrics: Sequence[str], tables: dict[str, Table]) -> Chart | None:
    """A panel over several runs; None where no run has anything of it."""
    found = {run: [n for m in metrics for n in matching(m, table)] for run, table in tables.items()}
    if not any(found.values()):
        return None
    return curves(title, found, tables) if is_curve(metrics) else bars(title, found, tables)


def curves(title: str, found: dict[str, list[str]], tables: dict[str, Table]) -> Chart:
    """A line for each run and metric: the run is the colour, the metric the dash; of one run the colour."""
    all_names = list(dict.fromkeys(name for names in found.values() for name in names))
    traces: list[dict[str, Any]] = []
    for k, (run, names) in enumerate(found.items()):
        for name in names:
            steps, values = thinned(tables[run][name])
            said = [*([run] if len(tables) > 1 else []), *([name] if len(all_names) > 1 else [])] or [name]
            m = all_names.index(name)
            colour, dash = (k, m) if len(tables) > 1 else (m, 0)
            traces.append({
                "type": "scatter",
                "mode": "lines" if len(steps) > 30 else "lines+markers",
                "name": label(" ".join(said)),
                "meta": k,
                "x": steps,
                "y": values,
                "line": {
                    "color": COLOURS[colour % len(COLOURS)],
                    "dash": DASHES[dash % len(DASHES)],
                    "width": 1.5,
                },
                "marker": {"size": 4},
                "hovertemplate": f"%{{y:{NUMBER}}}",
            })  # fmt: skip
    values = [value for trace in traces for value in trace["y"]]
    wide = min(values) > 0 and max(values) > WIDE * min(values)
    x = {**named("step"), "hoverformat": ",d", "exponentformat": "none", "nticks": 6}
    return chart(title, traces, x, {}, scale="yaxis" if wide else "", hovermode="x unified")


def bars(title: str, found: dict[str, list[str]], tables: dict[str, Table]) -> Chart:
    """The last value of each metric as a bar for each run."""
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label(run),
            "meta": k,
            "y": [label(name.removeprefix("test/").removeprefix("judge/")) for name in names],
            "x": [last(tables[run][name]) for name in names],
            "marker": {"color": COLOURS[k % len(COLOURS)]},
            "texttemplate": "%{x:.3~g}",
            "hovertemplate": f"%{{y}}: %{{x:{NUMBER}}}",
        }
        for k, (run, names) in enumerate(found.items())
        if names
    ]
    rows = sum(len(names) for names in found.values())
    share = all(name.startswith("test/judge/") for names in found.values() for name in names)
    x = {"range": [0, 1]} if share else {"rangemode": "tozero"}
    y = {"type": "category", "autorange": "reversed", "ticklabelstandoff": 5}
    return chart(title, traces, x, y, height=90 + 26 * rows, hovermode="closest")


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


def facts(run: Run, table: Table) -> dict[str, str]:
    """What a run is, by name; of one that is not finished how far it is."""
    if not run.finished:
        steps = max((max(column) for column in table.values()), default=0)
        return {"state": "not finished", "steps": f"{steps:,}"}
    about = run.manifest("parameters", "steps", "seconds_training", "data", "weights")
    data = about["data"]
    upstream = {key: about[key]["weights"] for key in FROZEN if key in about}
    return {
        "state": "finished",
        "steps": f"{about['steps']:,}",
        "training": duration(about["seconds_training"]),
        "parameters": f"{about['parameters']:,}",
        "data": f"{data['source']} {data['fingerprint'].get('train', '')}".strip(),
        "items": f"{data['items'].get('train', 0):,}",
        "weights": str(about["weights"]),
        **{key.replace("_", " "): str(weights) for key, weights in upstream.items()},
    }


def commands(runs: Mapping[str, Run]) -> list[str]:
    """What was typed to start them, for a shell, and where they are several, for which. Of those that were
    trained from Python, or before that was kept, there is nothing.
    """
    typed: dict[str, list[str]] = defaultdict(list)
    for name, run in runs.items():
        if command := run.config().get("command"):
            typed[command].append(name)
    return [
        line
        for command, names in typed.items()
        for line in ([f"# {', '.join(names)}", command] if len(runs) > 1 else [command])
    ]


def duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"


def make(folder: Path) -> Path:
    """Writes the page."""
    charts: list[Chart] = []
    album, stages, longest = Album(), [], 0
    for stage, runs in runs_below(folder).items():
        tables = {str(run.path.relative_to(folder)): run.metrics() for run in runs}
        short = {name.removesuffix(f"/{stage}"): table for name, table in tables.items()}
        drawn = [draw(title, metrics, short) for title, metrics in panels(stage).items()]
        own = [some for some in drawn if some is not None]
        charts += own
        shown = [
            {"name": name, "facts": facts(run, table), "pictures": pictures(run, album)}
            for run, (name, table) in zip(runs, tables.items(), strict=True)
        ]
        stages.append({
            "name": stage,
            "runs": shown,
            "facts": list(dict.fromkeys(fact for run in shown for fact in run["facts"])),
            "commands": commands(dict(zip(short, runs, strict=True))),
            "charts": range(len(charts) - len(own), len(charts)),
            "tests": tested(list(tables.values())),
        })  # fmt: skip
        columns = [column for table in tables.values() for column in table.values()]
        longest = max([longest, *map(len, columns)])
    page = folder / "dashboard.html"
    values = {
        "title": str(folder),
        "stages": stages,
        "edits": edits(folder, album),
        "most_points": MOST_POINTS,
        "colours": COLOURS,
    }
    write_text(page, render("dashboard.html", charts, album, thinned=longest > MOST_POINTS, **values))
    return page


def edits(folder: Path, album: Album) -> dict[str, Any]:
    """Edits of pictures by these runs, from the first to the last: their names, a row of numbers for each
    figure, and their pictures.
    """
    names, tables, shown = list[str](), list[dict[str, float]](), list[Picture]()
    for path in sorted(folder.rglob(edit_report.FILE)):
        if not belongs(path, folder):
            continue
        report = read_json(path, schemas.EditReport, "sample anew, or delete it")
        place = path.parent.relative_to(folder).as_posix()
        names.append(f"{place}: {report['edit']} {report['prompt']}".strip())
        tables.append(report["means"] | report["figures"])
        shown += album.add(names[-1], path.parent / "grid.png", folder)
    figures = dict.fromkeys(name for table in tables for name in table)
    rows = [
        (name, [Cell.of(name, exact(table[name]) if name in table else None) for table in tables])
        for name in figures
    ]
    return {"names": names, "rows": rows, "pictures": shown}


def pictures(run: Run, album: Album) -> dict[str, list[Picture]]:
    return {
        kind: [picture for path in paths for picture in album.add(path.stem, path, run.path)]
        for kind, paths in drawings(run).items()
    }


def tested(tables: Sequence[Table]) -> list[tuple[str, list[Cell]]]:
    """All numbers of the tests: a row for each metric, a cell for each run."""
    names = dict.fromkeys(key for table in tables for key in table if key.startswith("test/"))
    rows = []
    for name in names:
        values = [exact(last(table[name])) if name in table else None for table in tables]
        rows.append((name, [Cell.of(name.removeprefix("test/"), value) for value in values]))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Words(prog="dalle dashboard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="a folder of runs, such as logs/demo")
    print(printable(str(make(parser.parse_args(arguments).runs))))
