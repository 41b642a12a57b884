"""How well large pictures were made of small ones, as the 8 bits they are saved with, beside plain bicubic.

psnr, ssim, lpips ...   against the originals: see `reconstruction.py`
consistency             root mean square difference, of 255 levels, of what was made, shrunk again, and the
                        small picture; less is better
bicubic_*               the same of the small picture enlarged by bicubic interpolation
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.data.degradations import resized, shrunk
from dalle.images import from_uint8, to_uint8
from dalle.metrics.metric import EvaluationMetric, Rows
from dalle.metrics.reconstruction import PERCEPTUAL, Perceptual, likeness


def bicubic(low: Float[Tensor, "B 3 h w"], factor: int) -> Float[Tensor, "B 3 H W"]:
    """Small pictures, enlarged without a network."""
    return resized(low, (factor * low.shape[-2], factor * low.shape[-1]), "bicubic")


def consistency(made: Float[Tensor, "B 3 H W"], low: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B"]:
    """Of pictures and the small ones they were made of."""
    again = shrunk(from_uint8(to_uint8(made)), made.shape[-1] // low.shape[-1])
    gap = to_uint8(again).float() - to_uint8(low).float()
    return gap.square().flatten(1).mean(1).sqrt()


def upsampling_rows(
    made: Float[Tensor, "B 3 H W"],
    image: Float[Tensor, "B 3 H W"],
    low: Float[Tensor, "B 3 h w"],
    perceptual: Perceptual | None = None,
) -> Rows:
    """All of the above, (B,) each."""
    plain = bicubic(low, image.shape[-1] // low.shape[-1])
    rows: Rows = {}
    for prefix, some in (("", made), ("bicubic_", plain)):
        found = {**likeness(some, image, perceptual), "consistency": consistency(some, low)}
        rows |= {prefix + name: values for name, values in found.items()}
    return rows


class UpsamplingLikeness(EvaluationMetric):
    """Means of `upsampling_rows` over pictures; `perceptual` names features of a further distance."""

    def __init__(self, perceptual: Perceptual | None = None) -> None:
        names = ("psnr", "ssim", *([PERCEPTUAL[perceptual]] if perceptual else []), "consistency")
        self.columns = (*names, *(f"bicubic_{name}" for name in names))
        super().__init__()
        self.perceptual: Perceptual | None = perceptual

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]: it looks at three pictures
        self,
        made: Float[Tensor, "B 3 H W"],
        image: Float[Tensor, "B 3 H W"],
        low: Float[Tensor, "B 3 h w"],
        items: Sequence[int],
    ) -> None:
        """Adds pictures in [-1, 1], their originals and the small ones."""
        with torch.autocast(made.device.type, enabled=False):
            rows = upsampling_rows(made.float(), image.float(), low.float(), self.perceptual)
        self.keep(rows, items)
