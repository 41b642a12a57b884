"""Jobs as processes of their own, one at a time in a run directory."""

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalle.files import explained

MARKER = ".dalle-run"  # in every run directory; locked while a training is at work there


def is_main_process() -> bool:
    """Whether this is the first of all processes of a run, on all machines: the one that writes.

    torchrun numbers them by RANK; by their place on one machine (LOCAL_RANK) several are the first.
    """
    names = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in (*names, "LOCAL_RANK"))


def started_by_others() -> bool:
    """Whether this is one of several processes of a run that were all started from outside (torchrun)."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def fitting(run: str) -> Path:
    """A run directory whose names, of many settings, are not too long for a file system (255 bytes)."""

    def cut(name: str) -> str:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return (
            name if len(name.encode()) <= 200 else f"{name.encode()[:180].decode(errors='ignore')}~{digest}"
        )

    return Path(*map(cut, Path(run).parts))


def beside(run: Path, suffix: str) -> Path:
    """A file about a run that stays when the run itself is deleted."""
    return run.parent / ".jobs" / (run.name + suffix)


@contextmanager
def locked(path: Path, wait: str = "") -> Iterator[int | None]:
    """Locks a file, which is made where it is missing, and gives its descriptor; None where another process
    has locked it, unless `wait`, which is printed then.

    The lock is the open file: it ends with the process that holds it, however that ends. Where a system or a
    file system knows no locks (Windows, some network disks), everybody is given one.
    """
    try:
        import fcntl
    except ImportError:
        yield 0
        return
    with explained(path):
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield None
                return
            print(wait, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks here
        _held.add(file.fileno())
        try:
            yield file.fileno()
        finally:
            _held.discard(file.fileno())


_held: set[int] = set()  # locks of this process


def _forget() -> None:
    """Workers that load data are copies of this process: they must not hold its locks when it is killed."""
    for number in _held:
        os.close(number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def only_one(run: Path) -> Iterator[int | None]:
    """Waits until no other process works on `run`, and keeps others waiting.

    A process that is given the lock's descriptor holds it as long as it lives, also when whoever started it
    was killed.
    """
    path, wait = beside(run, ".lock"), f"{run}: another process is at work there; waiting for it"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, wait) as lock:
        if (run / MARKER).exists():  # a training that nobody has started from here
            with locked(run / MARKER, wait):
                pass
        yield lock


def call(command: Sequence[str], lock: int | None = None, **environment: str) -> int:
    """Runs a command in a process of its own and gives its exit code: no process group and no environment
    leaks into the next one.
    """
    kept = () if not lock else (lock,)
    process = subprocess.Popen(command, pass_fds=kept, env={**os.environ, **environment})
    handlers: dict[Any, Any] = {
        signal.SIGINT: lambda *_: None,  # Ctrl-C reaches the process itself: wait till it has saved
        signal.SIGTERM: lambda *_: process.terminate(),
    }
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        handlers[signal.SIGUSR1] = lambda *_: process.send_signal(signal.SIGUSR1)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
