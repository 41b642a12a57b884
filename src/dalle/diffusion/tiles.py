"""A denoiser that looks at large pictures tile by tile, where memory does not hold them whole.

Tiles overlap, and their estimates are faded into each other at every step (Bar-Tal et al. 2023,
"MultiDiffusion"): all of them share one x_t, so there are no seams to be mended at the end. The outer quarter
of an overlap is not used, for there a network sees an edge that is none.
"""

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.errors import UserError


def starts(size: int, tile: int, overlap: int, step: int = 1) -> list[int]:
    """Where tiles begin along a side of `size`, all at multiples of `step`; the last one reaches the end."""
    if tile >= size:
        return [0]
    stride = (tile - overlap) // step * step
    found = [0]
    while found[-1] + tile < size:
        found.append(min(found[-1] + stride, -(-(size - tile) // step) * step))
    return found


def window(start: int, end: int, size: int, overlap: int) -> Float[Tensor, "N"]:
    """Weights of the places start .. end - 1 of a side: 1 inside, down to 0 towards the neighbours."""
    margin = overlap // 4
    place = torch.arange(start, end) + 0.5
    weight = torch.ones(end - start)
    for edge, distance in ((start > 0, place - start), (end < size, end - place)):
        if edge:
            weight *= ((distance - margin) / (overlap - 2 * margin)).clamp(0, 1)
    return weight


def overlap_of(tile: int, step: int = 1) -> int:
    """How much two tiles of this side overlap, a quarter of it, where a network takes sides of `step`.

    Raises:
        UserError: tiles that are no larger than their overlap or than a step.
    """
    return check_overlap(tile, max(4, tile // 4), step)


def check_overlap(tile: int, overlap: int, step: int) -> int:
    """The overlap, if tiles can have it; else raises UserError."""
    if tile - overlap < step or overlap < 4:
        raise UserError(f"tile={tile} with an overlap of {overlap} is too small: tiles need {overlap + step}")
    return overlap


def tiled(
    denoise: Callable[..., Tensor],
    low: Float[Tensor, "B 3 h w"],
    tile: int,
    overlap: int | None = None,
    step: int = 1,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`denoise(x_t, t, low=...)` of whole pictures as one of tiles, with the part of `low` that belongs to
    each.

    Args:
        tile: side in pixels; pictures that are no larger stay whole.
        overlap: of two tiles; None: a quarter of their side.
        step: tiles begin at its multiples, as the network's foldings and halvings do.

    Raises:
        UserError: tiles that are no larger than their overlap or than a step of the network.
    """
    overlap = overlap_of(tile, step) if overlap is None else check_overlap(tile, overlap, step)

    @cache
    def weight_of(
        rows: tuple[int, int, int], columns: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Float[Tensor, "h w"]:
        """Of a tile; made once, for what comes from the host waits for all steps before."""
        return torch.outer(window(*rows, overlap), window(*columns, overlap)).to(device, dtype)

    def whole(x: Float[Tensor, "B C H W"], t: Float[Tensor, "B"]) -> Float[Tensor, "B C H W"]:
        height, width = x.shape[-2:]
        factor = height // low.shape[-2]
        total, weights = torch.zeros_like(x), x.new_zeros(height, width)
        for top, left in product(starts(height, tile, overlap, step), starts(width, tile, overlap, step)):
            bottom, right = min(top + tile, height), min(left + tile, width)
            here = (..., slice(top, bottom), slice(left, right))
            small = low[..., top // factor : -(-bottom // factor), left // factor : -(-right // factor)]
            weight = weight_of((top, bottom, height), (left, right, width), x.dtype, x.device)
            total[here] += weight * denoise(x[here], t, low=small)
            weights[here] += weight
        return total / weights

    return whole
