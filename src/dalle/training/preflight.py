"""What a training will take, before it takes it: `dalle train ... preflight=true`.

A few real steps under a real Trainer (on one device, in the configured precision, with the moving average)
are watched: how long they take, how many floating point operations they are (a multiplication and an addition
are two), and what they keep in memory. Works for every stage, those with several optimizers included. Nothing
is written to the run directory.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle.data.frozen import frozen_of
from dalle.errors import UserError
from dalle.instantiate import instantiate
from dalle.machine import peak_memory
from dalle.run_dir import Run
from dalle.stages.base import Stage
from dalle.training.memory import Live, Saved, storages

ACCUMULATED = 2  # batches of a step, where there are several; more take no more memory
PASSING = ("activations", "gradients")  # what a step makes and lets go of
WARM = 2  # batches that are not timed
TIMED = 7
SECONDS = 60.0  # no further batch is timed after so long
SHORT = {
    "devices": 1, "num_nodes": 1, "strategy": "auto", "max_epochs": -1, "min_epochs": None, "min_steps": None,
    "fast_dev_run": False, "overfit_batches": 0.0, "limit_train_batches": None, "limit_val_batches": 0,
    "max_time": None, "profiler": None, "logger": False, "enable_progress_bar": False,
    "enable_checkpointing": False, "max_steps": 10_000,
}  # fmt: skip


def outline(config: dict[str, Any], stage: Stage, datamodule: Any, world: int) -> str:
    """One line: parameters, items, steps, epochs."""
    items, per_step = datamodule.items("train"), samples_per_step(config, world)
    size = f"{config['stage']}: {count(stage):,} parameters, {items:,} items"
    steps = total_steps(config, datamodule, world)
    if steps is None:
        return f"{size}, steps of {per_step:,} without an end"
    return f"{size}, {steps:,} steps of {per_step:,} = {steps * per_step / items:.3g} epochs"


def total_steps(config: dict[str, Any], datamodule: Any, world: int) -> int | None:
    trainer = config["trainer"]
    batches = datamodule.items("train") // (config["batch_size"] * world)
    accumulated = trainer["accumulate_grad_batches"]
    per_epoch = whole_batches(batches, trainer.get("limit_train_batches"), accumulated) // accumulated
    limits = (trainer["max_steps"], (trainer["max_epochs"] or -1) * per_epoch)
    return min((steps for steps in limits if steps >= 0), default=None)


def whole_batches(batches: int, limit: float | None, accumulated: int) -> int:
    """Batches of an epoch that make up whole steps of `accumulated` ones; Lightning would take a step of
    however many are left over.

    Args:
        batches: those there are.
        limit: trainer.limit_train_batches: how many to take, which share, or None: all.

    Raises:
        UserError: the limit leaves not one step.
    """
    batches -= batches % accumulated
    if limit is None:
        return batches
    limited = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if batches and limited < accumulated:
        raise UserError(
            f"trainer.limit_train_batches={limit} of {batches} batches leaves no whole step of "
            f"trainer.accumulate_grad_batches={accumulated}; raise the one, or lower the other"
        )
    return limited - limited % accumulated


def samples_per_step(config: dict[str, Any], world: int) -> int:
    return config["batch_size"] * world * config["trainer"]["accumulate_grad_batches"]


def mismatched_runs(config: dict[str, Any], datamodule: Any) -> list[str]:
    """Finished runs of the same name whose frozen networks are not this one's: no pipeline takes both."""
    lines = []
    for manifest in sorted(Path(config["paths"]["logs"], config["name"]).glob("*/manifest.json")):
        run = Run(manifest.parent)
        if run.path == Path(config["paths"]["run"]):
            continue
        try:
            facts = run.manifest()
        except UserError:  # a damaged run is nothing to this one
            continue
        for key, own in frozen_of(datamodule).items():
            theirs = facts.get(key)
            if theirs and theirs["weights"] != own.weights_hash:
                lines.append(
                    f"{run} was trained with another {key} ({theirs['weights']}, here {own.weights_hash}): "
                    "no pipeline will take the two together"
                )
    return lines


