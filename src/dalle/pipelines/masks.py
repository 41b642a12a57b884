"""Masks of pictures that are drawn anew where they are true, and windows in which a picture is extended."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dalle.data.sources import mix
from dalle.errors import UserError
from dalle.images import to_uint8

MAX_SIDE = 4096  # px that outpainting adds at a side: with windows of 32 px, four of them take days


class Sides(NamedTuple):
    """Pixels beside a picture."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0


def check_picture(image: Tensor) -> None:
    """Raises UserError for what is no picture (3, H, W) of numbers."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise UserError(
            f"a picture is (3, height, width) of floats in [-1, 1], not {tuple(image.shape)} of {image.dtype}"
        )
    if not image.isfinite().all():
        raise UserError("the picture holds values that are no finite numbers; give one without")


def check_mask(image: Float[Tensor, "3 H W"], mask: Bool[Tensor, "h w"], size: int) -> None:
    """Whether this part of this picture can be drawn by what draws pictures of `size` px.

    Raises:
        UserError: no picture, a mask of something else than true and false, another size, nothing to draw.
    """
    check_picture(image)
    if mask.dtype != torch.bool:
        raise UserError(f"a mask is true where something is to be drawn, not {mask.dtype}; give mask > 0.5")
    (height, width), (rows, columns) = image.shape[-2:], mask.shape
    if (height, width) != (size, size):
        raise UserError(f"the picture has {width} x {height} px; what draws it draws {size} x {size}")
    if (rows, columns) != (height, width):
        raise UserError(
            f"the mask has {columns} x {rows} px, but the picture {width} x {height}; give one of its size"
        )
    check_any(mask)


def check_any(mask: Bool[Tensor, "h w"]) -> None:
    """Raises UserError where there is nothing to draw."""
    if not mask.any():
        raise UserError(
            "the mask is black all over, or darker than middle gray, or white in spots too small for "
            "pictures of this size: nothing would be drawn; paint white what is to change"
        )


def pasted(
    drawn: Float[Tensor, "N 3 H W"], image: Float[Tensor, "3 H W"], mask: Bool[Tensor, "H W"]
) -> Float[Tensor, "N 3 H W"]:
    """What was drawn where the mask is true, the picture elsewhere."""
    return torch.where(mask, drawn, image)


def kept_psnr(
    drawn: Float[Tensor, "N 3 H W"], image: Float[Tensor, "3 H W"], mask: Bool[Tensor, "H W"]
) -> Float[Tensor, "N"]:
    """How well the part that is to stay did so before it was pasted: PSNR in dB of 8-bit values, where the
    mask is false. Infinite where it is the same; nan where nothing stays.
    """
    off = (to_uint8(drawn).float() - to_uint8(image).float())[..., ~mask]
    return 20 * torch.log10(255 / off.square().flatten(1).mean(1).sqrt())


def filled(image: Float[Tensor, "3 H W"], unknown: Bool[Tensor, "H W"]) -> Float[Tensor, "3 H W"]:
    """Unknown pixels become as the nearest known one in their row, or their column where a row has none.

    So what looks at a neighbourhood sees no edge there.
    """
    image = image.clone()
    _fill(image, unknown)
    _fill(image.mT, (unknown & unknown.all(dim=1, keepdim=True)).mT)
    return image


def _fill(image: Float[Tensor, "3 H W"], unknown: Bool[Tensor, "H W"]) -> None:
    """In place, along rows."""
    far = 2 * unknown.shape[1]
    place = torch.arange(unknown.shape[1]).expand_as(unknown)
    before = torch.where(unknown, -far, place).cummax(dim=1).values
    after = torch.where(unknown, far, place).flip(1).cummin(dim=1).values.flip(1)
    nearest = torch.where(place - before <= after - place, before, after)
    nearest = torch.where(unknown.all(dim=1, keepdim=True), place, nearest)
    image.copy_(image.gather(2, nearest.expand_as(image)))


def windows(shape: Sequence[int], more: Sides, size: int) -> list[tuple[int, int]]:
    """Where windows of `size` px stand (top, left) so that a picture grows by `more` from what is there.

    Args:
        shape: height and width of the picture.

    Raises:
        UserError: nothing is added, less than nothing, or the picture is smaller than a window.
    """
    height, width = shape
    if min(height, width) < size:
        raise UserError(f"the picture has {width} x {height} px, less than the {size} px that are looked at")
    if min(more) < 0 or not any(more):
        named = ", ".join(f"{name}={count}" for name, count in more._asdict().items())
        raise UserError(
            f"outpainting adds pixels at left, right, top or bottom, at least at one; got {named}"
        )
    rows = _places(height, 0, 0, size)
    beside = [(more.top + y, x) for x in _outward(width, more.left, more.right, size) for y in rows]
    columns = _places(more.left + width + more.right, 0, 0, size)
    return beside + [(y, x) for y in _outward(height, more.top, more.bottom, size) for x in columns]


def _outward(length: int, before: int, after: int, size: int) -> list[int]:
    """Starts of windows that leave the picture half a window at a time, first to its end."""
    step = size // 2
    behind = [before + length - size + min(k * step, after) for k in range(1, -(-after // step) + 1)]
    ahead = [before - min(k * step, before) for k in range(1, -(-before // step) + 1)]
    return behind + ahead


def _places(length: int, before: int, after: int, size: int) -> list[int]:
    """Starts of windows that cover a length, half a window apart."""
    last = before + length + after - size
    return [*range(0, last, size // 2), last]


def outpainted(
    inpaint: Callable[..., Float[Tensor, "1 3 S S"]],
    image: Float[Tensor, "3 H W"],
    more: Sides,
    size: int,
    n: int,
    seed: int,
) -> Float[Tensor, "N 3 h w"]:
    """The picture within `n` larger ones, h = top + H + bottom, w = left + W + right.

    A window of `size` px is shifted over it, half a window at a time: first to the left and right, then up
    and down. What it shows already is kept, and the rest drawn.

    Args:
        inpaint: called with a window, its mask, and `seed=`.

    Raises:
        UserError: no picture, nothing to add, a picture smaller than a window.
    """
    check_picture(image)
    plan = windows(image.shape[-2:], more, size)
    made = []
    for j in range(n):
        canvas = F.pad(image.cpu(), more)
        blank = F.pad(torch.zeros(image.shape[-2:], dtype=torch.bool), more, value=True)
        for number, (y, x) in enumerate(plan):
            here = slice(y, y + size), slice(x, x + size)
            unknown = blank[here]
            if not unknown.any():
                continue
            view = filled(canvas[:, *here], unknown)
            canvas[:, *here] = inpaint(view, unknown, seed=mix(seed, j, number))[0]
            blank[here] = False
        made.append(canvas)
    return torch.stack(made)
