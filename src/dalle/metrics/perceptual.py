"""Distances between pictures as a network sees them: LPIPS, or of its form where its weights lack.

LPIPS (Zhang et al. 2018) needs VGG16's ImageNet weights (torchvision's `vgg16-397923af.pth`); nothing is
downloaded here. `FeatureDistance` keeps its form (features of several depths, of unit length over channels,
squared differences, means over places) with no learned weights of channels: on EfficientNet-Lite0, whose
ImageNet weights come as a package (`effnet`), or on random kernels that are the same on every machine and see
edges where pixel errors see brightness, but know nothing of pictures. Figures of the three do not compare.
"""

import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from dalle.errors import UserError, reason
from dalle.finite import check_finite
from dalle.images import from_uint8
from dalle.metrics.effnet import EffNetFeatures
from dalle.ranges import File
from dalle.reading import check_file

log = logging.getLogger(__name__)

VGG_FILE = "vgg16-397923af.pth"
WIDTHS = (32, 64, 128)


class RandomFeatures(nn.Module):
    """Three levels of random 3x3 convolutions, ReLU and halving; `features` (B, 224) are their means."""

    num_features = sum(WIDTHS)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator, n_in = torch.Generator().manual_seed(seed), 3
        for level, width in enumerate(WIDTHS):
            kernel = torch.randn(width, n_in, 3, 3, generator=generator) * math.sqrt(2 / (9 * n_in))
            self.register_buffer(f"kernel_{level}", kernel)
            n_in = width

    def maps(self, image: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C h w"]]:
        out, x = [], image
        for kernel in self.buffers():
            x = F.conv2d(x, kernel, padding=1).relu()
            out.append(x)
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return out

    def forward(self, image: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Features for a Frechet distance."""
        return torch.cat([x.mean((2, 3)) for x in self.maps(from_uint8(image))], dim=1)


class FeatureDistance(nn.Module):
    """LPIPS without learned weights: (B, 3, H, W) twice, in [-1, 1] -> (B,). `features` has `maps`."""

    def __init__(self, features: Any) -> None:
        super().__init__()
        self.features = features

    def forward(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B"]:
        maps = zip(self.features.maps(a), self.features.maps(b), strict=True)
        parts = [(unit(x) - unit(y)).square().sum(1).mean((1, 2)) for x, y in maps]
        return torch.stack(parts).mean(0)


def unit(x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Vectors of unit length over channels; where all is zero, zero."""
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16, as torchmetrics computes it; the heads come with torchmetrics.

    Raises UserError where the file does not hold VGG16.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.net = _NoTrainLpips(net="vgg", pnet_rand=True)
        try:
            check_file(weights)
            saved = torch.load(weights, map_location="cpu", weights_only=True)
            # torchvision's names are features.N; LPIPS keeps the N, cut into five slices
            own = {k: saved[f"features.{k.split('.', 1)[1]}"] for k in self.net.net.state_dict()}
            check_finite(own, weights, "take another file")
            self.net.net.load_state_dict(own)
        except Exception as error:
            raise UserError(f"{weights} does not hold torchvision's VGG16 ({reason(error)})") from error
        self.eval().requires_grad_(False)

    def forward(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B"]:
        return self.net(a, b).flatten()


def perceptual_distance(
    weights: File | None = None, features: Literal["vgg", "effnet", "random"] | None = None
) -> nn.Module:
    """The distance on the features that are named; of none, LPIPS where VGG16's weights are given or in
    torch's cache, else that of the random network, said once.

    Raises:
        UserError: the file given is missing or not VGG16, or the features asked for cannot be had.
    """
    if features in ("effnet", "random"):
        if weights:
            raise UserError(f"weights={weights} are VGG16's, but features={features}; leave one of them out")
        return FeatureDistance(EffNetFeatures() if features == "effnet" else RandomFeatures())
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE)
    if path.is_file():
        return LPIPS(path)
    if weights or features:
        raise UserError(f"no VGG16 weights at {path}; give torchvision's {VGG_FILE}, or features=effnet")
    _say(
        f"no {VGG_FILE} in torch's cache: the perceptual loss is a fixed random network's, not LPIPS; "
        "model.perceptual.features=effnet has one of ImageNet"
    )
    return FeatureDistance(RandomFeatures())


@rank_zero_only
def _say(line: str) -> None:
    log.info(line)
