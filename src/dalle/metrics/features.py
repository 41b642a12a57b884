"""Networks whose features pictures are compared by; each names the figures made of it, and its weights.

Inception's are called `fid`, `kid` ...; all others `fid_<name>`, and compare with nothing but themselves.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dalle.data.frozen import weights_hash
from dalle.metrics.effnet import ARCHITECTURE, SIDE, EffNetFeatures
from dalle.metrics.frechet import CLIPFeatures, find_inception
from dalle.metrics.perceptual import RandomFeatures


class FeatureNet:
    """A feature network with its facts; not a Module, so that the owner of a CLIP keeps it.

    Args:
        net: uint8 pictures (B, 3, H, W) -> features (B, D).
        name: "" for Inception.
        resize: how it brings pictures to its own size.
        owner: the module whose weights these are.
    """

    def __init__(self, net: nn.Module, name: str, resize: str, owner: nn.Module | None = None) -> None:
        self.net, self.name, self.resize, self.owner = net, name, resize, owner or net

    def __call__(self, image: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.net(image).float()

    def called(self, figure: str) -> str:
        """`fid` -> `fid_clip`."""
        return f"{figure}_{self.name}" if self.name else figure

    @cached_property
    def facts(self) -> dict[str, Any]:
        return {
            "network": self.name or "inception",
            "dimension": int(getattr(self.net, "num_features", 2048)),
            "resize": self.resize,
            "weights": weights_hash(self.owner),
        }

    @property
    def head(self) -> Tensor | None:
        """Inception's last layer (1008, 2048), whose logits the inception score reads; else None."""
        return None if self.name else self.owner.get_submodule("fc").get_parameter("weight")


def inception_features(weights: str | Path | None, download: bool) -> FeatureNet | None:
    """The FID Inception, or None where its weights are not on this machine. Raises as `find_inception`."""
    net = find_inception(weights, download)
    return net and FeatureNet(net, "", "to 299 px inside, bilinear as in TensorFlow 1")


def clip_features(clip: Any, name: str = "clip") -> FeatureNet:
    """Image embeddings of a `FrozenCLIP`, not normalised."""
    resize = f"to {clip.image_size} px inside, as the CLIP does it"
    return FeatureNet(CLIPFeatures(clip), name, resize, owner=clip.net)


def effnet_features() -> FeatureNet:
    """ImageNet's EfficientNet-Lite0 of an installed package. Raises as `EffNetFeatures`."""
    resize = f"to {SIDE} px inside, bicubic with antialiasing, no crop; {ARCHITECTURE}"
    return FeatureNet(EffNetFeatures(), "effnet", resize)


def random_features() -> FeatureNet:
    """A fixed random network: for tests, and where nothing trained is at hand."""
    return FeatureNet(RandomFeatures(), "random", "none")
