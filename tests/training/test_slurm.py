"""Jobs of SLURM, as its variables and a scontrol of our own tell them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from tiny import ENVIRONMENT, ROOT, SECONDS, column, configure, overrides

from dalle.errors import UserError
from dalle.machine import RANKS, is_main_process, started_by_others
from dalle.run_dir import Run
from dalle.training import slurm
from dalle.training.fit import lightning_trainer

TASKS = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
         "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost"}  # fmt: skip


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """A scontrol that writes down what it is told -> the file in which it does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "told"


@pytest.fixture
def task(monkeypatch):
    """Makes this process one that srun has started."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def make(**more: str) -> None:
        for name, value in {**TASKS, **more}.items():
            monkeypatch.setenv(name, value)

    return make


def test_the_number_of_a_job(task):
    assert slurm.job() is None
    task(SLURM_JOB_ID="7")
    assert slurm.job() == "7"
    task(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert slurm.job() == "5_3"


def test_back_into_the_queue(scontrol):
    assert slurm.requeue("5_3") == "job 5_3 is back in the queue"
    assert scontrol.read_text() == "requeue 5_3\n"


def test_a_queue_that_does_not_take_it_back(scontrol):
    script = scontrol.parent / "bin" / "scontrol"
    script.write_text("#!/bin/sh\necho 'Job is pending' >&2; exit 1\n")
    said = slurm.requeue("7")
    assert said == "careful: scontrol requeue 7 failed (Job is pending); submit the job again"
    script.unlink()
    assert slurm.requeue("7").startswith("careful: scontrol requeue 7 failed (")


def test_processes_are_numbered_by_slurm(task, tmp_path, monkeypatch):
    assert slurm.environment() is None
    assert not started_by_others()
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero_only.rank)  # a Trainer sets it for the process
    task(SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_JOB_ID="7")
    assert started_by_others()
    assert not is_main_process()
    words = ("trainer=slurm", "trainer.accelerator=cpu", "precision=fp32", "trainer.max_steps=1")
    config = configure("vae", tmp_path, *words)
    assert (config["trainer"]["devices"], config["trainer"]["num_nodes"]) == (2, 1)
    trainer = lightning_trainer(config["trainer"], logger=False, enable_checkpointing=False)
    assert (trainer.world_size, trainer.global_rank) == (2, 1)
    assert not trainer._accelerator_connector.cluster_environment.auto_requeue


def test_tasks_of_which_no_machine_is_known(task, monkeypatch):
    task(SLURM_PROCID="1")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match=r"srun has started 2 processes.*--ntasks-per-node"):
        slurm.environment()


@pytest.mark.parametrize("odd", ["", "abc", "-1", "2(x3)"])
def test_variables_that_are_no_numbers(task, odd):
    task(SLURM_PROCID="0", SLURM_LOCALID="0")
    assert slurm.environment() is not None
    task(SLURM_NTASKS=odd)
    with pytest.raises(UserError, match=r"SLURM_NTASKS='.*' is no number"):
        slurm.environment()


def srun(cwd: Path, port: int, *words: str) -> list[subprocess.Popen]:
    """As srun starts a command."""
    jobs = []
    for rank in range(2):
        place = {"SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{rank}", "SLURM_JOB_ID": "12345",
                 "MASTER_PORT": f"{port}"}  # fmt: skip
        command = [sys.executable, str(ROOT / "train.py"), *overrides("vae", Path("logs"), *words)]
        path = {"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]}
        jobs.append(
            subprocess.Popen(
                command,
                cwd=cwd,
                env={**ENVIRONMENT, **path, **TASKS, **place},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return jobs


def ended(jobs: list[subprocess.Popen]) -> list[tuple[int, str]]:
    try:
        said = [job.communicate(timeout=SECONDS)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [(job.returncode, text) for job, text in zip(jobs, said, strict=True)]


@pytest.mark.slow
def test_a_job_out_of_time_goes_on_when_it_is_back(scontrol, tmp_path):
    """The same command each time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ("trainer=slurm", "trainer.accelerator=cpu", "batch_size=4", "resume=true")
    run = Run(tmp_path / "logs" / "default" / "vae")
    jobs = srun(tmp_path, port, *words, "trainer.max_steps=100000")
    deadline = time.monotonic() + SECONDS
    while not (run.path / "metrics.csv").exists() and time.monotonic() < deadline:
        assert [job.poll() for job in jobs] == [None, None], ended(jobs)
        time.sleep(0.1)
    for job in jobs:
        job.send_signal(signal.SIGUSR1)
    (code, said), (other, nothing) = ended(jobs)
    assert (code, other) == (1, 1), said
    assert "job 12345 is back in the queue" in said
    assert "Traceback" not in said + nothing
    assert scontrol.read_text() == "requeue 12345\n"  # once
    assert not list(run.path.glob("hpc_ckpt*"))
    step = torch.load(run.checkpoint, weights_only=True)["global_step"]
    assert step > 0
    (code, said), _ = ended(srun(tmp_path, port, *words, f"trainer.max_steps={step + 2}"))
    assert code == 0, said
    assert list(column(run, "train/loss")) == list(range(step + 2))
    assert run.manifest()["steps"] == step + 2


@pytest.mark.parametrize(
    ("environment", "starts"),
    [
        ({}, False),
        ({"NODE_RANK": "1"}, False),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, False),  # both would be the first
        ({"NODE_RANK": "1", "MASTER_PORT": "1"}, False),
        ({"NODE_RANK": "0", "MASTER_PORT": "1"}, True),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, True),
        ({"GROUP_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, True),
        ({"TORCHELASTIC_RUN_ID": "7"}, True),
        ({**TASKS, "SLURM_PROCID": "0"}, True),
    ],
)
def test_nobody_waits_for_machines_that_will_not_come(task, monkeypatch, environment, starts):
    for name in ("NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    slurm.check_started(1)
    if starts:
        slurm.check_started(2)
    else:
        with pytest.raises(
            UserError, match=r"\Atrainer.num_nodes=2, but nothing has started .* NODE_RANK set\Z"
        ):
            slurm.check_started(2)


@pytest.mark.parametrize("name", RANKS)
def test_ranks_that_are_no_numbers(command, no_training, monkeypatch, name):
    monkeypatch.setenv(name, "first")
    line = f"{name}='first' is no number: unset it, or leave it to torchrun"
    assert line in command("train.py", *overrides("clip", Path("logs"))).error
