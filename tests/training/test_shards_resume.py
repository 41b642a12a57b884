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


def start(folder: Path, name: str, *more: str, model: str = "dvae") -> subprocess.Popen:
    """train.py in a process group of its own, as a shell starts it."""
    words = (
        f"model={model}", "data=webdataset", f"data.shards={folder}/{{000..003}}.tar", f"name={name}",
        "data.shuffle_window=12", "datamodule.num_workers=2", "batch_size=4",
        f"trainer.max_steps={STEPS}", "trainer.val_check_interval=5", "callbacks.checkpoint.every=1",
        *PLAIN, *NETS[model],
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
    more = ("data.crop=random", *(["trainer=ddp_cpu"] if ranks == 2 else []))
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
        output = finish(start(folder, "other", "resume=true", "data.crop=random", "trainer=cpu"))
        assert "world_size=1 (was 2)" in output
        assert "a step takes 8 items now, it took 16: weights are no longer those" in output
        assert list(column(other, "train/loss")) == list(range(STEPS))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(parts).items())


@pytest.mark.slow
def test_buckets_killed_and_resumed_are_as_never_killed(tmp_path):
    """Pictures of two shapes and a broken one, two workers in each of two processes."""
    for k in range(4):
        shapes = [picture(10 * k + j, size=((20, 28), (28, 20))[j % 2]) for j in range(10)]
        broken = {"00500.png": picture(0)[:300], "00500.txt": b"broken"} if k == 2 else {}
        samples = [
            {f"{10 * k + j:05d}.png": s, f"{10 * k + j:05d}.txt": b"thing"} for j, s in enumerate(shapes)
        ]
        tar(tmp_path / f"{k:03d}.tar", *samples, broken)
    more = ("data.buckets=true", "trainer=ddp_cpu")
    output = finish(start(tmp_path, "whole", *more, model="upsampler"))
    assert "buckets, width x height (pictures): 12x20 (" in output
    whole, parts = (Run(tmp_path / "logs" / name / "upsampler") for name in ("whole", "parts"))
    assert 0 < kill_amid(start(tmp_path, "parts", *more, model="upsampler"), parts) < STEPS
    finish(start(tmp_path, "parts", "resume=true", *more, model="upsampler"))
    assert column(parts, "train/loss") == column(whole, "train/loss")
    assert column(parts, "val/loss") == column(whole, "val/loss")
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(parts).items())
    assert Run(whole.path).manifest()["buckets"] == [[20, 12], [12, 20]]
