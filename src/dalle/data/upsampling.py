"""Batches for an upsampler: crops of large pictures in training, whole ones in validation and test, each with
the small picture that is made from it.

A crop and what spoils its small picture are functions of (seed, epoch, item): a run that is resumed sees what
an uninterrupted one would have seen, whatever the number of ranks and of workers.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dalle.data.batch import Batch
from dalle.data.buckets import Buckets
from dalle.data.datamodules import SourceDataModule
from dalle.data.degradations import Kind, degradation_of, shrunk
from dalle.data.sources import Source, SourceDataset, SourceFactory, mix
from dalle.errors import UserError
from dalle.images import from_uint8
from dalle.ranges import AutoWorkers, PositiveInt, Seed, Share, Side


class UpsamplingDataset(SourceDataset):
    """Adds `low` to the batches of a `SourceDataset`; with a seed, cuts crops and spoils the small pictures.

    Args:
        factor: how many times smaller `low` is.
        side: of the crops of a square, in pixels; the whole picture where there is no seed. Crops of other
            shapes are the same share of each side.
        buckets: shapes of the pictures; None: squares.
    """

    def __init__(
        self,
        source: Source,
        factor: int,
        side: int,
        degradation: Kind,
        seed: int | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        super().__init__(source, seed=seed, buckets=buckets)
        self.factor, self.side, self.degrade = factor, side, degradation_of(degradation)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = super().__getitems__(indices)
        if batch["image"].dtype == torch.uint8:
            batch["image"] = from_uint8(batch["image"])
        if self.seed is None:
            return Batch(**{**batch, "low": shrunk(batch["image"], self.factor)})
        epoch, items = self.split_virtual(indices)
        pairs = [self.pair(image, epoch, item) for image, item in zip(batch["image"], items, strict=True)]
        image, low = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return Batch(**{**batch, "image": image, "low": low})

    def pair(
        self, image: Float[Tensor, "3 H W"], epoch: int, item: int
    ) -> tuple[Float[Tensor, "3 S T"], Float[Tensor, "3 s t"]]:
        """A crop, which begins at a pixel of the small picture, and its small picture."""
        rng = np.random.default_rng(mix(self.seed or 0, epoch, item))
        height, width = (self.cropped(whole) for whole in image.shape[-2:])
        room = [(image.shape[1] - height) // self.factor + 1, (image.shape[2] - width) // self.factor + 1]
        top, left = (self.factor * int(start) for start in rng.integers(0, room))
        crop = image[:, top : top + height, left : left + width]
        return crop, self.degrade(crop, self.factor, rng)

    def cropped(self, whole: int) -> int:
        """A side of the crops of pictures with such a side."""
        return self.factor * max(2, round(self.side * whole / self.source.image_size / self.factor))


class UpsamplingDataModule(SourceDataModule):
    """Batches of `image`, `low`, `caption`, `index`: what an upsampler trains on.

    Args:
        factor: how many times smaller the small pictures are.
        crop: side of the crops in training, as a share of the picture's; the paper: a quarter.
        degradation: of small pictures in training: none, blur, bsr or bsr_light, see `degradations`.

    Raises:
        UserError: the factor does not divide the pictures or the crops.
    """

    oblong = "yes"

    def __init__(
        self,
        source: SourceFactory,
        batch_size: PositiveInt,
        factor: Side = 2,
        crop: Share = 0.5,
        degradation: Kind = "blur",
        num_workers: AutoWorkers = "auto",
        seed: Seed = 0,
        *,
        val_items: PositiveInt | None,
        test_items: PositiveInt | None,
        train_items: PositiveInt | None,
    ):
        super().__init__(
            source, batch_size, num_workers, seed,
            val_items=val_items, test_items=test_items, train_items=train_items,
        )  # fmt: skip
        self.factor, self.crop = factor, crop
        self.degradation: Kind = degradation

    @property
    def side(self) -> int:
        """Of the crops, in pixels."""
        size = self.split("train").image_size
        side = round(self.crop * size)
        if self.factor < 2 or size % self.factor:
            raise UserError(
                f"datamodule.factor={self.factor} makes no small pictures of {size} px; give a number from 2 "
                "that divides data.image_size"
            )
        if side % self.factor or side < 2 * self.factor:
            raise UserError(
                f"datamodule.crop={self.crop} of {size} px is {side} px, which datamodule.factor="
                f"{self.factor} must divide at least twice; give another share"
            )
        return side

    def dataset(self, name: str) -> UpsamplingDataset:
        seed = self.seed if name == "train" else None
        return UpsamplingDataset(
            self.split(name), self.factor, self.side, self.degradation, seed, self.shapes_of(name)
        )

    def suit(self, net: Any) -> None:
        """Small pictures of buckets have whole pixels, too."""
        super().suit(net)
        if self._whole:
            self._whole = math.lcm(self._whole, self.factor)

    @property
    def sizes(self) -> dict[str, int]:
        assert self.side  # refuses what does not fit
        return super().sizes | {"factor": self.factor}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"factor": self.factor}
