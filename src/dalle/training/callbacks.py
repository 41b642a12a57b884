"""Side work of training: pictures, loss by timestep, throughput.

None of it is known to the stages; each callback asks only for what `Stage` promises.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from dalle.compiler import allow_variants
from dalle.data.batch import Batch
from dalle.data.datamodules import datamodule_of
from dalle.data.shapes import Shapes
from dalle.diffusion.noise import per_sample
from dalle.images import from_uint8, grid, save_png, to_uint8
from dalle.metrics.clip_score import CLIPScore, Embedder
from dalle.metrics.features import find_inception, usual_features
from dalle.metrics.fid import FrechetDistance
from dalle.metrics.judge_accuracy import JudgeAccuracy
from dalle.metrics.metric import EvaluationMetric, PictureCount, update_all, values_of, without_marks
from dalle.ranges import Depth, File, NonNegativeInt, Place, PositiveInt, Seed
from dalle.stages.base import Stage
from dalle.training.loggers import log_verdicts
from dalle.training.restorable import alike_tensors
from dalle.training.sheets import SheetCallback

log = logging.getLogger(__name__)


class SampleGrid(SheetCallback):
    """Samples the same captions with the same noise every `every` steps, as a labelled grid into
    ``samples/``.

    Only for stages that make images. The captions and conditions are those of the first validation batch.
    """

    def __init__(
        self, directory: Place, every: PositiveInt = 1000, count: PositiveInt = 16, seed: Seed = 0
    ) -> None:
        super().__init__(directory, every)
        self.count, self.seed = count, seed
        self.batch: Batch | None = None

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: Stage,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.batch is None and batch_idx == 0:
            self.batch = take(batch, self.count)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        """Here and not at the validation's end: the moving average is still in the network."""
        if self.batch is None or not pl_module.makes_images or not self.take_turn(trainer):
            return
        seeds = [self.seed + i for i in range(len(self.batch["caption"]))]
        made = pl_module.sample(
            self.batch, randn=per_sample(seeds, pl_module.device)
        )  # on all ranks: may be sharded
        if trainer.is_global_zero:
            picture = grid(datamodule_of(trainer).pictures(made), self.batch["caption"])
            self.draw(trainer, "step", "samples", picture)


class GenerationTest(lightning.Callback):
    """Tests a stage that makes images by what it makes: FID, CLIP score (where the data come with a CLIP)
    and, on `shapes`, the judge.

    Samples for the first `items` of the test split, with fixed noise, from the conditions in the batch. The
    first `rows` of them are shown with their captions and verdicts: ``samples/test.png``, and to the loggers.

    Args:
        items: how many pictures, over all ranks.
        inception: local weights of the FID Inception; without them (and none in torch's cache) it is
            `fid_clip`, or nothing without a CLIP.
        extra_metrics: of your own, see `dalle.metrics.metric`.
    """

    def __init__(
        self,
        directory: Place,
        items: PositiveInt = 128,
        seed: Seed = 0,
        inception: File | None = None,
        rows: NonNegativeInt = 64,
        extra_metrics: Sequence[EvaluationMetric] | None = None,
    ) -> None:
        self.directory, self.items, self.seed = Path(directory), items, seed
        self.inception, self.rows, self.extra_metrics = inception, rows, extra_metrics
        self.metrics: list[EvaluationMetric] = []

    def setup(self, trainer: lightning.Trainer, pl_module: Stage, stage: str) -> None:
        if pl_module.makes_images:
            find_inception(self.inception)  # damaged weights are told before anything is trained

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.shown: list[tuple[str, Tensor]] = []
        rank, ranks = trainer.global_rank, trainer.world_size
        self.room = self.items // ranks + (rank < self.items % ranks)  # items that are still to be drawn here
        self.metrics = []
        if not pl_module.makes_images:
            return
        data = datamodule_of(trainer)
        clip = data.clip.to(pl_module.device) if data.clip else None
        self.metrics = usual_metrics(clip, isinstance(data.split("test"), Shapes), self.inception)
        self.metrics += self.extra_metrics or ()
        for metric in self.metrics:
            metric.reset()

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Stage,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.room == 0 or not self.metrics:
            return
        batch = take(batch, self.room)
        items = batch["index"].tolist()
        self.room -= len(items)
        made = pl_module.sample(batch, randn=per_sample([self.seed + i for i in items], pl_module.device))
        images = datamodule_of(trainer).pictures(made)
        update_all(self.metrics, images, batch["image"], batch["caption"], items)
        left = self.rows - len(self.shown)
        self.shown += zip(batch["caption"][:left], to_uint8(images[:left]).cpu(), strict=True)

    def on_test_epoch_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        if self.metrics:
            table = without_marks(values_of(self.metrics))
            pl_module.log_dict({f"test/{key}": value for key, value in table.items()}, rank_zero_only=True)
            if trainer.is_global_zero:
                for note in (note for metric in self.metrics for note in metric.notes):
                    log.warning(note)
            if self.shown and trainer.is_global_zero:
                captions, pixels = zip(*self.shown, strict=True)
                images = from_uint8(torch.stack(pixels))
                judges = [metric.judge for metric in self.metrics if isinstance(metric, JudgeAccuracy)]
                verdicts = judges[0](images, list(captions)) if judges else {}
                picture = log_verdicts(trainer, "test/verdicts", captions, images, verdicts)
                save_png(picture, self.directory / "test.png")


