"""Two processes on the CPU through train.py: jobs in order, ranks that agree, figures once, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COMMON, ENVIRONMENT, NETS, ROOT, SECONDS, column, configure, weights
from two_ranks import watch

from dalle.run_dir import Run
from dalle.training import fit

pytestmark = pytest.mark.slow

SGD = ("optimizer=sgd", "optimizer.warmup=2", "trainer.max_steps=4", "trainer.log_every_n_steps=1")


def start(cwd: Path, *overrides: str, common: Sequence[str] = COMMON) -> subprocess.Popen:
    """train.py in a process group of its own, as a shell starts it."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides, *common, "trainer=ddp_cpu", "batch_size=4"]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(job: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = job.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    return job.returncode, output


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working directory after `train.py -m model=clip,prior trainer=ddp_cpu`."""
    cwd = tmp_path_factory.mktemp("work")
    code, output = finish(start(cwd, "-m", "model=clip,prior", *SGD))
    assert code == 0, output
    return cwd


def test_jobs_run_in_order_each_in_its_own_directory(work):
    clip, prior = (Run(work / "logs" / "default" / stage) for stage in ("clip", "prior"))
    assert prior.manifest()["clip"]["weights"] == clip.manifest()["weights"]
    for run in (clip, prior):
        assert run.manifest()["steps"] == 4
        assert list(column(run, "train/loss")) == [0, 1, 2, 3]  # written by one rank


def test_nothing_else_is_left_behind(work):
    assert [p.name for p in work.iterdir()] == ["logs"]
    assert {p.name for p in (work / "logs").iterdir()} == {".cache", ".multirun", "default"}
    files = {".dalle-run", "config.yaml", "last.ckpt", "model.safetensors", "manifest.json", "metrics.csv"}
    assert {p.name for p in (work / "logs" / "default" / "prior").iterdir()} == files


def test_two_ranks_do_what_one_does_with_twice_the_batch(work, tmp_path):
    """CLIP has no noise, and gathers all ranks' pairs: its weights and test figures must be the same."""
    config = configure("clip", tmp_path, "batch_size=8", *SGD, net=False)
    fit.train(config)
    one, two = Run(Path(config["paths"]["run"])), Run(work / "logs" / "default" / "clip")
    expected = weights(one)
    for name, weight in weights(two).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    assert two.manifest()["metrics"] == pytest.approx(one.manifest()["metrics"], abs=1e-4)


@pytest.mark.parametrize("model", ["decoder", "upsampler"])
def test_ranks_agree_and_test_pictures_are_counted_once(work, tmp_path, model):
    """Each rank draws noise of its own, yet all hold the same weights; six pictures on two ranks are six."""
    options = ("callbacks.generation.items=6", "trainer.max_steps=3")
    seen = watch(2, work / "logs", tmp_path, model, *options)
    assert torch.equal(*seen["weights"][-1])
    assert (seen["losses"][:, 0] != seen["losses"][:, 1]).all()
    assert Run(tmp_path / "2").manifest()["metrics"]["test/pictures"] == 6


def test_interrupted_on_all_ranks_and_resumed(work):
    """Ctrl-C in a terminal reaches all processes; they stop at the same step, whoever hears of it first."""
    run = Run(work / "logs" / "stopped" / "clip")
    job = start(work, "-m", "model=clip,prior", "name=stopped", "optimizer=sgd", "trainer.max_steps=100000")
    deadline = time.monotonic() + SECONDS
    while not (run.path / "metrics.csv").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(job.pid, signal.SIGINT)
    code, output = finish(job)
    assert code == 1, output
    assert "Traceback" not in output
    assert "resume=true goes on from step" in output
    assert not (work / "logs" / "stopped" / "prior").exists()
    step = torch.load(run.checkpoint, weights_only=True)["global_step"]
    assert step > 0
    code, output = finish(
        start(
            work,
            "model=clip",
            "name=stopped",
            "optimizer=sgd",
            f"trainer.max_steps={step + 2}",
            "resume=true",
        )
    )
    assert code == 0, output
    assert run.manifest()["steps"] == step + 2
    assert list(column(run, "train/loss")) == list(range(step + 2))


def test_ranks_and_their_workers_say_once_what_was_read(tmp_path):
    for k in range(24):
        noise = np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)
        path = tmp_path / "pictures" / f"{k:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).save(path)
        path.with_suffix(".txt").write_text(f"number {k}", encoding="utf-8")
    (tmp_path / "pictures" / "odd.png").write_bytes(b"no picture")
    settings = ("trainer.max_steps=2", "datamodule.num_workers=1", *NETS["dvae"])
    plain = [word for word in COMMON if not word.startswith(("data.size", "batch_size"))]
    code, output = finish(
        start(tmp_path, "model=dvae", "data=folder", "data.root=pictures", *settings, common=plain)
    )
    assert code == 0, output
    assert output.count("24 pictures with 24 captions") == 1, output
    assert output.count("odd.png") == 1, output
