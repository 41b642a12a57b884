"""A script of a test in several processes at once, the ranks of one training on this machine's CPU."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tiny import ROOT, SECONDS


def in_ranks(script: str, cwd: Path, *words: str, ranks: int = 2, seconds: float = SECONDS) -> str:
    """Runs a Python file on all ranks until all have ended -> what they said.

    Lightning takes them for ranks that somebody else has started. Where one fails the others are ended: they
    would wait for it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    paths = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    said = [cwd / f"said-{port}-{rank}" for rank in range(ranks)]
    jobs = []
    for rank, path in enumerate(said):
        with path.open("w") as out:
            environment = {**os.environ, **place, **paths, "LOCAL_RANK": str(rank)}
            command = [sys.executable, script, *words]
            jobs.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=out))
    deadline, codes = time.monotonic() + seconds, [None] * ranks
    try:
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [job.poll() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    text = "\n".join(path.read_text(errors="replace") for path in said)
    assert codes == [0] * ranks, text
    return text
