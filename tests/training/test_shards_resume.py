"""Training from shards: killed and resumed, it sees each sample as if it never had been, whoever reads."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_tars import picture, sample, tar
from tiny import COMMON, ENVIRONMENT, NETS, ROOT, SECONDS, column, weights

from dalle.run_dir import Run

PLAIN = [word for word in COMMON if not word.startswith("data.size")]
STEPS = 40


def start(folder: Path, name: str, *more: str) -> subprocess.Popen:
    """train.py in a process group of its own, as a shell starts it."""
    words = (
        "model=dvae", "data=webdataset", f"data.shards={folder}/{{000..003}}.tar", f"name={name}",
        "data.shuffle_window=12", "data.crop=random", "datamodule.num_workers=2", "batch_size=4",
        f"trainer.max_steps={STEPS}", "trainer.val_check_interval=5", "callbacks.checkpoint.every=1",
        *PLAIN, *NETS["dvae"],
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words, *more],
        cwd=folder,
        env={**ENVIRONMENT, "XDG_CACHE_HOME": str(folder / "cache")},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(job: subprocess.Popen) -> str:
    try:
        output, _ = job.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    assert job.returncode == 0, output
    return output


def kill_amid(job: subprocess.Popen, run: Run) -> int:
    """Ends all processes without warning once there is a checkpoint -> its step."""
    deadline = time.monotonic() + SECONDS
    while not run.checkpoint.exists():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    return torch.load(run.checkpoint, weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four shards, a picture of which is broken."""
    folder = tmp_path_factory.mktemp("shards")
    for k in range(4):
        broken = {"00500.png": picture(0)[:300], "00500.txt": b"broken"} if k == 2 else {}
        tar(folder / f"{k:03d}.tar", *(sample(10 * k + j) for j in range(10)), broken)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_as_never_killed(folder, ranks):
    """Two workers in each of one or two processes."""
    more = ("trainer=ddp_cpu",) if ranks == 2 else ()
    output = finish(start(folder, f"whole{ranks}", *more))
    assert output.count("4 shards with 41 samples") == 1
    parts = Run(folder / "logs" / f"parts{ranks}" / "dvae")
    step = kill_amid(start(folder, f"parts{ranks}", *more), parts)
    assert 0 < step < STEPS
    finish(start(folder, f"parts{ranks}", "resume=true", *more))
    whole = Run(folder / "logs" / f"whole{ranks}" / "dvae")
    assert column(parts, "train/loss") == column(whole, "train/loss")
    assert column(parts, "val/loss") == column(whole, "val/loss")
    expected = weights(whole)
    if ranks == 2:  # and with one process
        other = Run(folder / "logs" / "other" / "dvae")
        step = kill_amid(start(folder, "other", *more), other)
        output = finish(start(folder, "other", "resume=true", "trainer=cpu"))
        assert "world_size=1 (was 2)" in output
        assert "a step takes 8 items now, it took 16: weights are no longer those" in output
        assert list(column(other, "train/loss")) == list(range(STEPS))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(parts).items())
