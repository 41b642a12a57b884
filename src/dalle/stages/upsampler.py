"""An upsampler: a large picture from a small one (DALL-E 2, sec. 2.1 and App. C).

A diffusion model on pixels that reads neither captions nor embeddings. It trains on crops, with small
pictures that were spoilt (`dalle.data.degradations`) so that it also does for those that a decoder draws. To
that end they also get noise of a level s of their own, drawn from [0, noise_max], of which the network is
told (noise conditioning augmentation, Ho et al. 2022, "Cascaded Diffusion Models", sec. 4.2):

    low_s = sqrt(1 - s^2) low + s eps
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle.data.batch import Batch
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.guidance import threshold
from dalle.diffusion.samplers import Denoise, OnStep, Randn, Sampler
from dalle.diffusion.tiles import overlap_of, tiled
from dalle.errors import UserError
from dalle.nets.interfaces import UpsamplerNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Fraction
from dalle.stages.base import Stage


def augmented(
    low: Float[Tensor, "B 3 h w"], level: Float[Tensor, "B"], noise: Float[Tensor, "B 3 h w"]
) -> Float[Tensor, "B 3 h w"]:
    """Small pictures with noise of this level, 0 to 1; their variance stays where it was 1."""
    s = level.view(-1, 1, 1, 1)
    return (1 - s.square()).sqrt() * low + s * noise


class UpsamplerStage(Stage):
    """Trains `net` to sample images (B, 3, H, W) in [-1, 1] from `low` (B, 3, h, w), H = factor h.

    Args:
        net: `nets.upsampler.UpsamplerUNet` or another `UpsamplerNet`.
        denoiser: makes the `Denoiser` around it (schedule, prediction, weighting).
        sampler: used wherever `sample` is not given one.
        noise_max: most noise that small pictures get in training.
        noise_level: what they get in validation and wherever `sample` is not told otherwise.
        thresholding: what holds estimates in [-1, 1]: none, static or dynamic.
    """

    makes_images = True

    def __init__(
        self,
        net: nn.Module,
        denoiser: Callable[[nn.Module], Denoiser],
        sampler: Sampler,
        optimizer: OptimizerFactory | None = None,
        noise_max: Fraction = 0.2,
        noise_level: Fraction = 0.0,
        thresholding: Literal["none", "static", "dynamic"] = "static",
    ) -> None:
        super().__init__(optimizer)
        check_interface(net, UpsamplerNet)
        self.denoiser, self.sampler = denoiser(net.to(memory_format=torch.channels_last)), sampler
        if noise_level > noise_max:
            raise UserError(
                f"model.noise_level={noise_level} is more noise than model.noise_max={noise_max}, which the "
                "network is trained with"
            )
        self.noise_max, self.noise_level, self.thresholding = noise_max, noise_level, thresholding

    @property
    def net(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.denoiser.net

    @property
    def low_size(self) -> int:
        """Side of the small pictures."""
        return self.net.image_size // self.net.factor

    def step(self, batch: Batch) -> dict[str, Tensor]:
        image, low = batch["image"].contiguous(memory_format=torch.channels_last), batch["low"]
        if self.training:
            level = torch.rand(len(low), device=low.device) * self.noise_max
        else:
            level = torch.full((len(low),), float(self.noise_level), device=low.device)
        low = augmented(low, level, torch.randn_like(low))
        losses, t = self.denoiser.losses(image, low=low, level=level)
        return {"loss": losses.mean(), "per_sample": losses, "t": t}

    def check(self, noise_level: float | None = None, tile: int | None = None) -> None:
        """What `sample` is told, before there are pictures to enlarge.

        Raises:
            UserError: more noise than in training, tiles that are too small.
        """
        if noise_level is not None and not 0 <= noise_level <= self.noise_max:
            raise UserError(
                f"noise_level={noise_level} is not from 0 to {self.noise_max}, the most noise that the "
                "upsampler was trained with (model.noise_max)"
            )
        if tile is not None:
            overlap_of(tile, self.net.whole)

    @torch.inference_mode()
    def sample(
        self,
        batch: Batch,
        sampler: Sampler | None = None,
        noise_level: float | None = None,
        tile: int | None = None,
        randn: Randn = torch.randn_like,
        on_step: OnStep | None = None,
        wrap: Callable[[Denoise], Denoise] | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1], `net.factor` times as large as `batch["low"]`, of whatever size that is.

        Args:
            noise_level: of noise that the small pictures get.
            tile: side of the tiles in which large pictures are looked at; None: all at once.
            wrap: puts in what is known of the images (`dalle.diffusion.restoration.given`).

        Raises:
            UserError: as `check` does.
        """
        self.check(noise_level, tile)
        low = batch["low"]
        s = self.noise_level if noise_level is None else noise_level
        level = torch.full((len(low),), float(s), device=low.device)
        if s > 0:
            low = augmented(low, level, randn(low))
        height, width = (side * self.net.factor for side in low.shape[-2:])
        noise = randn(torch.empty(len(low), self.net.channels, height, width, device=low.device))
        noise = noise.contiguous(memory_format=torch.channels_last)
        estimate = partial(self.denoiser, level=level)
        whole = tiled(estimate, low, tile, step=self.net.whole) if tile else partial(estimate, low=low)
        run = sampler or self.sampler
        denoise = threshold(whole, self.thresholding)
        denoise = wrap(denoise) if wrap else denoise
        return run(denoise, noise, self.denoiser.schedule, randn=randn, on_step=on_step).clamp(-1, 1)
