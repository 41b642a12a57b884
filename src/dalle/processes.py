"""Jobs as processes of their own, one at a time in a run directory."""

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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
def only_one(run: Path) -> Iterator[int]:
    """Waits until no other process works on `run`, and keeps others waiting.

    The lock is the open file: a process that is given its descriptor holds it as long as it lives, also when
    whoever started it was killed.
    """
    import fcntl  # not on every system, and not needed to train

    path = beside(run, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{run}: another process is at work there; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def call(command: Sequence[str], lock: int | None = None, **environment: str) -> int:
    """Runs a command in a process of its own and gives its exit code: no process group and no environment
    leaks into the next one.
    """
    kept = () if lock is None else (lock,)
    process = subprocess.Popen(command, pass_fds=kept, env={**os.environ, **environment})
    handlers = {
        signal.SIGINT: lambda *_: None,  # Ctrl-C reaches the process itself: wait till it has saved
        signal.SIGTERM: lambda *_: process.terminate(),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
