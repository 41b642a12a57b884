"""Two ranks, of which one dies: the other ends soon and in words, and the run goes on where it was."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from torture.kills import checkpoint, command, directory
from torture.trial import ROOT

PATIENCE = 90  # seconds for the rank that is left


def killed(folder: Path, stage: str, seed: int, upstream: Path) -> str:
    draw = random.Random(f"rank {stage} {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    logs = folder / "logs"
    two = ("trainer=ddp_cpu", "batch_size=4", "trainer.max_steps=400", "callbacks.checkpoint.every=2",
           "trainer.val_check_interval=null")  # fmt: skip
    words = [sys.executable, str(ROOT / "train.py"), *command(stage, logs, upstream, *two)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        job = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        path = directory(stage, logs)
        began = time.monotonic()
        while not (path / "last.ckpt").exists() and job.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.05)
        ranks = children(job.pid)
        victim = draw.choice([job.pid, *ranks]) if ranks else job.pid
        os.kill(victim, signal.SIGKILL)
        try:
            job.wait(PATIENCE)
            left = wait_for(ranks)
        except subprocess.TimeoutExpired:
            left = [job.pid]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    words_said = (folder / "said").read_text(errors="replace")
    if not ranks:
        return f"there were no two ranks: {words_said[-300:]}"
    if left:
        return f"a rank goes on {PATIENCE} seconds after the other was killed"
    if "Traceback" in words_said:
        return f"a traceback after a rank was killed: {words_said.strip().splitlines()[-1][:200]}"
    return checkpoint(path, 0)[1]


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def wait_for(ranks: list[int]) -> list[int]:
    """Those that are still alive when patience ends."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        if not (left := [pid for pid in ranks if Path(f"/proc/{pid}").exists()]):
            return []
        time.sleep(0.1)
    return left
