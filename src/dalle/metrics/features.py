"""Networks whose features pictures are compared by; each names the figures made of it, and its weights.

Inception's are called `fid`, `kid` ...; all others `fid_<name>`, and compare with nothing but themselves.
Inception is the 2015 one of Heusel et al. 2017, and resizes as torch-fidelity does it (torchmetrics' default
anti-aliasing gives other numbers).
"""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.error import URLError

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import NoTrainInceptionV3

from dalle.data.frozen import weights_hash
from dalle.errors import UserError, reason
from dalle.images import from_uint8
from dalle.metrics.effnet import ARCHITECTURE, SIDE, EffNetFeatures
from dalle.metrics.perceptual import RandomFeatures

log = logging.getLogger(__name__)

INCEPTION_FILE = Path(URL_INCEPTION_V3).name
INCEPTION_HASH = "6726825d"  # of the weights file: the start of its SHA-256, as its name says


@runtime_checkable
class ImageEmbedder(Protocol):
    """What is used of a `FrozenCLIP`."""

    embed_dim: int

    def embed_image(self, image: Tensor, /) -> Tensor: ...


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
        """Where the pictures are; a CLIP stays where its owner has it."""
        return self.net.to(image.device)(image).float()

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


def inception_features(weights: str | Path | None = None, download: bool = False) -> FeatureNet | None:
    """The FID Inception, or None where its weights are not on this machine. Raises as `find_inception`."""
    net = find_inception(weights, download)
    return net and FeatureNet(net, "", "to 299 px inside, bilinear as in TensorFlow 1")


def clip_features(clip: Any, name: str = "clip") -> FeatureNet:
    """Image embeddings of a `FrozenCLIP`, not normalised."""
    resize = f"to {clip.image_size} px inside, as the CLIP does it"
    return FeatureNet(CLIPFeatures(clip), name, resize, owner=getattr(clip, "net", None))


def usual_features(clip: Any, weights: str | Path | None = None) -> FeatureNet | None:
    """Inception where its weights are (see `find_inception`), else the CLIP's image embeddings, if any."""
    return inception_features(weights) or (clip_features(clip) if clip else None)


def effnet_features() -> FeatureNet:
    """ImageNet's EfficientNet-Lite0 of an installed package. Raises as `EffNetFeatures`."""
    resize = f"to {SIDE} px inside, bicubic with antialiasing, no crop; {ARCHITECTURE}"
    return FeatureNet(EffNetFeatures(), "effnet", resize)


def random_features() -> FeatureNet:
    """A fixed random network: for tests, and where nothing trained is at hand."""
    return FeatureNet(RandomFeatures(), "random", "none")


class CLIPFeatures(nn.Module):
    """A CLIP's image embeddings (not normalised) as features.

    The CLIP stays out of the module tree: whoever owns it moves and saves it.
    """

    def __init__(self, clip: ImageEmbedder) -> None:
        super().__init__()
        self.num_features = clip.embed_dim
        self.embed_image = clip.embed_image

    def forward(self, image: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        return self.embed_image(from_uint8(image)).float()


def find_inception(weights: str | Path | None = None, download: bool = False) -> NoTrainInceptionV3 | None:
    """The FID Inception (2048 features of uint8 pictures), or None where its weights are not on this machine.

    Args:
        weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; None looks into torch.hub's
            cache.
        download: fetch the file (about 95 MB) into that cache where it is missing. Nothing is fetched
            otherwise.

    Raises:
        UserError: the file given is missing or damaged, or the download failed.
    """
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    if not path.is_file():
        if weights:
            raise UserError(f"no Inception weights at {path}; give torch-fidelity's {INCEPTION_FILE}")
        if not download:
            return None
        _download(path)
    try:
        # torchmetrics unpickles whatever it is given; this reads tensors and refuses all else
        torch.load(path, map_location="cpu", weights_only=True)
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
    except Exception as error:
        message = f"{path} does not hold the FID Inception's weights ({reason(error)}); fetch the file again"
        raise UserError(message) from error


def _download(path: Path) -> None:
    log.warning("downloading the FID Inception's weights (95 MB) to %s", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_HASH)
    except (URLError, OSError, RuntimeError) as error:
        message = f"the Inception weights could not be downloaded ({error}); give their path, or go without"
        raise UserError(message) from error
