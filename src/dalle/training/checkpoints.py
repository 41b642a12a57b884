"""``last.ckpt``: everything needed to go on training, saved between two steps and never but whole.

A checkpoint is of the moment before a batch begins: every callback has seen the step before, its metrics are
in the file of metrics, and a validation that was due is over. So a run that goes on from it does and records
what an uninterrupted one would have.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from dalle.data.datamodules import STOPPING
from dalle.errors import UserError, instead, reason
from dalle.finite import check_finite
from dalle.ranges import Place, PositiveInt, Text
from dalle.stages.base import Stage
from dalle.stages.nan_guard import Diverged
from dalle.training import slurm
from dalle.training.checkpoint_files import DurableIO
from dalle.training.loggers import MetricsCsv
from dalle.training.restorable import WAYS
from dalle.weight_names import as_today

STOP_EVERY = (
    10  # steps between the questions to all ranks whether one was told to stop: each costs a device sync
)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` current: every `every` steps, at the end, and when training is stopped.

    Ctrl-C, SIGTERM, SIGHUP (a terminal that is closed) and SIGUSR1 (the warning of a cluster that time runs
    out) take effect when a step is done, on all ranks at the same one; a second Ctrl-C stops at once.

    Args:
        keep: how many checkpoints there are at most; earlier ones are ``step-<step>.ckpt``.
        best: of the validation's figures the one (``val/loss``) by which a ``best.ckpt`` is kept, saved right
            after the validation in which it was best; None: there is none.
        best_is: the lowest or the highest.
        background: write while training goes on, from a copy in main memory.
        requeue: after SIGUSR1 a job of SLURM goes back into the queue.

    Attributes:
        seconds: of training, in all parts of a run that was resumed.
        facts: what the run is made from (`dalle.training.resume.facts`), kept in the checkpoint.
    """

    SIGNALS = STOPPING

    def __init__(
        self,
        directory: Place,
        every: PositiveInt = 500,
        keep: PositiveInt = 1,
        best: Text | None = None,
        best_is: Literal["min", "max"] = "min",
        background: bool = False,
        requeue: bool = True,
    ) -> None:
        self.path, self.every = Path(directory) / "last.ckpt", every
        self.keep, self.best, self.sign = keep, best, 1 if best_is == "min" else -1
        self.background, self.requeue = background, requeue
        self.best_value: float | None = None
        self.best_of = f"{best_is} {best}" if best else ""
        self.told = False  # that there is no such figure
        self.best_due = False  # the last validation was the best one, and is not saved yet
        self.out_of_time = False  # told so by SIGUSR1
        self.io: DurableIO | None = None
        self.saved_step: int | None = None  # None: training has not begun, there is nothing to save
        self.asked = self.agreed = False
        self.handlers: dict[int, Any] = {}
        self.loops: dict[str, Any] | None = None  # Lightning's counters after a whole step; None amid one
        self.validation_due = False  # and not over: a run that went on from here would leave it out
        self.saving = False
        self.done = 0  # batches that stepped before the run was resumed
        self.before, self.started, self.ended = 0.0, 0.0, 0.0
        self.facts: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        return self.before + (self.ended or time.perf_counter()) - self.started

    def save(self, trainer: lightning.Trainer) -> None:
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]  # set by a connector of Lightning's
            return
        if self.saved_step is None or self.loops is None or trainer.global_step <= self.saved_step:
            return
        trainer.lightning_module.check_worth_keeping()  # pyright: ignore[reportCallIssue]  # a Stage, of which the hint does not know
        for logger in trainer.loggers:
            logger.save()
        if self.io is not None and self.best_due:
            self.io.also = "best.ckpt"
        self.saving = True
        try:
            trainer.save_checkpoint(self.path)
        finally:
            self.saving = False
        self.saved_step, self.best_due = trainer.global_step, False

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises UserError where it could not be written."""
        if self.io is not None:
            self.io.wait()

    def setup(self, trainer: lightning.Trainer, pl_module: Stage, stage: str) -> None:
        if stage == "fit":
            self.started, self.ended = time.perf_counter(), 0.0
            self.io = DurableIO(pl_module, self.keep, self.background)
            trainer.strategy.checkpoint_io = self.io
            return
        loop: Any = trainer.fit_loop
        if loop.epoch_loop._batches_that_stepped < self.done:  # resumed at the end: no loop has counted it
            loop.epoch_loop._batches_that_stepped = self.done
            loop.epoch_progress.current.completed += 1

    def on_load_checkpoint(self, trainer: Any, pl_module: Stage, checkpoint: dict[str, Any]) -> None:
        """Metrics of steps after the checkpoint are about to be written again."""
        self.done = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] + 1
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.rewind(self.done)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            taken = [n for n in self.SIGNALS if _may_be_taken(n)]
            self.handlers = {number: signal.signal(number, self.on_signal) for number in taken}

    def on_signal(self, number: int, frame: Any) -> None:
        if self.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # a group and whoever passes signals on are heard twice
        self.asked, self.out_of_time = True, number == getattr(signal, "SIGUSR1", None)
        with contextlib.suppress(OSError):  # the terminal may be gone; print may not be entered twice
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """The last of all callbacks to see a step. Lightning's counters are remembered as they are here,
        which is where it can go on from.
        """
        fit_loop: Any = trainer.fit_loop
        self.loops = None if fit_loop._should_accumulate() else {"fit_loop": fit_loop.state_dict()}
        self.validation_due = fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
        if trainer.world_size == 1:
            self.agreed = self.asked
        elif trainer.global_step % STOP_EVERY == 0:
            self.agreed = trainer.strategy.reduce_boolean_decision(self.asked, all=False)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.validation_due = False
        value = trainer.callback_metrics.get(self.best or "")
        if self.best and value is None and not self.told and trainer.is_global_zero:
            figures = [name for name in trainer.callback_metrics if name.startswith("val/")]
            more = instead(self.best, figures, "")
            print(f"careful: callbacks.checkpoint.best={self.best} is no figure of the validation{more}")
            self.told = True
        if value is None or trainer.sanity_checking or not math.isfinite(number := float(value)):
            return
        if self.best_value is None or self.sign * number < self.sign * self.best_value:
            self.best_value, self.best_due = number, True

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Only now the last step is logged and, where one was due, validated."""
        if self.loops is None:
            return
        if self.agreed or self.best_due or trainer.global_step % self.every == 0:
            self.save(trainer)
        if self.agreed:
            self.leave(trainer)
        self.loops = None

    def leave(self, trainer: lightning.Trainer) -> NoReturn:
        """Ends a run that was told to stop, with its checkpoint on the disk."""
        self.wait()
        number = slurm.job() if self.requeue else None
        again = number and trainer.strategy.reduce_boolean_decision(self.out_of_time, all=False)
        if number and again and trainer.is_global_zero:
            print(f"\n{slurm.requeue(number)}", flush=True)
        raise KeyboardInterrupt

    def on_save_checkpoint(self, trainer: Any, pl_module: Stage, checkpoint: dict[str, Any]) -> None:
        if self.saving and self.loops is not None:
            checkpoint["loops"] |= self.loops

    def state_dict(self) -> dict[str, Any]:
        kept = {"seconds": self.seconds, "facts": self.facts, "best_value": self.best_value}
        return {**kept, "best_of": self.best_of, "threads": torch.get_num_threads()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict.get("seconds", 0.0)
        if state_dict.get("best_of", self.best_of) == self.best_of:  # else of another figure
            self.best_value = state_dict.get("best_value")

    def fits(self, state: dict[str, Any], pl_module: Stage) -> bool:
        """Whether what was kept of time and of the best figure are numbers."""
        numbers = (state.get("seconds", 0.0), state.get("best_value"))
        return all(n is None or (isinstance(n, int | float) and math.isfinite(n)) for n in numbers)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.save(trainer)
        self.restore_handlers()
        if self.agreed:
            self.leave(trainer)
        self.wait()

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.ended = time.perf_counter()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Stage, exception: BaseException) -> None:
        self.restore_handlers()
        # saving waits for all ranks, which may not come after an error on one of them
        alone = trainer.world_size == 1 and not isinstance(exception, UserError)
        # whoever stops a run in a hurry wants its steps more than a validation's figures
        whole = isinstance(exception, KeyboardInterrupt) or not self.validation_due
        if trainer.state.fn == "fit" and (self.agreed or alone) and whole:
            with contextlib.suppress(Diverged):  # the checkpoint that is there stays
                self.save(trainer)
        self.wait()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero and self.path.exists():
            step = "there" if self.saved_step is None else f"step {self.saved_step}"
            print(f"\nstopped; the same command with resume=true goes on from {step}", flush=True)

    def restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


