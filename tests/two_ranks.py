"""Tiny runs of one process and of two, watched: `python two_ranks.py LOGS OUT MODEL OVERRIDE...`.

What is random in a step depends on the item alone, so that two ranks do what one does.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from tiny import ROOT, configure
from torch import Tensor

from dalle.stages.gan import GanStage
from dalle.training import fit

SECONDS = 300  # far more than it takes: a hang shows as a failure


def flat(stage: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in stage.parameters()])


class Watch(lightning.Callback):
    """Losses of all ranks, and their weights and buffers before and after each step."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.weights: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.losses: list[Tensor] = []

    def look(self, stage: Any) -> None:
        self.weights.append(stage.all_gather(flat(stage)))
        buffers = [b.detach().double().flatten() for b in stage.net.buffers()]
        self.buffers.append(stage.all_gather(torch.cat([torch.zeros(0).double(), *buffers])))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(pl_module.all_gather(outputs["loss"].detach()))
        self.look(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            seen = {"weights": self.weights, "buffers": self.buffers, "losses": self.losses}
            both = {name: torch.stack(values) for name, values in seen.items()}
            torch.save({k: v.view(len(v), trainer.world_size, -1) for k, v in both.items()}, self.out)


def draw(self: Any, batch: Any) -> Tensor:
    """The generator's pictures from noise that is the item's own."""
    noise = [
        torch.randn(self.net.latent_dim, generator=torch.Generator().manual_seed(i))
        for i in batch["index"].tolist()
    ]
    return self.net(torch.stack(noise), **{k: batch[k] for k in ("text_embed", "text_hidden", "text_mask")})


def main(logs: str, out: str, model: str, *options: str) -> None:
    made = fit.make_trainer

    def make_trainer(*args: Any) -> lightning.Trainer:
        trainer: Any = made(*args)
        trainer.callbacks.insert(0, Watch(Path(out)))
        return trainer

    fit.make_trainer = make_trainer
    GanStage.draw = draw
    fit.train(configure(model, Path(logs), *options))


def watch(ranks: int, logs: Path, out: Path, model: str, *options: str) -> dict[str, Tensor]:
    """Trains a tiny stage in processes of its own with 8 items a step.

    Returns: weights and buffers (steps + 1, ranks, N), losses (steps, ranks, 1).
    """
    job = subprocess.run(
        [
            sys.executable, __file__, str(logs), str(out / f"{ranks}.pt"), model,
            f"paths.run='{out / str(ranks)}'", f"batch_size={8 // ranks}",
            f"trainer={'ddp_cpu' if ranks > 1 else 'cpu'}", *options,
        ],
        cwd=out,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}"},
        timeout=SECONDS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    return torch.load(out / f"{ranks}.pt", weights_only=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
