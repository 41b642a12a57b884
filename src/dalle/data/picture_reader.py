"""Pictures of a split as batches, wherever they lie: squares, crops of an epoch, a memory of what was read.

Which picture replaces one that turns out broken is a function of the data alone, so a run that is resumed
sees the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dalle.data.buckets import SPARE, Shape
from dalle.data.image_files import BROKEN, BadPicture, Fit, Memory, read, read_oblong
from dalle.data.sources import mix
from dalle.data.splits import Split
from dalle.data.text import shown
from dalle.errors import UserError
from dalle.images import from_uint8

MEMORY = 2**30  # bytes of decoded pictures kept
LONGEST = 2  # random crops are taken from the middle part of a picture, at most so many times as long as wide
NAMED = 3  # pictures named in a report


class PictureReader:
    """What sources of encoded pictures share. They say how many there are (`remember`), `picture_of(item)`,
    and for messages `called(item)` and `place`; with buckets also the `aspects` of all.
    """

    def __init__(
        self,
        split: Split,
        image_size: int,
        crop: Literal["center", "random"],
        seed: int,
        max_pixels: int,
        fit: Fit,
        buckets: bool = False,
    ) -> None:
        if buckets and crop == "random":
            raise UserError("data.crop=random cuts squares, and data.buckets=true keeps shapes; choose one")
        self.split, self.image_size, self.seed, self.max_pixels = split, image_size, seed, max_pixels
        self.fit: Fit = fit
        self.buckets = buckets
        self.random_crop = crop == "random" and split == "train"
        self.fixed = not self.random_crop

    def remember(self, items: int) -> None:
        """Makes room for so many pictures where that is little."""
        slot = 3 * self.image_size**2 * (LONGEST if self.random_crop else 1)
        self._memory = Memory(items, slot if slot * items <= MEMORY else 0)
        slot = int(3 * self.image_size**2 * (1 + SPARE)) if self.buckets else 0
        self._oblong = Memory(items, slot if slot * items <= MEMORY else 0)

    def __len__(self) -> int:
        raise NotImplementedError

    def picture_of(self, item: int) -> Path | bytes:
        """An item's file, or its bytes. Raises BadPicture."""
        raise NotImplementedError

    def called(self, item: int) -> str:
        """The item's name in messages."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        raise NotImplementedError

    @property
    def aspects(self) -> np.ndarray:
        """(n,) width over height of each picture, for buckets."""
        raise NotImplementedError

    def images(self, items: Sequence[int], epoch: int = 0) -> Float[Tensor, "b 3 s s"]:
        """(B, 3, S, S) float32 in [-1, 1]. A picture that turns out broken is replaced by the next one."""
        return from_uint8(self.pixels(items, epoch))

    def pixels(self, items: Sequence[int], epoch: int = 0) -> UInt8[Tensor, "b 3 s s"]:
        """What `images` are in files: 0..255, a quarter of the memory; channels last."""
        size = self.image_size
        batch = np.empty((len(items), size, size, 3), np.uint8)
        for row, item in zip(batch, items, strict=True):
            picture = self._picture(item)
            top, left = self._corner(picture.shape, item, epoch)
            row[:] = picture[top : top + size, left : left + size]
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    def oblong(self, items: Sequence[int], shape: Shape) -> UInt8[Tensor, "b 3 h w"]:
        """The same in another shape than the square, of the whole pictures or, by `crop`, of their middle."""
        batch = np.empty((len(items), *shape, 3), np.uint8)
        for row, item in zip(batch, items, strict=True):
            row[:] = self._shaped(item, shape)
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    def _shaped(self, item: int, shape: Shape) -> np.ndarray:
        while True:
            item = self._readable(item)
            if (kept := self._oblong.get(item)) is not None and kept.shape[:2] == shape:
                return kept
            try:
                picture = read_oblong(self.picture_of(item), *shape, self.max_pixels, self.fit)
            except BadPicture as error:
                self._give_up(item, error)
            else:
                if kept is None and picture.size <= self._oblong.slot:
                    self._oblong.put(item, picture)
                return picture

    def _picture(self, item: int) -> np.ndarray:
        """(H, W, 3) uint8, H or W = S; read from disk once where memory allows."""
        while True:
            item = self._readable(item)
            if (picture := self._memory.get(item)) is not None:
                return picture
            aspect = LONGEST if self.random_crop else 1
            try:
                content = self.picture_of(item)
                picture = read(content, self.image_size, aspect, self.max_pixels, self.fit)
            except BadPicture as error:
                self._give_up(item, error)
            else:
                self._memory.put(item, picture)
                return picture

    def _give_up(self, item: int, error: BadPicture) -> None:
        if 0 < (broken := self._memory.give_up(item)) <= NAMED:
            more = "; more of the kind are not named" if broken == NAMED else ""
            rank_zero_warn(f"{shown(self.called(item))}: {error}; another picture takes its place{more}")

    def _readable(self, item: int) -> int:
        """The item itself, or the next after it that has not turned out to be broken."""
        state = self._memory.state
        if state[item] != BROKEN:
            return item
        n = len(self)
        for other in range(item + 1, item + n):
            if state[other % n] != BROKEN:
                return other % n
        raise UserError(f"none of the {n} {self.split} pictures in {self.place} can be read any more")

    def _corner(self, shape: tuple[int, ...], item: int, epoch: int) -> tuple[int, int]:
        free = [side - self.image_size for side in shape[:2]]
        if not self.random_crop:
            return free[0] // 2, free[1] // 2
        draw = mix(self.seed, epoch, item, 1)  # 1: another draw than that of the caption
        return draw % (free[0] + 1), draw % (free[1] + 1)  # one of the two is always 0