def _may_be_taken(number: int) -> bool:
    """Whether a signal is ours to answer: of SIGUSR1 submitit may be asked, on a cluster, and nohup has
    SIGHUP ignored.
    """
    found = signal.getsignal(number)
    if number == getattr(signal, "SIGUSR1", None):
        return found == signal.SIG_DFL
    return number != getattr(signal, "SIGHUP", None) or found != signal.SIG_IGN


# What a checkpoint must be, looked at before anything is begun with it.


def _is_list_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kinds) for item in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and _is_list_of(dict)(value.get("param_groups"))
        and all(_is_list_of(int)(group.get("params")) for group in value["param_groups"])
    )


def _is_fit_loop(value: Any) -> bool:
    try:
        loop = value["fit_loop"]
        counters = [
            loop[name][kind][what]
            for name in ("epoch_progress", "epoch_loop.batch_progress")
            for kind in ("total", "current")
            for what in ("ready", "started", "processed", "completed")
        ]
        counters.append(loop["epoch_loop.state_dict"]["_batches_that_stepped"])
        loaders = loop.get("state_dict", {}).get("combined_loader", [])
        return all(map(_is_count, counters)) and _is_list_of(dict)(loaders)
    except (KeyError, TypeError, AttributeError):
        return False


FRAME: dict[str, Callable[[Any], bool]] = {
    "epoch": _is_count,
    "global_step": _is_count,
    "pytorch-lightning_version": lambda value: isinstance(value, str),
    "state_dict": lambda value: (
        isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values())
    ),
    "loops": _is_fit_loop,
    "callbacks": lambda value: (
        isinstance(value, dict) and all(isinstance(state, dict) for state in value.values())
    ),
    "optimizer_states": lambda value: (
        isinstance(value, list) and bool(value) and all(map(_is_optimizer, value))
    ),
    "lr_schedulers": _is_list_of(dict),
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, its tensors still on disk.

    Raises:
        UserError: it cannot be read, is not one of a training, or holds weights that are no numbers.
    """
    if not path.is_file():  # a pipe or a device may never end
        raise UserError(f"{path} cannot be read (it is no file); {WAYS}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); {WAYS}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no checkpoint of a training; {WAYS}")
    for key, fits in FRAME.items():
        if key not in found:
            raise UserError(f"{path} is damaged: {key} is missing; {WAYS}")
        if not fits(found[key]):
            raise UserError(f"{path} is damaged: {key} is not what a training leaves; {WAYS}")
    check_finite(found["state_dict"], path, WAYS)
    return found


def check_same_network(path: Path, saved: dict[str, Tensor], stage: Stage) -> None:
    """Raises UserError where a checkpoint's weights are not those of this network."""
    saved, own = as_today(saved, stage), stage.state_dict()
    for key in sorted(saved.keys() | own.keys()):
        there, here = (tuple(s[key].shape) if key in s else None for s in (saved, own))
        if there != here:
            raise UserError(
                f"{path} is of another network ({key} is {there} there, {here} here); resume with the "
                "settings in config.yaml beside it, or train another with name=other"
            )
