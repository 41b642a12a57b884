"""Kills, full disks and signals while a stage is trained: nothing is lost, and what is resumed ends as if
nothing had happened, in weights (bit for bit) and in records.
"""

import csv
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file

from torture import disks
from torture.trial import Ended, Trial, run

UPSTREAM = {
    "prior": ("clip",), "ar_prior": ("clip",), "decoder": ("clip",), "dit": ("clip",), "gan": ("clip",),
    "dalle": ("dvae",),
}  # fmt: skip
STAGES = ("clip", "dvae", "vqgan", "vae", "prior", "ar_prior", "decoder", "dit", "gan", "dalle", "upsampler")
LENGTH = ("trainer.max_steps=6", "callbacks.checkpoint.every=2", "trainer.val_check_interval=3")
TIMES = ("train/samples_per_second", "train/cpu_cores")  # columns that differ from run to run
CALLS = ("replace", "rename", "fsync", "unlink", "mkdir")  # of os: where a file comes to be, or goes


@dataclass(frozen=True)
class Reference:
    """A run that nothing happened to."""

    logs: Path
    run: Path
    seconds: float
    calls: int


def command(stage: str, logs: Path, upstream: Path, *more: str) -> tuple[str, ...]:
    frozen = [f"upstream.{name}='{upstream / 'default' / name}'" for name in UPSTREAM.get(stage, ())]
    return (*tiny.overrides(stage, logs, *LENGTH, *frozen), f"paths.cache='{upstream}/.cache'", *more)


def directory(stage: str, logs: Path) -> Path:
    return logs / "default" / {"dit": "decoder"}.get(stage, stage)


def reference(stage: str, folder: Path, upstream: Path) -> Reference:
    """Trains a stage in peace, and counts how often it asks the system to make or move a file."""
    logs, counted = folder / "logs", folder / "calls"
    counted.parent.mkdir(parents=True, exist_ok=True)

    def count() -> None:
        at_call(lambda n: counted.write_text(str(n)), folder)

    ended = run(folder, "train.py", *command(stage, logs, upstream), sabotage=count)
    if ended.code:
        raise RuntimeError(f"{stage} does not even train in peace: {ended.tail}")
    return Reference(logs, directory(stage, logs), ended.seconds, int(counted.read_text()))


def at_call(act: Callable[[int], None], below: Path) -> None:
    """Has `act` called with the number of each call that makes, moves or removes a file below a folder."""
    seen = 0

    def watch(name: str) -> None:
        call = getattr(os, name)

        def watched(*args, **options):
            nonlocal seen
            # fsync has a descriptor, which says no place
            ours = name == "fsync" or str(args[0]).startswith(str(below)) or not os.path.isabs(args[0])
            if ours and not str(args[0]).endswith("calls"):
                seen += 1
                act(seen)
            return call(*args, **options)

        setattr(os, name, watched)

    for name in CALLS:
        watch(name)


def killed(
    folder: Path, stage: str, seed: int, upstream: Path, whole: Reference, elsewhere: str | None
) -> str:
    """Kills a training up to three times, at random or chosen moments, and resumes it to its end.

    Args:
        elsewhere: a temporary folder on another file system.

    Returns: what was lost; empty where nothing was.
    """
    draw = random.Random(f"{stage} {seed}")
    logs = folder / "logs"
    path = directory(stage, logs)
    environment = {"TMPDIR": elsewhere} if elsewhere else {}
    arguments = command(stage, logs, upstream)
    kept = -1
    for attempt in range(draw.choice((1, 1, 2, 3))):
        more = ("resume=true",) if attempt else ()
        if draw.random() < 0.5:
            chosen = draw.randint(1, whole.calls)
            trial = Trial(folder, "train.py", (*arguments, *more), die_at(chosen, folder), environment)
            trial.wait()
        else:
            trial = Trial(folder, "train.py", (*arguments, *more), None, environment)
            trial.wait(kill_after=draw.uniform(0.05, 1.0) * whole.seconds)
        kept, lost = checkpoint(path, kept)
        if lost:
            return lost
    ended = run(folder, "train.py", *arguments, "resume=true", environment=environment)
    if ended.code:
        return f"cannot be resumed: {ended.tail}"
    return differences(path, whole.run)


def die_at(chosen: int, folder: Path) -> Callable[[], None]:
    def act(number: int) -> None:
        if number == chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: at_call(act, folder)