def count(module: nn.Module) -> int:
    """The number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class Watch(lightning.Callback):
    """Watches the steps of a short training.

    Args:
        compiled: compile the network once its operations, which are then hidden, have been counted.
        accumulated: batches of a step. The last of the second step is the one whose operations and memory are
            counted: the optimizer has made its state.
    """

    def __init__(self, compiled: bool, accumulated: int = 1) -> None:
        self.compiled, self.accumulated = compiled, accumulated
        self.watched = 2 * accumulated - 1
        self.ends: list[float] = []
        self.device = torch.device("cpu")  # the one trained on: afterwards the stage is moved back
        self.flops = self.activations = self.live = self.batches = self.peak = 0

    def on_fit_start(self, trainer: Any, pl_module: Stage) -> None:
        """A batch counts from when it goes to the device, where frozen networks look at it."""
        device, move = trainer.strategy.root_device, trainer.strategy.batch_to_device
        self.memory = Live(device)

        def watched(batch: Any, *args: Any, **more: Any) -> Any:
            if self.batches == self.watched:
                self.memory.see(storages(batch))
                self.memory.__enter__()
            return move(batch, *args, **more)

        trainer.strategy.batch_to_device = watched

    def on_train_batch_start(self, trainer: Any, pl_module: Stage, batch: Any, batch_idx: int) -> None:
        if self.batches == self.watched:
            self.saved = Saved({p.untyped_storage().data_ptr() for p in pl_module.parameters()})
            self.counter = FlopCounterMode(display=False)
            self.hooks = torch.autograd.graph.saved_tensors_hooks(self.saved.pack, lambda kept: kept.tensor)
            self.counter.__enter__()
            self.hooks.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Stage, *_: Any) -> None:
        if self.batches == self.watched:
            self.hooks.__exit__()
            self.counter.__exit__(None, None, None)
            self.memory.__exit__(None, None, None)
            self.flops, self.activations = self.counter.get_total_flops(), self.saved.peak
            self.live = self.memory.peak
            if self.compiled:
                pl_module.net.compile(dynamic=False)
        self.batches += 1
        self.device = pl_module.device
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
            first = self.batches == 1  # in which kernels are tried
            if first or (self.compiled and self.batches == self.watched + 1):  # what follows keeps less
                torch.cuda.reset_peak_memory_stats(self.device)
        self.ends.append(time.perf_counter())
        # The time that compiling takes, in the warm batches, is not counted.
        if self.timed >= TIMED or (
            self.timed >= self.accumulated and self.ends[-1] - self.ends[self.watched + WARM] > SECONDS
        ):
            trainer.should_stop = True

    @property
    def timed(self) -> int:
        """Batches."""
        return self.batches - self.watched - 1 - WARM

    def seconds(self, batches: int) -> float:
        """Of a step of so many batches, loading included, by the medians."""
        began, ended = self.ends[self.watched + WARM : -1], self.ends[self.watched + WARM + 1 :]
        took = [b - a for a, b in zip(began, ended, strict=True)]
        ways = [took[first :: self.accumulated] for first in range(self.accumulated)]  # one ends the step
        each = [statistics.median(way) for way in ways]
        return sum(each) + (batches - self.accumulated) * min(each)


def average_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The moving average's settings; None where a preset has switched it off and another tuned it."""
    ema = config["callbacks"].get("ema")
    return ema if ema and "_target_" in ema else None


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def watch(config: dict[str, Any], stage: Stage, datamodule: Any) -> Watch:
    """A few steps of training on one device.

    Raises:
        UserError: a step does not fit into the device's memory.
    """
    accumulated = min(ACCUMULATED, config["trainer"]["accumulate_grad_batches"])
    watched, ema = Watch(bool(config["compile"]), accumulated), average_of(config)
    callbacks = [watched, *([instantiate(ema, "callbacks.ema")] if ema else [])]
    trainer = instantiate(
        {
            "_target_": "lightning.Trainer",
            **config["trainer"],
            **SHORT,
            "accumulate_grad_batches": accumulated,
        },
        "trainer",
        callbacks=callbacks,
    )
    datamodule.trainer = trainer
    datamodule.train_dataloader()  # refuses a batch larger than the data
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.fit(stage, datamodule=datamodule)
    except torch.OutOfMemoryError:
        raise UserError(
            f"a step does not fit into the memory of {trainer.strategy.root_device}; give a smaller "
            "batch_size, for which trainer.accumulate_grad_batches can make up"
        ) from None
    return watched


