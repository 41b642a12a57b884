"""Tries to lose work, and to break commands: `make torture`; tests/test_torture.py does a short form of it.

Kills trainings of all stages at random and at chosen moments, fills their disks, sends them signals, spoils
their numbers, kills one of two ranks, damages their files, and gives commands that are wrong. Prints a table
of what was tried, held and failed; fails when anything did. The same seed makes the same trials.
"""

import argparse
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process keeps no thread pool
os.environ["HYDRA_FULL_ERROR"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

import dalle.evaluation.dashboard
import dalle.evaluation.multirun
import dalle.pipelines.sampling  # noqa: F401
from torture import damage, divergence, inputs, kills, ranks
from torture.trial import run

COUNTS = {"kills": 320, "disks": 45, "signals": 45, "nan": 63, "ranks": 6, "inputs": 330, "files": 200}
LEFT_OUT = "left out"


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture", description=(__doc__ or "").splitlines()[0])
    for name, count in COUNTS.items():
        parser.add_argument(
            f"--{name}", type=int, default=count, metavar="N", help=f"trials; default {count}"
        )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-")).resolve()
    try:
        return torture(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torture(folder: Path, args: argparse.Namespace) -> int:
    upstream = prepare(folder / "upstream")
    outcomes: dict[str, Counter[str]] = {}
    failed = 0
    with ProcessPoolExecutor(args.processes, mp_context=get_context("fork")) as pool:
        needed = kills.STAGES if args.kills + args.disks + args.signals else ()
        made = pool.map(
            kills.reference, needed, [folder / "whole" / s for s in needed], [upstream] * len(needed)
        )
        tasks = list(plan(args, upstream, dict(zip(needed, made, strict=True))))
        running = {
            pool.submit(attempt, folder / f"trial-{i:04d}", trial, rest): f"{kind}: {name}"
            for i, (kind, name, trial, rest) in enumerate(tasks)
        }
        for future in tqdm(as_completed(running), total=len(tasks), disable=None, unit=""):
            what, reason = running[future], future.result()
            word = "held" if not reason else LEFT_OUT if reason.startswith(LEFT_OUT) else "failed"
            outcomes.setdefault(what.partition(":")[0], Counter())[word] += 1
            if word == "failed":
                failed += 1
                tqdm.write(f"{what}: {reason}"[:300])
    show(outcomes)
    return int(bool(failed))


def prepare(upstream: Path) -> Path:
    """Tiny finished runs of the stages that others need and that pipelines are made of, and a recipe."""
    for stage in ("clip", "dvae", "prior", "decoder", "dalle"):
        ended = run(upstream, "train.py", *kills.command(stage, upstream, upstream, "trainer.max_steps=2"))
        if ended.code:
            sys.exit(f"{stage} does not even train in peace: {ended.tail}")
    ended = run(upstream, "sample.py", *damage.TINY, f"paths.logs={upstream}", "out=recipe")
    if ended.code:
        sys.exit(f"nothing can be sampled even in peace: {ended.tail}")
    return upstream


def plan(
    args: argparse.Namespace, upstream: Path, whole: dict[str, kills.Reference]
) -> Iterator[tuple[str, str, Callable[..., str], tuple[Any, ...]]]:
    """Every trial: its kind, its name, and what makes it, called with its own folder first."""
    elsewhere = "/dev/shm" if Path("/dev/shm").is_dir() else None
    for i in range(args.kills):
        stage = kills.STAGES[i % len(kills.STAGES)]
        place = elsewhere if i // len(kills.STAGES) % 2 else None
        yield (
            "kills",
            f"{stage} {args.seed + i}",
            kills.killed,
            (stage, args.seed + i, upstream, whole[stage], place),
        )
    for kind, trial, count in (
        ("disks", kills.full_disk, args.disks),
        ("signals", kills.signalled, args.signals),
    ):
        for i in range(count):
            stage = kills.STAGES[i % len(kills.STAGES)]
            yield kind, f"{stage} {args.seed + i}", trial, (stage, args.seed + i, upstream, whole[stage])
    for kind, trial, count in (("nan", divergence.spoilt, args.nan), ("ranks", ranks.killed, args.ranks)):
        for i in range(count):
            stage = kills.STAGES[i % len(kills.STAGES)]
            yield kind, f"{stage} {args.seed + i}", trial, (stage, args.seed + i, upstream)
    for line in inputs.bad_lines(args.inputs, args.seed):
        yield "inputs", " ".join(line), inputs.refused, (line, upstream)
    for i in range(args.files):
        yield "files", str(args.seed + i), damage.damaged, (args.seed + i, upstream)


def attempt(folder: Path, trial: Callable[..., str], rest: tuple[Any, ...]) -> str:
    """What went wrong in a trial; a trial that itself fails has found something, too."""
    try:
        return trial(folder, *rest)
    except Exception:
        return " ".join(traceback.format_exc().split())[-400:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show(outcomes: dict[str, Counter[str]]) -> None:
    words = ("held", "failed", LEFT_OUT)
    rows = [("", "tried", *words)]
    for kind, count in outcomes.items():
        rows.append((kind, str(count.total()), *(str(count[word]) for word in words)))
    for row in rows:
        print(f"{row[0]:10}" + "".join(f"{cell:>10}" for cell in row[1:]))


if __name__ == "__main__":
    sys.exit(main())
