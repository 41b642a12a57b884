"""What is told of an upsampler: how near its pictures are to the originals, beside bicubic; and a sheet."""

from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.data.batch import Batch
from dalle.diffusion.noise import per_sample
from dalle.images import grid, save_png
from dalle.metrics.metric import values_of
from dalle.metrics.reconstruction import Perceptual
from dalle.metrics.upsampling import UpsamplingLikeness, bicubic
from dalle.ranges import Place, PositiveInt, Seed
from dalle.stages.base import Stage
from dalle.training.callbacks import take
from dalle.training.loggers import log_picture


class Upsampled(lightning.Callback):
    """Logs `UpsamplingLikeness` in validation and test; draws small, bicubic, made and real pictures.

    Only for batches with `low`.

    Args:
        every: steps between two sheets of pictures, at a validation.
        items: pictures that are made in a validation, over all ranks.
        count: pictures on a sheet.
        perceptual: features of a further distance of pictures (`lpips`, `perceptual_effnet` ...); None: none.
    """

    def __init__(
        self,
        directory: Place,
        every: PositiveInt = 1000,
        items: PositiveInt = 32,
        count: PositiveInt = 8,
        perceptual: Perceptual | None = None,
        seed: Seed = 0,
    ) -> None:
        self.directory, self.every, self.items, self.count = Path(directory), every, items, count
        self.seed, self.metric = seed, UpsamplingLikeness(perceptual)
        self.due, self.room, self.some = 0, 0, False
        self.shown: tuple[Tensor, ...] | None = None

    def begin(self, trainer: lightning.Trainer) -> None:
        self.metric.reset()
        self.some, self.shown = False, None
        rank, ranks = trainer.global_rank, trainer.world_size
        self.room = self.items // ranks + (rank < self.items % ranks)

    def see(self, stage: Stage, batch: Batch) -> None:
        if "low" not in batch:
            return
        self.some = True  # also on ranks that make none: all of them compute
        if self.room == 0:
            return
        batch = take(batch, self.room)
        items = batch["index"].tolist()
        self.room -= len(items)
        made = stage.sample(batch, randn=per_sample([self.seed + i for i in items], stage.device))
        low, image = batch["low"], batch["image"]
        self.metric.update(made, image, low, items)
        if self.shown is None:
            factor = image.shape[-1] // low.shape[-1]
            rows = F.interpolate(low, scale_factor=factor), bicubic(low, factor), made, image
            self.shown = tuple(row[: self.count].float().cpu() for row in rows)

    def tell(self, trainer: lightning.Trainer, stage: Stage, split: str) -> None:
        if not self.some:
            return
        values = values_of([self.metric])
        stage.log_dict({f"{split}/{key}": value for key, value in values.items()}, rank_zero_only=True)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.begin(trainer)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.begin(trainer)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: Stage, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.see(pl_module, batch)

    def on_test_batch_end(
        self, trainer: lightning.Trainer, pl_module: Stage, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.see(pl_module, batch)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        """Here and not at the validation's end: the moving average is still in the network."""
        self.tell(trainer, pl_module, "val")
        if self.shown is None or not trainer.is_global_zero or trainer.global_step < self.due:
            return
        self.due = (trainer.global_step // self.every + 1) * self.every
        count = len(self.shown[0])
        names = [name for name in ("small", "bicubic", "upsampled", "real") for _ in range(count)]
        picture = grid(torch.cat(self.shown), names, columns=count)
        save_png(picture, self.directory / f"upsampled-{trainer.global_step:07d}.png")
        log_picture(trainer, "upsampled", picture)

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.tell(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due = state_dict["due"]
