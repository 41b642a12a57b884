"""The processes of `gpu_check.py`: each does some cases one after the other, and is watched from outside.

They are forked from one that has imported everything and not touched the GPU, which saves each of them ten
seconds; where a GPU does not stand that, they are started afresh.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_case import Case, Failed, Job, Refused

from dalle.files import write_text

MODULES = ("gpu_speed", "gpu_training")  # what is compiled ahead begins first


def all_parts() -> dict[str, dict[str, Case]]:
    return {
        name: cases for module in MODULES for name, cases in importlib.import_module(module).PARTS.items()
    }


def machine(job: Job) -> dict[str, Any]:
    """What there is; that a process can use it."""
    cuda = job.device == "cuda"
    torch.zeros(1, device=job.device)
    return {
        "text": "",
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


PROBE = {"machine": {"probe": Case(machine, limit=30)}}


@dataclass(frozen=True)
class Work:
    """Some cases of a part, in a process of their own.

    Args:
        folder: for files, and for what each case has found: PART.CASE.json.
        deadline: when all is over, in seconds since 1970.
        threads: of PyTorch, and processes that compile; None: as many as there are cores.
    """

    part: str
    folder: Path
    device: str
    tiny: bool
    deadline: float
    threads: int | None = None

    def __call__(self, names: list[str]) -> None:
        self.settle()
        cases = (PROBE | all_parts())[self.part]
        for name in names:
            self.do(name, cases[name])

    def settle(self) -> None:
        """As many threads as are wanted."""
        if self.threads is None:
            return
        torch.set_num_threads(self.threads)
        compilers = 2 * self.threads
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(compilers)
        if inductor := sys.modules.get("torch._inductor.config"):
            inductor.compile_threads = compilers  # pyright: ignore[reportAttributeAccessIssue]

    def do(self, name: str, case: Case) -> None:
        began, noted = time.time(), {}

        def record(**found: Any) -> None:
            noted.update(found)
            took = round(time.time() - began, 1)
            everything = {"status": "running", **noted, "began": began, "seconds": took}
            write_text(self.folder / f"{self.part}.{name}.json", json.dumps(everything))

        if self.deadline - began < case.needs:
            record(status="skipped", text=f"no time left ({case.needs:.0f} s)")
            return
        record()
        folder = self.folder / self.part
        folder.mkdir(exist_ok=True)
        print(f"=== {name}", flush=True)
        try:
            found = case.run(Job(self.part, name, self.device, self.tiny, folder, record))
            record(status="ok", **found)
        except Refused as error:
            record(status="refused", text=first_line(error))
        except Exception as error:
            traceback.print_exc()
            record(status="FAIL", text=first_line(error), **getattr(error, "found", {}))


def first_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, Failed | Refused) else f"{type(error).__name__}: {words}"[:600]


def begin(work: Callable[[list[str]], None], names: list[str], log: Path) -> None:
    """The first thing that a process does: it leads a group of its own, and speaks to a file."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    work(names)


@dataclass
class Part:
    """A process with some cases, started anew without the one that ended or outlasted it.

    Args:
        work: what is done in it, with the names of those that are left.
        way: how it is started: fork or spawn.
    """

    name: str
    cases: dict[str, Case]
    folder: Path
    work: Callable[[list[str]], None]
    deadline: float
    way: str = "fork"
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    process: Any = None

    def __post_init__(self) -> None:
        self.left = list(self.cases)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        context: Any = multiprocessing.get_context(self.way)
        sys.stdout.flush()
        self.process = context.Process(target=begin, args=(self.work, list(self.left), self.log))
        self.process.start()

    def look(self) -> bool:
        """Takes over what there is; whether nothing more will come."""
        ended = self.process.exitcode is not None
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
            self.give_up(f"its process ended ({self.process.exitcode}): {self.last_words()}")
        elif self.left and (running := self.results.get(self.left[0])):
            limit = self.cases[self.left[0]].limit
            if now - running["began"] > limit:
                self.stop()
                self.give_up(f"not done after {limit:.0f} s")
        if not self.left:
            self.stop()
        elif self.process.exitcode is not None:
            self.start()
        return not self.left

    def give_up(self, why: str, status: str = "FAIL") -> None:
        """The case that was running; that none was is laid to the first. `cut`: some of it is there."""
        name = self.left.pop(0)
        begun = self.results.get(name, {})
        if begun.keys() - {"status", "began", "seconds"}:
            status = "cut"
        took = round(time.time() - begun.get("began", time.time()), 1)
        self.results[name] = {**begun, "status": status, "seconds": took, "text": why}
        for other in self.left if why == "the time is over" else ():
            self.results[other] = {"status": "skipped", "text": why}

    def last_words(self) -> str:
        said = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return said[-300:].replace("\n", " | ")

    def stop(self) -> None:
        """With all that it has started."""
        if self.process is not None:
            for end in (os.killpg, os.kill):  # it may not lead its group yet
                with contextlib.suppress(ProcessLookupError):
                    end(self.process.pid, signal.SIGKILL)
            self.process.join()


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
