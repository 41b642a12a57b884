"""Is everything right on this GPU, and how fast is it? `make gpu-check`: at most six minutes, no network.

First what is right, in several processes at once: every stage in bf16, compiled, in fp16, under DDP and
FSDP, resumed, averaged and beside the CPU's losses; both pipelines (`gpu_training.py`). Then, alone on the
card, how fast: training and sampling at full size (`gpu_speed.py`). Each case has a limit of time, and none
stops the others. `results.json` and `report.txt` in the folder `--out` are brought up to date after each.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gpu_case import Case, Failed, Job, Refused, Results

STARTED = time.time()
LINES, WIDTH = 40, 110  # of the summary
SHARE = 0.5  # of the time, at most, for what is right, where speed is measured, too
ALONG = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # of processes that share the CPUs
ENVIRONMENT: dict[str, dict[str, str]] = {"ahead": {"OMP_NUM_THREADS": "1"}, "speed": {}}
GRACE = 2.0  # seconds for the last words before the time is over
MODULES = ("gpu_speed", "gpu_training")  # what is compiled ahead begins first
STATUSES = ("ok", "FAIL", "refused", "skipped")


def write(path: Path, text: str) -> None:
    from dalle.files import write_text

    write_text(path, text)


def all_parts() -> dict[str, dict[str, Case]]:
    return {
        name: cases for module in MODULES for name, cases in importlib.import_module(module).PARTS.items()
    }


def first_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, Failed | Refused) else f"{type(error).__name__}: {words}"[:600]


# One process: the cases of a part, one after the other.


def work(args: argparse.Namespace) -> None:
    cases = all_parts()[args.worker]
    for name in args.cases:
        path, case = args.folder / f"{args.worker}.{name}.json", cases[name]
        began, noted = time.time(), {}

        def record(path: Path = path, began: float = began, noted: dict = noted, **found: Any) -> None:
            noted |= found
            took = round(time.time() - began, 1)
            write(path, json.dumps({"status": "running", **noted, "began": began, "seconds": took}))

        if args.deadline - began < case.needs:
            record(status="skipped", text=f"no time left ({case.needs:.0f} s)")
            continue
        record()
        folder = args.folder / args.worker
        folder.mkdir(exist_ok=True)
        job = Job(args.worker, name, args.device, args.tiny, folder, record)
        print(f"=== {name}", flush=True)
        try:
            record(**{"status": "ok", **case.run(job)})
        except Refused as error:
            record(status="refused", text=first_line(error))
        except Exception as error:
            traceback.print_exc()
            record(status="FAIL", text=first_line(error), **getattr(error, "found", {}))


# The process that starts them all.


@dataclass
class Part:
    """A process with some cases, started anew without the one that ended or outlasted it."""

    name: str
    cases: dict[str, Case]
    folder: Path
    command: list[str]
    deadline: float
    left: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def start(self) -> None:
        words = ["--worker", self.name, "--deadline", str(self.deadline), "--cases", *self.left]
        with (self.folder / f"{self.name}.log").open("a") as log:
            self.process = subprocess.Popen(
                [*self.command, *words], stdout=log, stderr=log, env={**os.environ, **self.environment},
                process_group=0,
            )  # fmt: skip

    def look(self) -> bool:
        """Takes over what there is; whether nothing more will come."""
        assert self.process is not None
        ended = self.process.poll() is not None
        for name in list(self.left):
            path = self.folder / f"{self.name}.{name}.json"
            if path.exists():
                self.results[name] = json.loads(path.read_text())
                if self.results[name]["status"] != "running":
                    self.left.remove(name)
        now = time.time()
        if now > self.deadline and self.left:
            self.stop()
            self.give_up("the time is over", "skipped")
            self.left = []
        elif ended and self.left:
            self.give_up(f"its process ended ({self.process.returncode}): {self.last_words()}")
        elif self.left and (running := self.results.get(self.left[0])):
            limit = self.cases[self.left[0]].limit
            if now - running["began"] > limit:
                self.stop()
                self.give_up(f"not done after {limit:.0f} s")
        if not self.left:
            self.stop()
        elif self.process.poll() is not None:
            self.start()
        return not self.left

    def give_up(self, why: str, status: str = "FAIL") -> None:
        """The case that was running; that none was is laid to the first."""
        name = self.left.pop(0)
        begun = self.results.get(name, {})
        self.results[name] = {**begun, "status": status, "text": f"{begun.get('text', '')} {why}".strip()}
        for other in self.left if status == "skipped" else ():
            self.results[other] = {"status": status, "text": why}

    def last_words(self) -> str:
        return (
            (self.folder / f"{self.name}.log").read_text(errors="replace").strip()[-300:].replace("\n", " | ")
        )

    def stop(self) -> None:
        """With all that it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def run_parts(parts: list[Part], jobs: int, changed: Callable[[], None]) -> None:
    waiting, running = list(parts), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                waiting[0].start()
                running.append(waiting.pop(0))
            time.sleep(0.2)
            running = [part for part in running if not part.look()]
            changed()
    finally:
        for part in running:
            part.stop()


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


# What came of it.


def machine(device: str) -> dict[str, Any]:
    import torch

    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def summary(about: dict[str, Any], results: Results) -> list[str]:
    """At most `LINES` lines."""
    import gpu_speed
    import gpu_training

    everything = [result for cases in results.values() for result in cases.values()]
    counts = ", ".join(
        f"{sum(result['status'] == status for result in everything)} {status}" for status in STATUSES
    )
    lines = [
        f"{about['device']}, torch {about['torch']}, Python {about['python']}, {about['cpus']} CPUs, "
        f"{about['seconds']:.0f} s: {counts}",
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
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes at once"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def check(args: argparse.Namespace, parts: dict[str, dict[str, Case]], folder: Path) -> int:

    end = STARTED + args.budget_seconds - GRACE
    results: Results = {}
    about = machine(args.device)

    def changed() -> None:
        for part in made:
            results[part.name] = {name: part.results[name] for name in part.cases if name in part.results}
        text = json.dumps({"machine": about, "results": results}, indent=1)
        if text != written[0]:
            written[0] = text
            write(args.out / "results.json", text)
            write(args.out / "report.txt", "\n".join(report(results)) + "\n")

    written = [""]
    command = [
        sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), "--device", args.device,
        *(["--tiny"] if args.tiny else []),
    ]  # fmt: skip
    speed = {name: cases for name, cases in parts.items() if name == "speed"}
    right = {name: cases for name, cases in parts.items() if name != "speed"}  # and what is compiled ahead
    several = STARTED + SHARE * args.budget_seconds if speed else end
    for group, deadline, jobs in ((right, several, args.jobs), (speed, end, 1)):
        made = [
            Part(name, cases, folder, command, deadline, list(cases), ENVIRONMENT.get(name, ALONG))
            for name, cases in group.items()
        ]
        run_parts(made, jobs, changed)
    about["seconds"] = round(time.time() - STARTED, 1)
    lines = summary(about, results)
    changed()
    write(args.out / "report.txt", "\n".join([*lines, "", *report(results)]) + "\n")
    print("\n".join(lines))
    return int(any(r["status"] == "FAIL" for cases in results.values() for r in cases.values()))


def main() -> int:
    args = arguments()
    if args.worker:
        work(args)
        return 0
    import torch

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