def report(config: dict[str, Any], stage: Stage, datamodule: Any, done: int) -> None:
    """Prints all of it.

    Args:
        done: steps that a run which is resumed has behind it.
    """
    started = time.perf_counter()
    trainer = instantiate({"_target_": "lightning.Trainer", **config["trainer"]}, "trainer", logger=False)
    world = trainer.world_size
    print(outline(config, stage, datamodule, world))
    for line in mismatched_runs(config, datamodule):
        print(f"careful: {line}")
    watched = watch(config, stage, datamodule)
    batches = config["trainer"]["accumulate_grad_batches"]
    step, flops = watched.seconds(batches), watched.flops * batches
    left = max(0, (total_steps(config, datamodule, world) or 0) - done)
    compiled = ", compiled" if config["compile"] else ""
    lines = {
        "parameters": ", ".join(f"{name} {number:,}" for name, number in parts(stage).items()),
        "upstream": ", ".join(upstream(datamodule)) or "none",
        "sizes": ", ".join(f"{name} {value}" for name, value in datamodule.sizes.items()),
        "step": f"{flops / 1e9:,.4g} GFLOP and {step:.3g} s a device, {flops / step / 1e9:,.3g} GFLOP/s "
        f"({watched.device}, {config['trainer']['precision']}{compiled})",
        "to the end": f"{left:,} steps on {world} device{'s' * (world > 1)}: {in_time(left * step)} "
        "without validation and tests",
        "memory": memory(config, stage, datamodule, watched),
        "measured": f"median of {watched.timed} batches, "
        f"{time.perf_counter() - started:.0f} s with what had to be prepared",
    }
    for name, line in lines.items():
        print(f"  {name:<11} {line}")


def memory(config: dict[str, Any], stage: Stage, datamodule: Any, watched: Watch) -> str:
    """What a device holds, by kind, how much of it at once, and what was seen to be in use."""
    kinds, most = kept(config, stage, datamodule, watched), at_once(config, stage, datamodule, watched)
    if watched.device.type == "cuda":
        seen = f"seen at most {in_bytes(watched.peak)}"
    else:
        seen = f"seen at most {in_bytes(peak_memory())} of the whole process"
    estimate = " + ".join(f"{name} {in_bytes(n)}" for name, n in kinds.items() if n)
    return f"{estimate}; {in_bytes(most)} at once a device; {seen}"


def kept(config: dict[str, Any], stage: Stage, datamodule: Any, watched: Watch) -> dict[str, int]:
    """Bytes of a device, by kind."""
    frozen = [module for module in vars(datamodule).values() if isinstance(module, nn.Module)]
    frozen += getattr(stage, "frozen", ())  # of the loss
    optimizers: Any = stage.trainer.optimizers
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {
        "weights": held(stage),
        "gradients": sum(size(p) for p in stage.parameters() if p.requires_grad),
        "optimizer": sum(size(v) for state in states for v in state.values() if isinstance(v, Tensor)),
        "moving average": held(stage.net) if average_of(config) else 0,
        "activations": watched.activations,
        "frozen networks": sum(map(held, frozen)),
    }


def at_once(config: dict[str, Any], stage: Stage, datamodule: Any, watched: Watch) -> int:
    """The most bytes at one time: what stays from step to step, and the peak of what a step makes."""
    kinds = kept(config, stage, datamodule, watched)
    passing = ("activations",) if config["trainer"]["accumulate_grad_batches"] > 1 else PASSING
    return sum(n for kind, n in kinds.items() if kind not in passing) + watched.live


def held(module: nn.Module) -> int:
    """Bytes of weights and buffers."""
    return sum(size(t) for t in (*module.parameters(), *module.buffers()))


def parts(stage: Stage) -> dict[str, int]:
    """Trained parameters by part of the network, and of whatever else the stage trains."""
    net: nn.Module = stage.net
    found = {name: count(child) for name, child in net.named_children()}
    found["itself"] = sum(p.numel() for p in net.parameters(recurse=False) if p.requires_grad)
    inside = {id(p) for p in net.parameters()}
    for name, child in stage.named_children():
        found[name] = sum(p.numel() for p in child.parameters() if p.requires_grad and id(p) not in inside)
    return {name: count for name, count in found.items() if count}


def upstream(datamodule: Any) -> list[str]:
    """The frozen networks, by the hashes of their weights."""
    return [f"{name} {net.weights_hash}" for name, net in frozen_of(datamodule).items()]


def in_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"


def in_time(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
