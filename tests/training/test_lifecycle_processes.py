"""Real processes: signals to a whole group with workers, a rank that is killed, two machines by torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT, column, overrides

from dalle.run_dir import Run
from dalle.training.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
SECONDS = 300  # far more than it takes: a hang shows as a failure


def start(cwd: Path, *words: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
    """train.py in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), *overrides("clip", Path("logs"), *words)],
        cwd=cwd,
        env=ENVIRONMENT,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(job: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = job.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    return job.returncode, out, err


def wait_for(job: subprocess.Popen, path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("number", "words"), [(signal.SIGTERM, ("-m",)), (signal.SIGUSR1, ())])
def test_a_signal_to_all_processes_leaves_a_checkpoint(tmp_path, number, words):
    """As SLURM, systemd and `timeout` do it. Workers are processes, too, and -m passes signals on."""
    run = Run(tmp_path / "logs" / "default" / "clip")
    job = start(tmp_path, *words, "datamodule.num_workers=1", "trainer.max_steps=100000")
    wait_for(job, run.path / "metrics.csv")
    os.killpg(job.pid, number)
    code, out, err = finish(job)
    assert code == 1, err
    assert "Traceback" not in err, err
    assert f"goes on from step {read_checkpoint(run.checkpoint)['global_step']}" in out
    last = max(column(run, "train/loss"))
    assert read_checkpoint(run.checkpoint)["global_step"] == last + 1


def test_a_sweep_that_is_stopped_begins_no_other_job(tmp_path):
    job = start(tmp_path, "-m", "hydra=sweep", "seed=0,1", "trainer.max_steps=100000")
    place = tmp_path / "logs" / "default" / "clip"
    deadline = time.monotonic() + SECONDS
    while not list(place.glob("*/metrics.csv")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGTERM)
    code, _, err = finish(job)
    assert code == 1, err
    assert [json.loads(p.read_text())["state"] for p in place.glob(".jobs/*.json")] == ["stopped"]


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_rank_that_is_killed_ends_the_others_with_one_line(tmp_path):
    run = Run(tmp_path / "logs" / "default" / "clip")
    two = ("trainer=ddp_cpu", "batch_size=4", "trainer.enable_progress_bar=false")
    job = start(tmp_path, *two, "trainer.max_steps=100000", "callbacks.checkpoint.every=5")
    wait_for(job, run.checkpoint)
    os.kill(max(children(job.pid)), signal.SIGKILL)
    code, _, err = finish(job)
    assert code != 0
    assert "Traceback" not in err, err
    assert "another process of this run has ended" in err or code == -signal.SIGKILL, err
    assert read_checkpoint(run.checkpoint)["global_step"] % 5 == 0


def test_two_machines_by_torchrun(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = Run(tmp_path / "logs" / "default" / "clip")
    jobs = []
    for node in range(2):
        launcher = (
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
            f"--node-rank={node}", "--master-addr=localhost", f"--master-port={port}",
        )  # fmt: skip
        words = ("trainer=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2", "batch_size=4",
                 "trainer.max_steps=3")  # fmt: skip
        jobs.append(start(tmp_path, *words, launcher=launcher))
    for job in jobs:
        code, out, err = finish(job)
        assert code == 0, out + err
    assert run.manifest()["steps"] == 3
    assert list(column(run, "train/loss")) == [0, 1, 2]