def checkpoint(path: Path, before: int) -> tuple[int, str]:
    """The step of the last checkpoint, and what is wrong with it: broken, or older than what was there."""
    file = path / "last.ckpt"
    if not file.exists():
        return -1, "the checkpoint is gone" if before >= 0 else ""
    try:
        step = torch.load(file, map_location="cpu", weights_only=True)["global_step"]
    except Exception as error:
        return -1, f"a broken checkpoint: {str(error).splitlines()[0]}"
    return step, f"step {before} was kept, now it is {step}" if step < before else ""


def differences(path: Path, whole: Path) -> str:
    """Between a run that was disturbed and one that was not."""
    ours, theirs = (load_file(p / "model.safetensors") for p in (path, whole))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
        return "other weights than without the disturbance"
    rows = [records(p) for p in (path, whole)]
    if rows[0] != rows[1]:
        return f"other records than without the disturbance: {first_difference(*rows)}"
    facts = [json.loads((p / "manifest.json").read_text()) for p in (path, whole)]
    if facts[0]["metrics"] != facts[1]["metrics"]:
        return "other test metrics than without the disturbance"
    names = [{str(f.relative_to(p)) for f in p.rglob("*") if f.is_file()} for p in (path, whole)]
    if names[0] != names[1]:
        return f"files left behind or missing: {sorted(names[0] ^ names[1])}"
    return ""


def records(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v and k not in TIMES} for row in csv.DictReader(file)]


def first_difference(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> str:
    if len(ours) != len(theirs):
        return f"{len(ours)} rows for {len(theirs)}"
    row, other = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    keys = [key for key in sorted(row.keys() | other.keys()) if row.get(key) != other.get(key)]
    return f"step {row['step']}: {', '.join(keys)}"


def full_disk(folder: Path, stage: str, seed: int, upstream: Path, whole: Reference) -> str:
    """The disk of the logs fills up, or turns read-only: one line, and the last checkpoint stays."""
    draw = random.Random(f"disk {stage} {seed}")
    logs = folder / "disk"
    size = sum(f.stat().st_size for f in whole.run.rglob("*") if f.is_file()) // 1024
    kind = draw.choice(("full", "full", "read-only"))
    room = int(size * draw.uniform(0.2, 1.0)) + 8 if kind == "full" else 10 * size + 1000
    with disks.tiny(logs, room) as there:
        if not there:
            return "left out: no disk can be mounted here"
        arguments = command(stage, logs, upstream)
        turn = None
        if kind == "read-only":
            chosen = draw.randint(1, whole.calls)
            turn = lambda: at_call(lambda n: disks.read_only(logs) if n == chosen else None, folder)  # noqa: E731
        ended = run(folder, "train.py", *arguments, sabotage=turn)
        if ended.code and (fault := ended.fault()):
            return f"{kind} disk: {fault}"
        if ended.code == 0:
            return differences(directory(stage, logs), whole.run)
        _, lost = checkpoint(directory(stage, logs), -1)
        if lost:
            return f"{kind} disk: {lost}"
        disks.resize(logs, 10 * size + 1000)
        ended = run(folder, "train.py", *arguments, "resume=true")
        if ended.code:
            return f"cannot be resumed when there is room again: {ended.tail}"
        return differences(directory(stage, logs), whole.run)


def signalled(folder: Path, stage: str, seed: int, upstream: Path, whole: Reference) -> str:
    """Ctrl-C, SIGTERM and SIGUSR1 to the whole group, with workers that load data: a checkpoint of a whole
    step, and the resumed run is the undisturbed one.
    """
    draw = random.Random(f"signal {stage} {seed}")
    number = draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    logs = folder / "logs"
    arguments = command(stage, logs, upstream, "datamodule.num_workers=2")
    trial = Trial(folder, "train.py", arguments)
    step = draw.randint(1, 4)
    ended = trial_signalled_at(trial, directory(stage, logs), step, number)
    if "Traceback" in ended.err + ended.out:
        return f"{signal.Signals(number).name}: a traceback: {ended.tail}"
    if ended.code == 0 and (directory(stage, logs) / "manifest.json").exists():
        return ""  # came too late
    if not (directory(stage, logs) / "last.ckpt").exists():
        return f"{signal.Signals(number).name}: no checkpoint: {ended.tail}"
    ended = run(folder, "train.py", *arguments, "resume=true")
    return (
        f"cannot be resumed: {ended.tail}" if ended.code else differences(directory(stage, logs), whole.run)
    )


def trial_signalled_at(trial: Trial, path: Path, step: int, number: int) -> Ended:
    """Signals a trial once its first checkpoint is there (its training has begun)."""
    while trial.alive and not (path / "last.ckpt").exists():
        time.sleep(0.005)
    time.sleep(0.02 * step)
    trial.kill(number)
    return trial.wait()
