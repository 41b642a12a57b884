"""Losses and gradients that are no numbers, in every stage: one is left out, many end the run."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from torture.kills import command, directory
from torture.trial import run

LAST = 10**9


def spoilt(folder: Path, stage: str, seed: int, upstream: Path) -> str:
    """One or all steps from some step on have a gradient that is no number.

    Returns: what went wrong; empty where nothing did.
    """
    draw = random.Random(f"nan {stage} {seed}")
    first, always = draw.randint(0, 4), draw.random() < 0.5
    value = draw.choice((float("nan"), float("inf"), -float("inf")))
    steps = 60 if always else 6
    more = (f"trainer.max_steps={steps}", "trainer.val_check_interval=null", "callbacks.generation.items=4")
    arguments = command(stage, folder / "logs", upstream, *more)
    poison = lambda: spoil(first, LAST if always else first, value)  # noqa: E731
    ended = run(folder, "train.py", *arguments, sabotage=poison)
    path = directory(stage, folder / "logs")
    if always:
        if fault := ended.fault("step"):
            return f"numbers gone for good: {fault}"
        if (path / "manifest.json").exists():
            return "a run without numbers counts as finished"
    else:
        if ended.code:
            return f"one step without numbers ends the run: {ended.tail}"
        json.loads((path / "manifest.json").read_text(), parse_constant=refuse)
        if not all(torch.isfinite(w).all() for w in load_file(path / "model.safetensors").values()):
            return "weights that are no numbers were saved as finished"
    file = path / "last.ckpt"
    if file.exists():
        kept = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        if not all(torch.isfinite(w).all() for w in kept.values() if w.is_floating_point()):
            return "the last checkpoint holds weights that are no numbers"
    return ""


def refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def spoil(first: int, last: int, value: float) -> None:
    """Gradients of the first weight of the network are `value` in training batches first to last."""
    import dalle.stages.base as base

    seed_batch: Callable = base.Stage.seed_batch

    def seed_and_spoil(self) -> None:
        seed_batch(self)
        if not hasattr(self, "batches_seen"):
            self.batches_seen = 0
            weight = next(p for p in self.net.parameters() if p.requires_grad)
            weight.register_hook(
                lambda g: torch.full_like(g, value) if first <= self.batches_seen - 1 <= last else g
            )
        self.batches_seen += 1

    base.Stage.seed_batch = seed_and_spoil
