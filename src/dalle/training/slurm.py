"""Training as a job of SLURM: which process is which, and back into the queue when the time is up.

Lightning's own way saves amid a step, in a file of its own. Ours saves between steps (`LastCheckpoint`), what
`resume=true` goes on from.
"""

import os
import subprocess
from typing import Any

from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from dalle.errors import UserError
from dalle.ranges import shown

NUMBERS = tuple(f"SLURM_{n}" for n in ("NTASKS", "NTASKS_PER_NODE", "NNODES", "PROCID", "LOCALID", "NODEID"))


def environment() -> SLURMEnvironment | None:
    """What SLURM says of this process; None where srun did not start it.

    Raises:
        UserError: srun has started several of which it is not known how many are on a machine, or what it
            has left in the environment are no numbers.
    """
    if not SLURMEnvironment.detect():
        return None
    for name in NUMBERS:
        if not (value := os.environ.get(name, "0")).isdecimal():
            raise UserError(f"{name}={shown(value)} is no number: unset it, or leave it to srun")
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError:
        tasks = os.environ["SLURM_NTASKS"]
        raise UserError(
            f"srun has started {tasks} processes, and SLURM does not say how many on each machine; "
            "give --ntasks-per-node in place of --ntasks"
        ) from None


def check_started(nodes: Any) -> None:
    """Refuses to wait for processes on other machines that nobody has started: they would never come.

    Raises:
        UserError: several machines, no launcher, and the environment does not say which of them this is.
    """
    if not isinstance(nodes, int) or nodes <= 1:  # another type is said elsewhere
        return
    launchers = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    if any(launcher.detect() for launcher in launchers):
        return
    number = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK"))
    needed = ("MASTER_PORT",) if number == "0" else ("MASTER_ADDR", "MASTER_PORT")
    if number is None or any(name not in os.environ for name in needed):
        raise UserError(
            f"trainer.num_nodes={nodes}, but nothing has started this command on the other machines; start "
            "it on each by torchrun or srun, or by hand with MASTER_ADDR, MASTER_PORT and NODE_RANK set"
        )


def job() -> str | None:
    """The number of this process's job, with that of its task in an array; None where there is none."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return os.environ.get("SLURM_JOB_ID")


def requeue(number: str) -> str:
    """Puts a job that runs back into the queue -> what came of it."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", number], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"careful: scontrol requeue {number} failed ({error}); submit the job again"
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        return f"careful: scontrol requeue {number} failed ({said}); submit the job again"
    return f"job {number} is back in the queue"
