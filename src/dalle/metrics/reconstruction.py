"""How well an autoencoder gives pictures back, as the 8 bits they are saved with.

psnr, ssim              against the originals, means over pictures (dB; -1 to 1)
lpips, perceptual_*     as a network sees them, where one is named: see `perceptual.py`
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dalle.images import from_uint8, to_uint8
from dalle.metrics.metric import EvaluationMetric, Rows
from dalle.metrics.perceptual import perceptual_distance

Perceptual = Literal["vgg", "effnet", "random"]
PERCEPTUAL = {"vgg": "lpips", "effnet": "perceptual_effnet", "random": "perceptual_random"}


class Likeness(EvaluationMetric):
    """`psnr`, `ssim` and, where features are named, the distance of pictures on these: each picture against
    its original.
    """

    def __init__(self, perceptual: Perceptual | None = None) -> None:
        if perceptual:
            distance_of(perceptual)  # what is missing is told now
        distance = [PERCEPTUAL[perceptual]] if perceptual else []
        self.columns = ("psnr", "ssim", *distance)
        super().__init__()
        self.perceptual: Perceptual | None = perceptual

    def update(
        self, made: Float[Tensor, "B 3 H W"], image: Float[Tensor, "B 3 H W"], items: Sequence[int]
    ) -> None:
        """Adds pictures in [-1, 1] and what they were made from."""
        self.keep(likeness(made, image, self.perceptual), items)


def likeness(
    made: Float[Tensor, "B 3 H W"], image: Float[Tensor, "B 3 H W"], perceptual: Perceptual | None = None
) -> Rows:
    """`psnr` and `ssim` (B,) of pictures in [-1, 1], and their distance on the features that are named."""
    pair = to_uint8(made).float(), to_uint8(image).float()
    noise = peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3))
    similar = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none")
    assert isinstance(similar, Tensor)
    rows = {"psnr": noise, "ssim": similar.reshape(-1)}
    if perceptual:
        with torch.autocast(made.device.type, enabled=False):
            distance = distance_of(perceptual).to(made.device)
            rows[PERCEPTUAL[perceptual]] = distance(*(from_uint8(x.byte()) for x in pair))
    return rows


@cache
def distance_of(perceptual: Perceptual) -> nn.Module:
    """Raises UserError where its weights cannot be had."""
    return perceptual_distance(features=perceptual).requires_grad_(False)
