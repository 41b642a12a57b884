"""Sweeps that survive: every job is a process of its own, and what came of it is noted beside its run.

    logs/<name>/                                the folder of a sweep
        <stage>/optimizer.lr=0.0001/            a run directory per job
        <stage>/.jobs/optimizer.lr=0.0001.json  its state: running, finished, stopped or failed, and why
        sweep.csv                               all of them with their metrics

The same command again skips what is finished, resumes what was stopped or killed, and leaves what has failed
(``resume=true`` tries it again). Nothing here is needed to use a run.
"""

import csv
import io
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle import schemas
from dalle.errors import UserError
from dalle.files import as_cell, write_json, write_text
from dalle.launch.processes import REASON, STOPPED, call
from dalle.machine import is_main_process
from dalle.reading import read_json
from dalle.run_dir import Run
from dalle.run_lock import only_one, sidecar

COLUMNS = ("job", "state", "reason", "seconds", "overrides")


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Args:
        command: what starts it, without its words.
        again: try it although it has failed before.
        overwrite: begin from nothing although it may be finished.
    """

    run: Path
    command: list[str]
    words: list[str]
    again: bool = False
    overwrite: bool = False

    @property
    def notes(self) -> Path:
        return sidecar(self.run, ".json")

    def note(self, state: str, reason: str = "", seconds: float = 0.0) -> str:
        record = {
            "state": state,
            "reason": reason,
            "seconds": round(seconds, 1),
            "overrides": self.words,
        }
        write_json(self.notes, record)
        return state

    @property
    def settled(self) -> str | None:
        """How it ended, when there is nothing more to do for it."""
        if self.overwrite:
            return None
        if Run(self.run).finished:
            return "finished"
        state = read(self.notes).get("state")
        return "failed" if state == "failed" and not self.again else None


def read(notes: Path) -> dict[str, Any]:
    """What is noted of a job; nothing where nothing is, or notes are damaged: then it is done again."""
    try:
        return dict(read_json(notes, schemas.Job, "delete it"))
    except UserError:
        return {}


def perform(job: Job) -> str:
    """Does a job, unless there is nothing to do, and notes what came of it.

    Returns: finished, stopped or failed.
    """
    if not is_main_process():  # of several that SLURM has started for one job: its other ranks
        return "failed" if call([*job.command, *job.words]) else "finished"
    with only_one(job.run) as lock:
        if (state := job.settled) is not None:
            return state
        reason = sidecar(job.run, ".reason")
        reason.unlink(missing_ok=True)
        job.note("running")
        going_on = Run(job.run).occupied and not job.overwrite
        started = time.perf_counter()
        words = [*job.words, *(["resume=true"] if going_on else [])]
        code = call([*job.command, *words], lock, **{REASON: str(reason)})
        seconds = time.perf_counter() - started
        why = reason.read_text(encoding="utf-8") if reason.exists() else ended(code)
        reason.unlink(missing_ok=True)
        if code == 0:
            return job.note("finished", seconds=seconds)
        return job.note(STOPPED, "", seconds) if why == STOPPED else job.note("failed", why, seconds)


def ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")


def sweep(
    jobs: Sequence[Job],
    folder: Path,
    metric: str,
    launch: Callable[[list[Job]], list[str]] | None = None,
) -> int:
    """Does all jobs, goes on when one has failed, and shows what came of them.

    Args:
        folder: where the table is left, as ``sweep.csv``.
        metric: the one that is shown.
        launch: does jobs in another way than one after another, and gives their states.

    Returns: an exit code: 0 when all are finished.
    """
    waiting = [job for job in jobs if job.settled is None]
    states = {job.run: job.settled or STOPPED for job in jobs}
    done = launch(waiting) if launch and waiting else until_stopped(perform(job) for job in waiting)
    states |= {job.run: state for job, state in zip(waiting, done, strict=False)}
    for job in jobs:
        if states[job.run] == "finished" and read(job.notes).get("state") != "finished":
            job.note("finished")  # by a process that outlived the sweep that had started it
    close(folder, metric, [job.notes for job in jobs])
    if "failed" in states.values():
        print("what has failed stays so; the same command with resume=true tries it again")
    return int(set(states.values()) != {"finished"})


def close(folder: Path, metric: str, elsewhere: Sequence[Path] = ()) -> None:
    """Writes the table and shows it."""
    rows = table(folder, elsewhere)
    write_text(folder / "sweep.csv", as_csv(rows))
    show(rows, metric)


def until_stopped(states: Iterable[str]) -> Iterator[str]:
    for state in states:
        yield state
        if state == STOPPED:
            return


def table(folder: Path, elsewhere: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """A row per job that was ever begun in a folder, with the metrics of its run; and one for each whose
    notes are `elsewhere`, as when a sweep is over name=.
    """
    rows: list[dict[str, Any]] = []
    found = {path.resolve(): path for path in (*folder.rglob(".jobs/*.json"), *elsewhere)}
    for notes in sorted(found.values()):
        run = Run(notes.parent.parent / notes.name.removesuffix(".json"))
        if record := read(notes):
            job = {"job": os.path.relpath(run.path, folder), "overrides": " ".join(record.pop("overrides"))}
            rows.append({**job, **record, **(run.manifest("metrics")["metrics"] if run.finished else {})})
    return rows


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    metrics = sorted({key for row in rows for key in row} - set(COLUMNS))
    writer = csv.DictWriter(text, [*COLUMNS, *metrics])
    writer.writeheader()
    writer.writerows({key: as_cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def show(rows: Sequence[dict[str, Any]], metric: str) -> None:
    """Prints the table; a job is called by what distinguishes it from the others."""
    settings = [[o for o in row["overrides"].split(" ") if not o.startswith("paths.run=")] for row in rows]
    lines = [("job", "state", metric, "reason")]
    for row, own in zip(rows, settings, strict=True):
        differs = [o for o in own if not all(o in others for others in settings)]
        value = row.get(metric)
        value = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append((" ".join(differs) or row["job"], row["state"], value, row["reason"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
