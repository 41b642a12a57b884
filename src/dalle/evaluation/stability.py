"""How steady a training was, read from its metrics.csv; over several runs (seeds) the mean, least and most.

training/spikes        per thousand logged steps: losses above the median of the twenty before by more
                       than six times their median absolute deviation
training/not_finite    logged steps whose loss is no number
training/skipped       steps whose loss or gradient was no number and that were left out, in any precision
                       (train/skipped, the count of `dalle.stages.nan_guard`)
training/grad_spread   95th percentile of the gradient norm over its median, where it is logged
training/seconds       of all stages together
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from dalle.metrics.intervals import Figure
from dalle.run_dir import Run

BEFORE, DEVIATIONS = 20, 6.0
LOSSES = ("train/loss", "train/loss_g", "train/loss_d")  # not those of parts of the time


def stability(folders: Sequence[Path], main: str, stages: Iterable[str]) -> dict[str, Figure]:
    """The figures of those folders (one for each seed) whose stage `main`, which makes the pictures, is
    finished; `stages` are the names of all runs that the pipeline is put together from.
    """
    stages, measured = list(stages), []
    for folder in [folder for folder in folders if Run(folder / main).finished]:
        runs = [run for run in (Run(folder / stage) for stage in stages) if run.finished]
        seconds = sum(run.manifest().get("seconds_training", math.nan) for run in runs)
        known = {"seconds": float(seconds)} if math.isfinite(seconds) else {}
        measured.append({**known, **of_run(Run(folder / main))})
    found = {}
    for name in dict.fromkeys(name for figures in measured for name in figures):
        values = [figures[name] for figures in measured if name in figures]
        found[f"training/{name}"] = Figure(sum(values) / len(values), min(values), max(values))
    return found


def of_run(run: Run) -> dict[str, float]:
    columns = read_columns(run)
    losses = [columns[name] for name in LOSSES if columns.get(name)]
    logged = sum(map(len, losses))
    found: dict[str, float] = {}
    if logged:
        found["spikes"] = 1000 * sum(map(spikes, losses)) / logged
        found["not_finite"] = float(sum(not math.isfinite(v) for values in losses for v in values))
    if skipped := columns.get("train/skipped"):
        found["skipped"] = max(skipped)  # a count that grows
    if norms := next((column for name, column in columns.items() if "grad_norm" in name), None):
        ordered = sorted(norm for norm in norms if math.isfinite(norm)) or [0.0]
        found["grad_spread"] = ordered[int(0.95 * (len(ordered) - 1))] / max(median(ordered), 1e-12)
    return found


def read_columns(run: Run) -> dict[str, list[float]]:
    """The numbers of each column, without gaps."""
    return {name: list(column.values()) for name, column in run.metrics().items()}


def spikes(values: Sequence[float]) -> int:
    """How often a value is far above those before it."""
    count = 0
    for k in range(BEFORE, len(values)):
        before = [value for value in values[k - BEFORE : k] if math.isfinite(value)]
        if len(before) < BEFORE // 2:
            continue
        middle = median(before)
        deviation = median(abs(value - middle) for value in before)
        count += values[k] > middle + DEVIATIONS * max(deviation, 1e-12)
    return count
