"""A trial: a command of the project in a process of its own, which may be killed at any moment.

The process is forked from one that has imported torch and the project already: starting takes a tenth of a
second instead of four. It leads a process group, so that whatever it starts dies with it.
"""

import atexit
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dalle.cli.entry import BUG

ROOT = Path(__file__).parents[2]
BROKEN = 70  # exit code of work that raised instead of exiting
SECONDS = 240  # far more than any trial takes: a hang is a failure


@dataclass(frozen=True)
class Ended:
    """How a trial ended: exit code (negative: the signal that killed it) and what it said."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code < 0

    def fault(self, expected: str = "") -> str:
        """Why this is not the end of a command that refuses something: one line, with `expected` in it, and
        exit code 1. Empty when it is.
        """
        if self.code != 1:
            return f"exit code {self.code} instead of a refusal: {self.tail}"
        if "Traceback" in self.err + self.out:
            return f"a traceback: {self.tail}"
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if len(lines) != 1:
            return f"{len(lines)} lines that say what is wrong: {self.tail}"
        if BUG in lines[0]:
            return f"takes itself for broken: {lines[0]}"
        return "" if expected in lines[0] else f"{expected!r} is not in: {lines[0]}"

    @property
    def tail(self) -> str:
        return (self.err.strip() or self.out.strip() or "nothing was said").splitlines()[-1][:300]


@dataclass
class Trial:
    """Starts `script` with `arguments` in `folder`, after `sabotage` has changed what it runs on.

    Args:
        environment: on top of this process's own.
    """

    folder: Path
    script: str
    arguments: tuple[str, ...]
    sabotage: Callable[[], None] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    status: int | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.said = [self.folder / f".{name}" for name in ("stdout", "stderr")]
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._work()

    def _work(self) -> None:
        code = BROKEN
        try:
            os.setsid()
            for number, path in enumerate(self.said, start=1):
                handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                os.dup2(handle, number)
            os.chdir(self.folder)
            os.environ.update(self.environment)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.sabotage:
                self.sabotage()
            sys.argv = [str(ROOT / self.script), *self.arguments]
            if self.script.endswith(".py"):
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                sys.modules.pop(self.script, None)
                runpy.run_module(self.script, run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)  # as the interpreter does
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the whole group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    @property
    def alive(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is None

    def wait(self, kill_after: float | None = None, number: int = signal.SIGKILL) -> Ended:
        """Waits for the end; sends `number` after `kill_after` seconds."""
        sent = False
        while self.alive:
            age = time.monotonic() - self.started
            if kill_after is not None and not sent and age > kill_after:
                self.kill(number)
                sent = True
            if age > SECONDS:
                self.kill()
            time.sleep(0.005)
        seconds = time.monotonic() - self.started
        self.kill()  # what it may have left running
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self.said)
        for path in self.said:
            path.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(self.status or 0), out, err, seconds)


def run(folder: Path, script: str, *arguments: str, **options) -> Ended:
    return Trial(folder, script, arguments, **options).wait()
