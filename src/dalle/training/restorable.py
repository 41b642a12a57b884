"""Whether what a checkpoint holds can be restored: held against what this training would itself begin with.

Lightning and torch restore states without looking at them; a damaged one ends a run in a traceback, or in
steps that nobody asked for, after the run directory was written to.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dalle.errors import UserError
from dalle.finite import check_finite
from dalle.stages.base import Stage

WAYS = "delete it, or start again with overwrite=true"
LATER = {"facts", "best_value", "best_of", "threads"}  # what the first checkpoints did not have


def check_restorable(
    path: Path, checkpoint: dict[str, Any], stage: Stage, trainer: lightning.Trainer
) -> None:
    """Looks at the states of optimizers, schedules, loops, callbacks and of the NaN guard.

    Args:
        checkpoint: as `dalle.training.checkpoints.read_checkpoint` gives it, of this stage's network.
        trainer: one that has not begun.

    Raises:
        UserError: naming the file and the first part that cannot be restored.
    """
    for part, fits in _parts(checkpoint, stage, trainer):
        if not fits:
            raise UserError(f"{path} is damaged: {part} is not what this training leaves; {WAYS}")
    averages = checkpoint["callbacks"].get("Ema", {}).get("average", {})
    states = [s for saved in checkpoint["optimizer_states"] for s in saved["state"].values()]
    for number, state in enumerate([averages, *states]):
        check_finite({f"{key} of {number}" if number else key: v for key, v in state.items()}, path, WAYS)


def _parts(
    checkpoint: dict[str, Any], stage: Stage, trainer: lightning.Trainer
) -> Iterator[tuple[str, bool]]:
    """Each part's name, and whether it can be restored; those that come first are relied on by the rest."""
    if checkpoint["pytorch-lightning_version"] == lightning.__version__:
        yield "loops", alike(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict())
    if "guard" in checkpoint:
        yield "guard", stage.guard.fits(checkpoint["guard"])
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  # set by a connector of Lightning's
        own = type(callback).__module__.startswith("dalle.")
        if callback.state_key in checkpoint["callbacks"] and own:
            saved = checkpoint["callbacks"][callback.state_key]
            fits = getattr(callback, "fits", lambda *_: True)
            yield (
                f"callbacks.{callback.state_key}",
                alike(saved, callback.state_dict()) and fits(saved, stage),
            )
    optimizers, schedules = fresh(stage, trainer)
    for name, ours in (("optimizer_states", optimizers), ("lr_schedulers", schedules)):
        yield name, len(checkpoint[name]) == len(ours)
    for saved, schedule in zip(checkpoint["lr_schedulers"], schedules, strict=True):
        public = {key: value for key, value in schedule.state_dict().items() if not key.startswith("_")}
        yield "lr_schedulers", alike(saved, public)
    for saved, optimizer in zip(checkpoint["optimizer_states"], optimizers, strict=True):
        yield "optimizer_states", _fits_optimizer(saved, optimizer)


def alike(saved: Any, own: Any) -> bool:
    """Whether a saved value is of the kind of one's own: the same keys and more, lists of one length, numbers
    where there are numbers, tensors of one shape. An empty or missing one of one's own says nothing.
    """
    if own is None:
        return True
    if isinstance(own, dict):
        return isinstance(saved, dict) and all(
            alike(saved[key], value) if key in saved else key in LATER for key, value in own.items()
        )
    if isinstance(own, list | tuple):
        return (
            isinstance(saved, list | tuple)
            and len(saved) == len(own)
            and all(alike(a, b) for a, b in zip(saved, own, strict=True))
        )
    if isinstance(own, Tensor):
        return alike_tensors(saved, own)
    if isinstance(own, bool) or isinstance(saved, bool):
        return saved is None or (isinstance(saved, bool) and isinstance(own, bool))
    if isinstance(own, int):
        return isinstance(saved, int)
    return isinstance(saved, int | float if isinstance(own, float) else type(own))


def alike_tensors(saved: Any, own: Tensor) -> bool:
    """Of one shape, and both with or both without floating point: with how many bits may change."""
    return (
        isinstance(saved, Tensor)
        and saved.shape == own.shape
        and saved.is_floating_point() == own.is_floating_point()
        and saved.is_complex() == own.is_complex()
    )


def fresh(stage: Stage, trainer: lightning.Trainer) -> tuple[list[Optimizer], list[LRScheduler]]:
    """The optimizers and schedules that the stage would begin with; their steps are not known yet."""

    class NotBegun(type(trainer)):
        estimated_stepping_batches = 1  # pyright: ignore[reportAssignmentType]  # a property there

    stage.trainer = copy.copy(trainer)
    stage.trainer.__class__ = NotBegun
    made = list(_leaves(stage.configure_optimizers()))
    stage.trainer = None
    return (
        [found for found in made if isinstance(found, Optimizer)],
        [found for found in made if isinstance(found, LRScheduler)],
    )


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(item)
    else:
        yield tree


def _fits_optimizer(saved: dict[str, Any], optimizer: Optimizer) -> bool:
    """Loads the groups into the optimizer, which is of no use any more."""
    own = copy.deepcopy(optimizer.state_dict()["param_groups"])
    if len(saved["param_groups"]) != len(own):
        return False
    if any(a["params"] != b["params"] for a, b in zip(saved["param_groups"], own, strict=True)):
        return False
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})  # adds what is newer
    if not alike(optimizer.state_dict()["param_groups"], own):
        return False
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    kept: dict[Any, dict[str, Any]] = {}
    for number, state in saved["state"].items():
        if not isinstance(number, int) or not 0 <= number < len(weights) or not isinstance(state, dict):
            return False
        weight, group = weights[number], groups[number]
        kind = (id(group), weight.shape, weight.dtype)
        if kind not in kept:
            kept[kind] = what_is_kept(optimizer, group, weight)
        if state and not alike(state, kept[kind]):
            return False
    return True


def what_is_kept(optimizer: Optimizer, group: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """What an optimizer keeps of a weight in a group: seen after one step with such a one, alone."""
    other = torch.zeros_like(weight, requires_grad=True)
    other.grad = torch.zeros_like(weight)
    optimizer.state.clear()
    optimizer.param_groups = [{**group, "params": [other]}]
    optimizer.step()
    return dict(optimizer.state[other])
