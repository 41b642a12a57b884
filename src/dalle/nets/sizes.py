"""How pictures of any size become feature maps: what they are folded by, how often halved, padded and cut."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle.errors import UserError


def map_sides(image_size: int, patch: int, levels: int) -> list[int]:
    """Sides of feature maps, each half of the one before, for pictures that `padded` has made whole.

    Raises UserError where nothing of a picture would be left.
    """
    if levels < 1 or patch < 1 or (factor := patch << levels - 1) > image_size:
        raise UserError(
            f"image_size={image_size} cannot be folded by patch {patch} and then halved {levels - 1} times."
        )
    lowest = -(-image_size // factor)
    return [lowest << level for level in reversed(range(levels))]


def patch_for(image_size: int, most: int, least: int = 2) -> int:
    """The smallest power of two, of `least` or more, that leaves at most `most` places a side."""
    patch = least
    while patch * most < image_size:
        patch *= 2
    return patch


def levels_for(side: int) -> int:
    """How many feature maps there are until one has less than 8 places a side."""
    return 1 if side < 8 else 1 + levels_for(-(-side // 2))


def multipliers_for(levels: int) -> list[int]:
    """Widths of feature maps: the two largest have the first one's, the lowest always twice that."""
    return [1] * min(2, levels - 1) + [2] * max(1, levels - 2)


def padded(image: Float[Tensor, "B C h w"], factor: int) -> Float[Tensor, "B C H W"]:
    """Repeats the last row and column of pictures until `factor` divides the sides.

    So networks fold and halve pictures of any size; what they draw is cut to that size again.
    """
    below, right = (-side % factor for side in image.shape[-2:])
    return F.pad(image, (0, right, 0, below), mode="replicate") if below or right else image


def cut(image: Float[Tensor, "B C H W"], height: int, width: int | None = None) -> Float[Tensor, "B C h w"]:
    """What `padded` has added taken off again; without a width the picture is a square."""
    width = width or height
    return image if image.shape[-2:] == (height, width) else image[..., :height, :width]


def stretched(table: Float[Tensor, "B C s s"], height: int, width: int) -> Float[Tensor, "B C h w"]:
    """What a network has learned for each place of a square, for oblong pictures: it belongs to the same
    part of the picture there.
    """
    if table.shape[-2:] == (height, width):
        return table
    return F.interpolate(table, (height, width), mode="bilinear", align_corners=False)


def enlarged(low: Float[Tensor, "B 3 h w"], height: int, width: int) -> Float[Tensor, "B 3 H W"]:
    """Bicubic as Pillow has it; what every upsampler is held against."""
    return F.interpolate(low, (height, width), mode="bicubic", antialias=True, align_corners=False)