def usual_metrics(
    clip: Embedder | None, judged: bool, inception: str | Path | None = None
) -> list[EvaluationMetric]:
    """What generated pictures are measured by in training: FID on Inception's features or the CLIP's, CLIP
    score, and the judge of `shapes`; and how many they are.
    """
    features = usual_features(clip, inception)
    metrics: list[EvaluationMetric] = [PictureCount()]
    metrics += [FrechetDistance(features, intervals=False)] if features else []
    metrics += [CLIPScore(clip)] if clip else []
    return metrics + ([JudgeAccuracy(chance=False)] if judged else [])


def is_logging(trainer: Any) -> bool:
    """Whether the metrics of this step are written down."""
    every = trainer.log_every_n_steps
    return every > 0 and trainer.global_step % every == 0


def take(batch: Batch, count: int) -> Batch:
    """The first `count` samples of a batch."""
    values: Any = batch
    return Batch(**{key: value[:count] for key, value in values.items()})


class LossByTime(lightning.Callback):
    """Logs the loss in equal bins of diffusion time: where in the noise a model fails, one number does not
    say.

    Reads ``per_sample`` (B,) and ``t`` (B,) of the step's output; sums stay on the device until they are
    logged.
    """

    def __init__(self, bins: Depth = 4) -> None:
        self.bins = bins
        self.sums: Tensor | None = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Stage, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not isinstance(outputs, dict) or "per_sample" not in outputs:
            return
        which = (outputs["t"] * self.bins).long().clamp(0, self.bins - 1)
        if self.sums is None:
            self.sums = torch.zeros(2, self.bins)
        self.sums = self.sums.to(which.device)
        loss = outputs["per_sample"].float()
        good = loss.isfinite()
        self.sums[0].index_add_(0, which, loss.where(good, 0))
        self.sums[1].index_add_(0, which, good.float())
        if is_logging(trainer):
            means = self.sums[0] / self.sums[1]  # nan where no time fell into
            names = [f"train/loss_t{i / self.bins:.2f}-{(i + 1) / self.bins:.2f}" for i in range(self.bins)]
            pl_module.log_dict(dict(zip(names, means, strict=True)))
            self.sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def fits(self, state: dict[str, Any], pl_module: Stage) -> bool:
        """Whether a saved state has as many bins."""
        return state["sums"] is None or alike_tensors(state["sums"], torch.zeros(2, self.bins))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sums = state_dict["sums"]


class Throughput(lightning.Callback):
    """Logs training samples per second over all ranks, validation and pictures left out; how many processor
    cores this process keeps busy (those of workers that load data not counted); and on a GPU the most memory
    that was in use.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.samples, self.started, self.worked = 0, 0.0, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.started:
            self.started, self.worked = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Stage, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.samples += len(batch["caption"]) * trainer.world_size
        if is_logging(trainer):
            seconds = time.perf_counter() - self.started
            pl_module.log("train/samples_per_second", self.samples / seconds)
            pl_module.log("train/cpu_cores", (time.process_time() - self.worked) / seconds)
            if pl_module.device.type == "cuda":
                pl_module.log("train/gpu_memory_gb", torch.cuda.max_memory_allocated() / 1e9)
            self.forget()

    def on_validation_start(self, *_: Any) -> None:
        self.forget()


class Compile(lightning.Callback):
    """Compiles the network for training steps, once, as their shapes never change (with `data.buckets` once
    for each shape). Validations, tests and pictures on the way have others, for which it runs as it is.

    Args:
        mode: torch.compile's; None: its usual one.
    """

    def __init__(self, mode: str | None = None) -> None:
        self.mode = mode

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        allow_variants()
        pl_module.net.compile(dynamic=False, mode=self.mode)

    def on_validation_start(self, *_: Any) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, *_: Any) -> None:
        torch.compiler.set_stance("default")

    def on_test_start(self, *_: Any) -> None:
        self.on_validation_start()

    def on_test_end(self, *_: Any) -> None:
        self.on_validation_end()

    def on_exception(self, *_: Any) -> None:
        torch.compiler.set_stance("default")


class Progress(TQDMProgressBar):
    """Lightning's bar without the version number, which says nothing. It shows what is logged when that is
    logged: numbers of every step would have to be waited for in every step.
    """

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any
    ) -> None:
        if trainer.strategy.root_device.type == "cpu" or is_logging(trainer):
            super().on_train_batch_end(trainer, pl_module, *arguments)
        else:
            self.train_progress_bar.update(arguments[-1] + 1 - self.train_progress_bar.n)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {k: v for k, v in metrics.items() if k != "v_num"}
