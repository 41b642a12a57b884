"""Every stage on two ranks: stopped and resumed it is, to the bit, as if it had never been stopped.

All stages are trained by one pair of processes (this file, run as a script), for starting one takes longer.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from ranks import in_ranks
from tiny import NETS, PRESETS, column, configure, weights

from dalle.run_dir import Run
from dalle.training import checkpoints, fit

STEPS, STOP = 5, 3  # epochs are of two steps: it stops amid the second one
STAGES = [*NETS, *PRESETS]
OPTIONS = (
    "trainer=ddp_cpu", "batch_size=4", "data.size=16", "trainer.val_check_interval=2",
    f"trainer.max_steps={STEPS}",
)  # fmt: skip


class Interrupt(lightning.Callback):
    """Ctrl-C for the last rank alone: the others hear of it."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == STOP - 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGINT)


def config_of(stage: str, logs: Path, run: str, *more: str) -> dict[str, Any]:
    return configure(stage, logs, f"paths.run='{logs / stage / run}'", *OPTIONS, *more)


def train_in_parts(logs: Path, stage: str) -> None:
    made = fit.make_trainer

    def stopped(*args: Any) -> lightning.Trainer:
        trainer: Any = made(*args)
        trainer.callbacks.insert(0, Interrupt())
        return trainer

    fit.train(config_of(stage, logs, "whole"))
    fit.make_trainer = stopped
    try:
        fit.train(config_of(stage, logs, "parts"))
    except SystemExit:
        pass
    else:
        raise AssertionError("it was not stopped")
    finally:
        fit.make_trainer = made
    parts = Run(logs / stage / "parts")
    assert torch.load(parts.checkpoint, weights_only=True)["global_step"] == STOP
    torch.distributed.barrier()  # before one of them changes it
    fit.train(config_of(stage, logs, "parts", "resume=true"))


@pytest.fixture(scope="module")
def logs(untrained_stages, tmp_path_factory) -> Path:
    """logs/<stage>/{whole,parts} of all stages."""
    cwd = tmp_path_factory.mktemp("ranks")
    (cwd / "logs").mkdir()
    (cwd / "logs" / "default").symlink_to(untrained_stages / "default")
    in_ranks(__file__, cwd, str(cwd / "logs"), *STAGES)
    return cwd / "logs"


def alike(a: Any, b: Any) -> bool:
    """Whether two nests of tensors and numbers are the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_on_two_ranks(logs, stage):
    whole, parts = (Run(logs / stage / name) for name in ("whole", "parts"))
    assert alike(weights(parts), weights(whole))
    a, b = (torch.load(run.checkpoint, weights_only=True) for run in (parts, whole))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "guard"):
        assert alike(a[key], b[key]), key
    assert alike(a["callbacks"]["Ema"], b["callbacks"]["Ema"])
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        assert column(parts, name) == column(whole, name)
    assert len(column(whole, "train/loss")) == STEPS
    assert parts.manifest()["metrics"] == whole.manifest()["metrics"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    checkpoints.STOP_EVERY = 1
    for name in sys.argv[2:]:
        began = time.monotonic()
        train_in_parts(Path(sys.argv[1]), name)
        print(f"{name}: {time.monotonic() - began:.1f} s")
