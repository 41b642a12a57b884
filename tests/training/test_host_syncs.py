"""A training step asks the device for nothing: whoever does makes it wait for all that is under way."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from conftest import untrained
from tiny import NETS, configure
from torch.utils._python_dispatch import TorchDispatchMode

from dalle.stages.base import Stage
from dalle.training import fit as training

FIRST = 2  # the batch that is looked at, and the last: those before make states and allocate
# What waits for a GPU. A mask of booleans in an index is `nonzero` there.
WAITING = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim", "aten::repeat_interleave",
    "aten::lift_fresh",
}  # fmt: skip


# Of a learned codebook, which is a library's, each step asks whether codes have died
OWN = {"vqgan": ("model.disc_start=0", "model.net.levels=[8,4]")}


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device, on the CPU, where nothing does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put_", "aten::index_put") else ()
        masks = any(i is not None and i.dtype == torch.bool for i in indices)
        if name in WAITING or masks:
            raise AssertionError(f"a training step calls {name}, which waits for the device")
        return func(*args, **(kwargs or {}))


class Strict(lightning.Callback):
    """Looks at a whole step, the other callbacks' work in it included, as the last of them."""

    def __init__(self, mode: Any) -> None:
        self.mode, self.entered, self.steps = mode, False, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= FIRST:
            self.mode.__enter__()
            self.entered = True

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += self.entered
        self.leave()

    def on_exception(self, *_: Any) -> None:
        self.leave()

    def leave(self) -> None:
        if self.entered:
            self.mode.__exit__(None, None, None)
            self.entered = False


class Cuda:
    """The same, looked for by the driver."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    for model in ("clip", "dvae"):
        untrained(model, logs)
    return logs


def watched(monkeypatch, mode: Any, model: str, logs: Path, *more: str) -> Strict:
    made, strict = training.make_trainer, Strict(mode)

    def make_trainer(*args: Any) -> Any:
        trainer: Any = made(*args)
        trainer.callbacks.append(strict)
        return trainer

    monkeypatch.setattr(training, "make_trainer", make_trainer)
    settings: tuple[str, ...] = OWN.get(model, ())
    settings += (f"paths.run='{logs / 'run' / model}'", "overwrite=true", "trainer.max_steps=4")
    training.train(configure(model, logs, *settings, *more, "trainer.log_every_n_steps=100"))
    return strict


@pytest.mark.parametrize("model", NETS)
def test_no_stage_waits_for_the_device(model, logs, monkeypatch):
    """As on a GPU, where the NaN guard is a deferred one."""
    started = Stage.on_train_start

    def deferred(self: Any) -> None:
        started(self)
        self.guard.deferred = True

    monkeypatch.setattr(Stage, "on_train_start", deferred)
    assert watched(monkeypatch, NoWaiting(), model, logs).steps == 2


def test_muon_does_not_wait_either(logs, monkeypatch):
    started = Stage.on_train_start
    monkeypatch.setattr(
        Stage, "on_train_start", lambda self: (started(self), setattr(self.guard, "deferred", True))
    )
    assert watched(monkeypatch, NoWaiting(), "prior", logs, "optimizer=muon").steps == 2


def test_waiting_is_noticed(logs, monkeypatch):
    """A guard that is not deferred looks at the norm of every gradient."""
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        watched(monkeypatch, NoWaiting(), "prior", logs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("model", NETS)
def test_nothing_waits_for_a_gpu(model, logs, monkeypatch):
    more = ("trainer=gpu", "trainer.enable_progress_bar=true", "precision=bf16")
    assert watched(monkeypatch, Cuda(), model, logs, *more).steps == 2
