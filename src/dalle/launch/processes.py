"""Jobs as processes of their own, one at a time in a run directory."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REASON = "DALLE_REASON"  # in the environment: the file in which a process leaves why it has failed
STOPPED = "stopped"


def child_command(command: str) -> list[str]:
    """What starts a command of ours in a process of its own, from any folder."""
    return [sys.executable, "-m", "dalle", command]


def safe_path(run: str) -> Path:
    """A run directory whose names, of many settings, are not too long for a file system (255 bytes)."""

    def cut(name: str) -> str:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return (
            name if len(name.encode()) <= 200 else f"{name.encode()[:180].decode(errors='ignore')}~{digest}"
        )

    return Path(*map(cut, Path(run).parts))


def call(command: Sequence[str], lock: int | None = None, **environment: str) -> int:
    """Runs a command in a process of its own and gives its exit code: no process group and no environment
    leaks into the next one.
    """
    kept = () if not lock else (lock,)
    # or `python -m` would take modules of the folder it is started in for Python's own
    safe = {"PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, pass_fds=kept, env={**os.environ, **safe, **environment})
    handlers: dict[Any, Any] = {
        signal.SIGINT: lambda *_: None,  # Ctrl-C reaches the process itself: wait till it has saved
        signal.SIGTERM: lambda *_: process.terminate(),
    }
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = lambda *_: process.send_signal(signal.SIGHUP)
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        handlers[signal.SIGUSR1] = lambda *_: process.send_signal(signal.SIGUSR1)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
