"""What is told of every stage that gives pictures back: how well, a row of them under their originals, and
how its codes are used.

Asks only for `reconstruction` (B, 3, H, W), and where there are codes for `codes` (B, N), in what the stage's
step gives in validation and test.
"""

import logging
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dalle.data.batch import Batch
from dalle.data.datamodules import datamodule_of
from dalle.data.shapes import Shapes
from dalle.images import grid
from dalle.metrics.codebook_usage import CodeUse, code_use, diagnose
from dalle.metrics.features import find_inception, inception_features, random_features
from dalle.metrics.fid import FrechetDistance
from dalle.metrics.judge_accuracy import JudgeAccuracy
from dalle.metrics.metric import BIASED, EvaluationMetric, update_all, values_of, without_marks
from dalle.metrics.reconstruction import Likeness, Perceptual
from dalle.ranges import File, Place, PositiveInt
from dalle.stages.base import Stage
from dalle.training.sheets import SheetCallback

log = logging.getLogger(__name__)

BINS = 256  # of the histogram of codes


class Reconstructions(SheetCallback):
    """Logs `psnr`, `ssim`, `rfid` and `CodeUse`, and in the test `judge_reconstruction`; draws pictures into
    ``samples/``; tells of collapse.

    Args:
        every: steps between two sheets of pictures, at a validation.
        count: pictures on a sheet.
        inception: local weights of the FID Inception; without them (and none in torch's cache) the distance
            is `rfid_random`, where there are more pictures than features.
        perceptual: features of a further distance of pictures (`lpips`, `perceptual_effnet` ...); None: none.
    """

    def __init__(
        self,
        directory: Place,
        every: PositiveInt = 1000,
        count: PositiveInt = 8,
        inception: File | None = None,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__(directory, every)
        self.count, self.inception = count, inception
        self.perceptual: Perceptual | None = perceptual
        self.forget()

    def forget(self) -> None:
        self.metrics: list[EvaluationMetric] = []
        self.likeness = Likeness(self.perceptual)
        self.codes: CodeUse | None = None
        self.shown: tuple[Tensor, Tensor, list[str]] | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: Stage, stage: str) -> None:
        find_inception(self.inception)  # damaged weights are told before anything is trained

    def begin(self, trainer: lightning.Trainer, stage: Stage, split: str, outputs: dict[str, Tensor]) -> None:
        source = datamodule_of(trainer).split(split)
        features = inception_features(self.inception) or random_features()
        self.metrics = [FrechetDistance(features, prefix="r", intervals=False)]
        if split == "test" and isinstance(source, Shapes):
            self.metrics.append(JudgeAccuracy(chance=False))
        if "codes" in outputs:
            self.codes = CodeUse(stage.net.vocab_size).to(stage.device)

    def see(self, trainer: lightning.Trainer, stage: Stage, split: str, outputs: Any, batch: Batch) -> None:
        if not isinstance(outputs, dict) or "reconstruction" not in outputs:
            return
        made, image = outputs["reconstruction"], batch["image"]
        if not self.metrics:
            self.begin(trainer, stage, split, outputs)
            self.shown = image[: self.count], made[: self.count], batch["caption"][: self.count]
        items = batch["index"].tolist()
        self.likeness.update(made, image, items)
        update_all(self.metrics, made, image, batch["caption"], items)
        if self.codes is not None:
            self.codes.update(outputs["codes"])

    def tell(self, trainer: lightning.Trainer, stage: Stage, split: str) -> None:
        if not self.metrics:
            return
        found = values_of([self.likeness, *self.metrics])
        found.pop(f"rfid_random{BIASED}", None)
        table: dict[str, Any] = without_marks({k: v for k, v in found.items() if "judge" not in k})
        if "judge/all" in found:
            table["judge_reconstruction"] = found["judge/all"]
        if self.codes is not None:
            counts = self.codes.compute().cpu()
            table |= code_use(counts)
            if trainer.is_global_zero:
                log_histogram(trainer, f"{split}/codes", counts)
                if line := diagnose(counts, getattr(stage, "codebook_advice", "")):
                    log.warning(line)
        stage.log_dict({f"{split}/{key}": value for key, value in table.items()}, rank_zero_only=True)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Stage,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.see(trainer, pl_module, "val", outputs, batch)

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Stage,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.see(trainer, pl_module, "test", outputs, batch)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.tell(trainer, pl_module, "val")
        if self.shown is not None and self.take_turn(trainer) and trainer.is_global_zero:
            self.draw(trainer, "reconstruction", "reconstructions", sheet(*self.shown))
        self.forget()

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.tell(trainer, pl_module, "test")
        self.forget()


def sheet(image: Tensor, made: Tensor, captions: list[str]) -> Any:
    """A row of originals with their captions, over a row of reconstructions."""
    return grid(torch.cat((image, made)), [*captions, *[""] * len(made)], columns=len(image))


def log_histogram(trainer: lightning.Trainer, key: str, counts: Tensor) -> None:
    """Gives how often each code occurred to every logger that shows histograms."""
    bins = min(BINS, len(counts))
    edges = torch.linspace(0, len(counts), bins + 1)
    sums = torch.stack([part.sum() for part in counts.tensor_split(bins)])
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            histogram = wandb.Histogram(np_histogram=(sums.numpy(), edges.numpy()))
            logger.experiment.log({key: histogram, "trainer/global_step": trainer.global_step})
        elif isinstance(logger, TensorBoardLogger):
            ids = torch.arange(len(counts), dtype=torch.float64)
            logger.experiment.add_histogram_raw(
                key,
                min=0,
                max=len(counts),
                num=int(counts.sum()),
                sum=float((ids * counts).sum()),
                sum_squares=float((ids.square() * counts).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=sums.tolist(),
                global_step=trainer.global_step,
            )
