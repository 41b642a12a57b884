"""Aspect-ratio buckets: pictures keep their shape, and every batch holds pictures of one shape.

Shapes have about as many pixels as the square, and sides that the network need not pad. Which picture goes
where follows from the pictures alone and from how many a step takes, so all ranks and workers agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, int]  # height and width

LONGEST = 2.0  # of the longer side over the shorter; of longer pictures the middle is taken
SPARE = 0.15  # more or fewer pixels than the square has
STEPS = 16  # a side changes by no less than such a part of the square's, or there would be too many shapes


def shapes(image_size: int, whole: int) -> list[Shape]:
    """From upright to wide, with the square of `image_size` among them.

    Args:
        whole: sides of the others are multiples of it.
    """
    while whole * STEPS < image_size:
        whole *= 2
    area, found = image_size**2, {(image_size, image_size)}
    for short in range(whole, image_size, whole):
        long = round(area / short / whole) * whole
        if short < long <= LONGEST * short and abs(short * long / area - 1) <= SPARE:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda shape: shape[1] / shape[0])


def nearest(aspects: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """For each width over height (n,), the number of the shape of which least is cut off."""
    sides = np.array(shapes, np.float64)
    return np.abs(np.log(aspects)[:, None] - np.log(sides[:, 1] / sides[:, 0])).argmin(1)


def with_enough(aspects: np.ndarray, shapes: Sequence[Shape], least: int) -> list[Shape]:
    """The shapes that so many pictures are nearest to, when those of the others go to what is left."""
    left = list(shapes)
    while len(left) > 1:
        counts = np.bincount(nearest(aspects, left), minlength=len(left))
        if counts.min() >= least:
            break
        del left[int(counts.argmin())]
    return left


@dataclass(frozen=True, eq=False)
class Buckets:
    """The shapes, and the number of each item's."""

    shapes: list[Shape]
    numbers: np.ndarray

    def shape(self, item: int) -> Shape:
        return self.shapes[int(self.numbers[item])]

    def told(self, items: int) -> str:
        """How many of the first so many items are in each."""
        counts = np.bincount(self.numbers[:items], minlength=len(self.shapes)).tolist()
        parts = [f"{w}x{h} ({n:,})" for (h, w), n in zip(self.shapes, counts, strict=True)]
        return ", ".join(parts)
