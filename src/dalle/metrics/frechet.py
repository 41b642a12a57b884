"""Frechet distance between generated and real pictures (Heusel et al. 2017, eq. 6), on two kinds of features.

`fid`: the 2015 Inception of the original, where its weights are on this machine or may be downloaded.
Pictures are resized as torch-fidelity does it (torchmetrics' default anti-aliasing gives other numbers). Any
other feature network names the
figure: `fid_clip` is the distance between image embeddings of a CLIP, and compares only with figures of the
    same CLIP. Either way: 8-bit pictures, unbiased covariances, sums in float64 which torchmetrics adds up
    over ranks.
"""

import logging
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.error import URLError

import torch
from jaxtyping import Float, UInt8
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from dalle.errors import UserError
from dalle.images import from_uint8, to_uint8

log = logging.getLogger(__name__)

INCEPTION_FILE = Path(URL_INCEPTION_V3).name
INCEPTION_HASH = "6726825d"  # of the weights file: the start of its SHA-256, as its name says


@runtime_checkable
class ImageEmbedder(Protocol):
    """What is used of a `FrozenCLIP`."""

    embed_dim: int

    def embed_image(self, image: Tensor, /) -> Tensor: ...


class FrechetDistance(FrechetInceptionDistance):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the features of real and generated pictures.

    `features` maps uint8 (B, 3, H, W) to (B, num_features). `name` is what the figure is called in tables.
    With no more pictures than features the covariances are singular and the figure is mostly bias: one line
    says so. Compare only figures of equal numbers of pictures (the bias falls like 1/N).
    """

    def __init__(self, features: nn.Module, name: str) -> None:
        super().__init__(feature=features)
        self.name = name
        self.orig_dtype = torch.float64  # of the result; torchmetrics would round it to that of the features
        self._warned = False

    def update(self, image: Float[Tensor, "B 3 H W"], real: bool) -> None:
        """Adds pictures in [-1, 1], which are quantised to the 8 bits they are saved with."""
        super().update(to_uint8(image), real)
        self.orig_dtype = torch.float64

    def compute(self) -> Float[Tensor, ""]:
        """The distance; nan with fewer than two pictures of either kind, which have no covariance."""
        pictures = int(torch.minimum(self.real_features_num_samples, self.fake_features_num_samples))
        dimensions = self.real_features_sum.numel()
        if pictures <= dimensions and not self._warned:
            self._warned = True
            _warn(
                f"{self.name}: {pictures} pictures are too few for {dimensions} features; "
                "the figure is mostly bias, compare it only with figures of as many pictures"
            )
        if pictures < 2:
            return torch.full((), torch.nan, dtype=torch.float64, device=self.device)
        return super().compute()


class CLIPFeatures(nn.Module):
    """A CLIP's image embeddings (not normalised) as features of a `FrechetDistance`.

    The CLIP stays out of the module tree: whoever owns it moves and saves it.
    """

    def __init__(self, clip: ImageEmbedder) -> None:
        super().__init__()
        self.num_features = clip.embed_dim
        self.embed_image = clip.embed_image

    def forward(self, image: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        return self.embed_image(from_uint8(image)).float()


def frechet_distance(
    clip: ImageEmbedder | None, weights: str | Path | None = None, download: bool = False
) -> FrechetDistance | None:
    """`fid` where Inception's weights can be had (see `find_inception`), else `fid_clip` by `clip` if any."""
    inception = find_inception(weights, download)
    if inception is not None:
        return FrechetDistance(inception, "fid")
    return FrechetDistance(CLIPFeatures(clip), "fid_clip") if clip else None


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{path} does not hold the FID Inception's weights ({reason}); fetch the file again"
        raise UserError(message) from error


def _download(path: Path) -> None:
    log.warning("downloading the FID Inception's weights (95 MB) to %s", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_HASH)
    except (URLError, OSError, RuntimeError) as error:
        message = f"the Inception weights could not be downloaded ({error}); give their path, or go without"
        raise UserError(message) from error


@rank_zero_only
def _warn(line: str) -> None:
    log.warning(line)
