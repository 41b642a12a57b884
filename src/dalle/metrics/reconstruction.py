"""How well an autoencoder gives pictures back, as the 8 bits they are saved with.

psnr, ssim              against the originals (dB over all pixels; mean over pictures)
rfid or rfid_random     distance of the two sets; the name says whose features: the FID Inception's, or
                        a fixed random network's, which compares only with itself
judge_reconstruction    share of pictures in which the judge of `shapes` finds all of the caption
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from dalle.images import from_uint8, to_uint8
from dalle.metrics.frechet import FrechetDistance, find_inception
from dalle.metrics.perceptual import RandomFeatures

Judge = Callable[[Tensor, list[str]], dict[str, Tensor]]


class ReconstructionMetrics:
    """Fed with batches of reconstructions, originals and captions; gives the table as a flat dict.

    A plain object: an Inception never gets into a stage's checkpoint. Sums over all ranks; every rank must
    call `compute`.

    Args:
        judge: a `Judge`, where captions are of the grammar of `shapes`.
        inception: path of the FID Inception's weights; None looks into torch.hub's cache.
    """

    def __init__(self, judge: Judge | None = None, inception: str | Path | None = None) -> None:
        features = find_inception(inception)
        if features is None:
            self.frechet = FrechetDistance(RandomFeatures(), "rfid_random")
        else:
            self.frechet = FrechetDistance(features, "rfid")
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0))
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        self.judge, self.right = judge, MeanMetric()

    def to(self, device: torch.device | str) -> "ReconstructionMetrics":
        for metric in (self.frechet, self.psnr, self.ssim, self.right):
            metric.to(device)
        return self

    @torch.no_grad()
    def update(
        self,
        reconstruction: Float[Tensor, "B 3 H W"],
        image: Float[Tensor, "B 3 H W"],
        captions: Sequence[str],
    ) -> None:
        """Adds pictures in [-1, 1] and what they were made from."""
        made, real = from_uint8(to_uint8(reconstruction)), from_uint8(to_uint8(image))
        self.psnr.update(made, real)
        self.ssim.update(made, real)
        self.frechet.update(real, real=True)
        self.frechet.update(made, real=False)
        if self.judge is not None:
            self.right.update(self.judge(made.cpu(), list(captions))["all"].to(image.device))

    def compute(self) -> dict[str, Tensor]:
        table = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}
        if (
            self.frechet.name == "rfid"
            or self.frechet.real_features_num_samples > RandomFeatures.num_features
        ):
            table[self.frechet.name] = self.frechet.compute().float()
        if self.judge is not None:
            table["judge_reconstruction"] = self.right.compute()
        return table
