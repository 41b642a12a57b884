"""How large pictures become the small ones that an upsampler trains on (DALL-E 2, sec. 2.1 and App. C).

A decoder's pictures are not as clean as shrunk photographs, so small pictures are spoilt in training:

- `GaussianBlur`: kernel 3, sigma 0.6, as the paper has it for 64 -> 256;
- `BSR`: blur, resizing, noise and JPEG in random order, after Zhang et al. 2021 ("BSRGAN") as Rombach et al.
  2022 (latent diffusion) shortened it: what the paper uses for 256 -> 1024.

All that is random comes from the generator that is given, so a crop is a function of its seed. Pictures here
are (3, H, W) in [-1, 1], one at a time.
"""

import math
from collections.abc import Callable
from io import BytesIO
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle.ranges import Fraction, PositiveInt

Rng = np.random.Generator
Kind = Literal["none", "blur", "bsr", "bsr_light"]
Degradation = Callable[[Tensor, int, Rng], Tensor]  # a large picture -> one `factor` times smaller


def shrunk(image: Float[Tensor, "*B 3 H W"], factor: int) -> Float[Tensor, "*B 3 h w"]:
    """Bicubic and without aliases: the small pictures that nothing has spoilt, and those of tests."""
    batch = image if image.ndim == 4 else image[None]
    size = (image.shape[-2] // factor, image.shape[-1] // factor)
    return resized(batch, size, "bicubic").reshape(*image.shape[:-2], *size)


def resized(
    image: Float[Tensor, "B 3 H W"], size: tuple[int, int], mode: Literal["bilinear", "bicubic", "area"]
) -> Float[Tensor, "B 3 h w"]:
    if mode == "area":
        return F.interpolate(image, size, mode="area")
    return F.interpolate(image, size, mode=mode, antialias=True, align_corners=False).clamp(-1, 1)


def gaussian_kernel(
    size: int, sigma: tuple[float, float], angle: float = 0.0, shift: float = 0.0
) -> Float[Tensor, "k k"]:
    """Weights of a Gaussian, whose sum is 1.

    Args:
        sigma: standard deviations along its two axes, in pixels.
        angle: of the first axis to the picture's horizontal, radians.
        shift: how far its centre lies right of and below the kernel's middle.
    """
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2 - shift
    y, x = torch.meshgrid(place, place, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    weight = torch.exp(-0.5 * ((along / sigma[0]).square() + (across / sigma[1]).square()))
    return (weight / weight.sum()).float()


def blurred(image: Float[Tensor, "B 3 H W"], kernel: Float[Tensor, "k k"]) -> Float[Tensor, "B 3 H W"]:
    """Each channel by the same kernel; beyond the edges the picture goes on as it ends."""
    half = kernel.shape[-1] // 2
    padded = F.pad(image, (half,) * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, *kernel.shape), groups=3)


class GaussianBlur:
    """Shrinks, then blurs with a probability (the paper does not say which; .5 is usual)."""

    def __init__(self, kernel: PositiveInt = 3, sigma: float = 0.6, probability: Fraction = 0.5) -> None:
        self.kernel, self.probability = gaussian_kernel(kernel, (sigma, sigma)), probability

    def __call__(self, image: Float[Tensor, "3 H W"], factor: int, rng: Rng) -> Float[Tensor, "3 h w"]:
        low = shrunk(image, factor)
        return blurred(low[None], self.kernel)[0] if rng.random() < self.probability else low


class BSR:
    """Two blurs, two resizings, noise and JPEG in random order, and JPEG at the end.

    light: blurs a quarter as wide, hardly any noise, and JPEG of high quality: for pictures of few pixels.
    probability: of being spoilt at all. One that has seen no clean pictures changes those.
    """

    def __init__(self, light: bool = False, probability: Fraction = 1.0) -> None:
        self.probability = probability
        self.width = 0.25 if light else 1.0
        self.noise = (1, 2) if light else (2, 25)  # standard deviation, of 255
        self.quality = (80, 95) if light else (30, 95)

    def __call__(self, image: Float[Tensor, "3 H W"], factor: int, rng: Rng) -> Float[Tensor, "3 h w"]:
        if self.probability < 1 and rng.random() >= self.probability:
            return shrunk(image, factor)
        x = image[None]
        size = (image.shape[-2] // factor, image.shape[-1] // factor)
        if factor == 4 and rng.random() < 0.25:
            x, factor = shrunk(x, 2), 2
        order = ["blur", "blur", "shrink", "size", "noise", "jpeg"]
        order = [order[i] for i in rng.permutation(len(order))]
        first, last = sorted((order.index("shrink"), order.index("size")))
        order[first], order[last] = "shrink", "size"  # the exact size comes after any other
        for step in order:
            if step == "blur":
                x = self.blur(x, factor, rng)
            elif step == "shrink":
                x = self.shrink(x, factor, rng)
            elif step == "size":
                x = resized(x, size, _mode(rng))
            elif step == "noise":
                x = self.add_noise(x, rng)
            elif rng.random() < 0.9:
                x = self.jpeg(x, rng)
        return self.jpeg(x, rng)[0]

    def blur(self, x: Float[Tensor, "B 3 H W"], factor: int, rng: Rng) -> Float[Tensor, "B 3 H W"]:
        size = 2 * int(rng.integers(3, 13)) + 1
        if rng.random() < 0.5:
            variances = self.width * (4 + factor) * rng.random(2)
            sigma, angle = tuple(np.sqrt(variances).clip(0.1)), rng.random() * math.pi
        else:
            sigma, angle = (max(0.1, self.width * (2 + 0.2 * factor) * rng.random()),) * 2, 0.0
        return blurred(x, gaussian_kernel(size, (float(sigma[0]), float(sigma[1])), angle))

    @staticmethod
    def shrink(x: Float[Tensor, "B 3 H W"], factor: int, rng: Rng) -> Float[Tensor, "B 3 h w"]:
        """To between its own size and half of the final one, or every `factor`-th pixel of a blur."""
        if rng.random() < 0.75:
            scale = rng.uniform(1, 2 * factor)
            size = (max(1, round(x.shape[-2] / scale)), max(1, round(x.shape[-1] / scale)))
            return resized(x, size, _mode(rng))
        sigma = rng.uniform(0.1, 0.6 * factor)
        # the centre of a block of pixels lies so far from its first one
        kernel = gaussian_kernel(25, (sigma, sigma), shift=(factor - 1) / 2)
        return blurred(x, kernel)[..., ::factor, ::factor]

    def add_noise(self, x: Float[Tensor, "B 3 H W"], rng: Rng) -> Float[Tensor, "B 3 H W"]:
        """Of each channel its own, gray, or with correlated channels."""
        sigma = 2 * rng.uniform(*self.noise) / 255
        noise = rng.standard_normal((1, 3, *x.shape[-2:]))
        kind = rng.random()
        if kind < 0.4:
            noise = noise[:, :1].repeat(3, 1)
        elif kind < 0.6:
            mix = np.linalg.qr(rng.standard_normal((3, 3)))[0] * np.sqrt(rng.random(3))
            noise = np.einsum("ij,bjhw->bihw", mix, noise)
        return (x + sigma * torch.from_numpy(noise).float()).clamp(-1, 1)

    def jpeg(self, x: Float[Tensor, "B 3 H W"], rng: Rng) -> Float[Tensor, "B 3 H W"]:
        return jpeg(x[0], int(rng.integers(self.quality[0], self.quality[1] + 1)))[None]


def jpeg(image: Float[Tensor, "3 H W"], quality: int) -> Float[Tensor, "3 H W"]:
    """The picture after it was saved as JPEG."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    read = np.asarray(Image.open(file).convert("RGB")).copy()
    return torch.from_numpy(read).permute(2, 0, 1).float() / 127.5 - 1


def degradation_of(kind: Kind) -> Degradation:
    """By the names that configurations have for them."""
    if kind in ("none", "blur"):
        return GaussianBlur(probability=0.5 if kind == "blur" else 0.0)
    return BSR(light=True, probability=0.5) if kind == "bsr_light" else BSR()


def _mode(rng: Rng) -> Literal["bilinear", "bicubic", "area"]:
    return ("bilinear", "bicubic", "area")[int(rng.integers(3))]
