"""Is everything right on this GPU, and how fast is it? `make gpu-check`: at most six minutes, no network.

First what is right, in several processes at once: every stage in bf16, compiled, in fp16, under DDP and
FSDP, resumed, averaged and beside the CPU's losses; both pipelines (`gpu_training.py`). Then, alone on the
card, how fast: training and sampling at full size (`gpu_speed.py`). Each case has a limit of time, and none
stops the others. `results.json` and `report.txt` in the folder `--out` are brought up to date after each.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

STARTED = time.time()
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look at the GPU is not to begin to use it

import gpu_speed  # noqa: E402
import gpu_training  # noqa: E402
import torch  # noqa: E402
from gpu_case import Case, Results  # noqa: E402
from gpu_part import PROBE, Part, Work, all_parts, run_parts  # noqa: E402

from dalle.files import write_text  # noqa: E402

LINES, WIDTH = 40, 110  # of the summary
SHARE = 0.5  # of the time, at most, for what is right, where speed is measured, too
GRACE = 2.0  # seconds for the last words before the time is over
STATUSES = ("ok", "FAIL", "refused", "cut", "skipped")


def chosen(parts: dict[str, dict[str, Case]], only: str) -> dict[str, dict[str, Case]]:
    """`only`: parts or PART/CASE, divided by commas; * stands for anything."""
    words = [word for word in only.split(",") if word]
    names = {f"{part}/{case}" for part, cases in parts.items() for case in cases}
    for word in words:
        if not any(fits(name, word) for name in names):
            raise SystemExit(f"error: there is no part {word}; --list shows them")
    found = {
        part: {case: what for case, what in cases.items() if not words or any_fits(f"{part}/{case}", words)}
        for part, cases in parts.items()
    }
    return {part: cases for part, cases in found.items() if cases}


def fits(name: str, word: str) -> bool:
    return fnmatch(name, word) or fnmatch(name.partition("/")[0], word)


def any_fits(name: str, words: Iterable[str]) -> bool:
    return any(fits(name, word) for word in words)


def summary(about: dict[str, Any], results: Results) -> list[str]:
    """At most `LINES` lines."""
    everything = [result for cases in results.values() for result in cases.values()]
    counts = ", ".join(
        f"{sum(result['status'] == status for result in everything)} {status}" for status in STATUSES
    )
    lines = [
        f"{about['device']}, torch {about['torch']}, {about['seconds']:.0f} s: {counts}",
        *gpu_training.table(results),
        *gpu_speed.table(results),
    ]
    bad = [
        f"FAIL {part}/{case}: {result.get('text', '')}"
        for part, cases in results.items()
        for case, result in cases.items()
        if result["status"] == "FAIL"
    ]
    for part, cases in results.items():
        if left_out := [case for case, result in cases.items() if result["status"] == "skipped"]:
            bad.append(f"no time left for {part}: {', '.join(left_out)}")
    room = LINES - len(lines)
    if len(bad) > room:
        bad = [*bad[: room - 1], f"... and {len(bad) - room + 1} more: report.txt"]
    return [line[:WIDTH] for line in (*lines, *bad)][:LINES]


def report(results: Results) -> list[str]:
    """Every case."""
    return [
        f"{part + '/' + case:<28} {result['status']:<8} {result.get('seconds', 0):>6.1f} s  "
        f"{result.get('text', '')}"
        for part, cases in results.items()
        for case, result in cases.items()
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("logs/gpu-check"), help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="everything small: does it run? Times say nothing"
    )
    parser.add_argument("--only", default="", help="PART or PART/CASE, divided by commas; * is anything")
    parser.add_argument("--list", action="store_true", help="show parts and cases")
    parser.add_argument("--budget-seconds", type=float, default=340)
    parser.add_argument("--jobs", type=int, default=2 + (os.cpu_count() or 1), help="processes at once")
    return parser.parse_args()


def way_to_start(args: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """How processes are started that can use the device, and what there is."""
    for way in ("fork", "spawn"):
        work = Work("machine", folder, args.device, args.tiny, STARTED + args.budget_seconds)
        probe = Part("machine", PROBE["machine"], folder, work, work.deadline, way)
        run_parts([probe], 1, lambda: None)
        found = probe.results["probe"]
        if found["status"] == "ok":
            return way, found
    raise SystemExit(f"error: no process can use {args.device}: {found['text']}")


def check(args: argparse.Namespace, parts: dict[str, dict[str, Case]], folder: Path) -> int:
    way, about = way_to_start(args, folder)
    results: Results = {}
    made: list[Part] = []
    written = ""

    def changed() -> None:
        nonlocal written
        for part in made:
            results[part.name] = {name: part.results[name] for name in part.cases if name in part.results}
        text = json.dumps({"machine": about, "results": results}, indent=1)
        if text != written:
            written = text
            write_text(args.out / "results.json", text)
            write_text(args.out / "report.txt", "\n".join(report(results)) + "\n")

    end = STARTED + args.budget_seconds - GRACE
    speed = {name: cases for name, cases in parts.items() if name == "speed"}
    right = {name: cases for name, cases in parts.items() if name != "speed"}  # and what is compiled ahead
    several = STARTED + SHARE * args.budget_seconds if speed else end
    for group, deadline, jobs, threads in ((right, several, args.jobs, 1), (speed, end, 1, None)):
        made = [
            Part(
                name, cases, folder,
                Work(name, folder, args.device, args.tiny, deadline, 2 if name == "ahead" else threads),
                deadline, way,
            )
            for name, cases in group.items()
        ]  # fmt: skip
        run_parts(made, jobs, changed)
    about["seconds"] = round(time.time() - STARTED, 1)
    lines = summary(about, results)
    changed()
    write_text(args.out / "report.txt", "\n".join([*lines, "", *report(results)]) + "\n")
    print("\n".join(lines))
    return int(any(r["status"] == "FAIL" for cases in results.values() for r in cases.values()))


def main() -> int:
    args = arguments()
    parts = chosen(all_parts(), args.only)
    here = args.device == "cpu" or torch.cuda.is_available()
    if args.list or not here:
        if not here:
            print("PyTorch sees no GPU here. On one, this would be done (--device cpu --tiny tries it here):")
        for name, cases in parts.items():
            print(f"  {name:<10} {' '.join(cases)}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # and stops what it has started
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        return check(args, parts, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
