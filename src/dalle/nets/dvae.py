"""The discrete VAE of DALL-E (Ramesh et al. 2021, sec. 2.1 and App. A): a picture as a grid of codes.

Encoder and decoder are those the authors released, with their parameter names: residual blocks without
norms, max-pooling down, nearest neighbours up. The codebook is the kernel of the decoder's first convolution,
which sees one-hot codes or, in training, a Gumbel-softmax of the encoder's logits.

What differs: sizes and the gain of the residual branches are arguments, and small networks may fold pixels
into channels and standardise the logits. Pictures go in and out in [-1, 1].
"""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.sizes import cut, map_sides, padded, patch_for
from dalle.ranges import Depth, NonNegative, Positive, Side, Vocabulary, Width

MARGIN = 0.1  # epsilon of the pixel map (App. A.3)


class Conv(nn.Module):
    """A convolution that keeps the size, with the names and the initialisation of the release."""

    def __init__(self, n_in: int, n_out: int, kernel: int):
        super().__init__()
        self.padding = kernel // 2
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) * (n_in * kernel**2) ** -0.5)
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        return F.conv2d(x, self.w, self.b, padding=self.padding)


class Block(nn.Module):
    """id(x) + gain * res(x); res is four times ReLU and convolution, a quarter as wide inside."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        self.gain = gain
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in, *[n_out // 4] * 3, n_out]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


class Sizes(NamedTuple):
    """What encoder and decoder share; see `DVAE`."""

    patch: int
    halvings: int
    blocks: int
    gain: float
    logit_gain: float | None


def group(
    n_in: int, n_out: int, sizes: Sizes, kernels: tuple[int, ...], resize: dict[str, nn.Module]
) -> nn.Sequential:
    """Blocks of one width, and what changes the size behind them."""
    made = {
        f"block_{i + 1}": Block(n_in if i == 0 else n_out, n_out, kernels, sizes.gain)
        for i in range(sizes.blocks)
    }
    return nn.Sequential(OrderedDict[str, nn.Module]({**made, **resize}))


class Encoder(nn.Module):
    """Mapped pictures (B, 3, H, W) -> logits (B, K, h, w) of the codes."""

    def __init__(self, widths: list[int], vocab_size: int, sizes: Sizes):
        super().__init__()
        self.patch = sizes.patch
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["input"] = Conv(3 * self.patch**2, widths[0], 7 if self.patch == 1 else 3)
        for g, pair in enumerate(pairwise(widths)):
            pool: dict[str, nn.Module] = {"pool": nn.MaxPool2d(2)} if g < sizes.halvings else {}
            parts[f"group_{g + 1}"] = group(*pair, sizes, (3, 3, 3, 1), pool)
        last = OrderedDict[str, nn.Module](relu=nn.ReLU(), conv=Conv(widths[-1], vocab_size, 1))
        if sizes.logit_gain is not None:
            last["norm"] = nn.BatchNorm2d(vocab_size)
            nn.init.constant_(last["norm"].weight, sizes.logit_gain)
        parts["output"] = nn.Sequential(last)
        self.blocks = nn.Sequential(parts)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K h w"]:
        x = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        x = self.blocks[:-1](x)
        with torch.autocast(x.device.type, enabled=False):  # beside the relaxation all is fp32 (App. A.1)
            return self.blocks[-1](x.float())


class Decoder(nn.Module):
    """One-hot or relaxed codes (B, K, h, w) -> means and log scales (B, 6, H, W)."""

    def __init__(self, widths: list[int], vocab_size: int, sizes: Sizes):
        super().__init__()
        self.patch = sizes.patch
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(vocab_size, widths[0], 1))
        for g, pair in enumerate(pairwise(widths)):
            grow: dict[str, nn.Module] = (
                {"upsample": nn.Upsample(scale_factor=2.0)} if g < sizes.halvings else {}
            )
            parts[f"group_{g + 1}"] = group(*pair, sizes, (1, 3, 3, 3), grow)
        last = OrderedDict[str, nn.Module](relu=nn.ReLU(), conv=Conv(widths[-1], 6 * self.patch**2, 1))
        parts["output"] = nn.Sequential(last)
        self.blocks = nn.Sequential(parts)

    def forward(self, z: Float[Tensor, "B K h w"]) -> Float[Tensor, "B 6 H W"]:
        with torch.autocast(z.device.type, enabled=False):
            x = self.blocks[0](z.float())
        return self.draw(x)

    def of_codes(self, codes: Int64[Tensor, "B h w"]) -> Float[Tensor, "B 6 H W"]:
        """The same for hard codes: their columns of the first kernel are looked up, not multiplied."""
        first: Any = self.blocks[0]
        x = F.embedding(codes, first.w[:, :, 0, 0].T) + first.b
        return self.draw(x.permute(0, 3, 1, 2))

    def draw(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 6 H W"]:
        return F.pixel_shuffle(self.blocks[1:](x).float(), self.patch)


class DVAE(nn.Module):
    """Pictures to codes and back.

    Args:
        image_size: side of the pictures.
        vocab_size: K, how many codes there are.
        factor: side of a code's patch, a power of two; the grid has image_size / factor codes on a side.
        width: channels of the first group of blocks; each next group is twice as wide.
        code_dim: channels of the codebook's vectors.
        groups: of residual blocks, in the encoder and again in the decoder.
        blocks: residual blocks in a group.
        gain: of the residual branches; None: 1 / (groups * blocks)^2, as released.
        patch: fold patch x patch pixels into channels first; 1, as released, leaves them.
        logit_gain: standardise each code's logits over the batch, to begin with to this standard deviation:
            every code is then the best somewhere from the first step on, where few steps must do. None, as
            released: leave them.

    Raises:
        UserError: sizes that do not fit each other, or pictures of another size.
    """

    def __init__(
        self,
        image_size: Side,
        vocab_size: Vocabulary,
        factor: Side,
        width: Width,
        code_dim: Width,
        groups: Depth,
        blocks: Depth,
        patch: Side,
        gain: NonNegative | None = 0.5,
        logit_gain: Positive | None = 4.0,
    ):
        super().__init__()
        halvings = max(1, factor // max(1, patch)).bit_length() - 1
        if patch < 1 or factor != patch << halvings:
            raise UserError(f"factor={factor} must be patch={patch} times a power of two.")
        if halvings > groups:
            raise UserError(
                f"factor={factor} halves pictures {halvings} times, but there are {groups} groups."
            )
        if width % 4:
            raise UserError(f"width={width} must be a multiple of 4.")
        (self.grid,) = map_sides(image_size, factor, 1)
        self.image_size, self.vocab_size, self.factor = image_size, vocab_size, factor
        gain = (groups * blocks) ** -2 if gain is None else gain
        sizes = Sizes(patch, halvings, blocks, gain, logit_gain)
        widths = [width << g for g in range(groups)]
        self.encoder = Encoder([width, *widths], vocab_size, sizes)
        self.decoder = Decoder([code_dim, *reversed(widths)], vocab_size, sizes)

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        factor = given.get("factor") or patch_for(image_size, most=20, least=4)
        return {
            "factor": factor,
            "patch": min(factor, 2 if factor <= 4 else 4),
            "width": 48 if factor <= 4 else 64,
            "vocab_size": 256 if image_size <= 32 else 512 if image_size <= 64 else 1024,
        }

    @staticmethod
    def map_pixels(image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """[-1, 1] -> [0.1, 0.9], where the likelihood's density is bounded (App. A.3)."""
        return (1 - 2 * MARGIN) * (image + 1) / 2 + MARGIN

    @staticmethod
    def unmap_pixels(y: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """(0, 1) -> [-1, 1], clipped."""
        return ((y - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1) * 2 - 1

    def forward(
        self, image: Float[Tensor, "B 3 H W"], temperature: Float[Tensor, ""]
    ) -> tuple[tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B 3 H W"]], Float[Tensor, "B K h w"]]:
        """Means and log scales from soft codes drawn at `temperature`, and the logits they come from."""
        logits = self.logits(image)
        gumbel = -torch.rand_like(logits).log().neg().log()
        soft = ((logits + gumbel) / temperature).softmax(dim=1)
        mean, ln_b = cut(self.decoder(soft), self.image_size).chunk(2, dim=1)
        return (mean, ln_b), logits

    def logits(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K h w"]:
        height, width = image.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(f"this dVAE takes pictures of {self.image_size} px, not {width} x {height}.")
        return self.encoder(padded(self.map_pixels(image), self.factor))

    def likelihood(
        self, codes: Int64[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B 3 H W"]]:
        """Means and log scales from hard codes."""
        x = self.decoder.of_codes(codes.unflatten(1, (self.grid, self.grid)))
        mean, ln_b = cut(x, self.image_size).chunk(2, dim=1)
        return mean, ln_b

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> Int64[Tensor, "B N"]:
        """The most probable codes, without noise (sec. 2.2), row by row."""
        return self.logits(image).argmax(dim=1).flatten(1)

    def decode(self, codes: Int64[Tensor, "B N"]) -> Float[Tensor, "B 3 H W"]:
        """The mean picture in [-1, 1]; the scale is left out."""
        mean, _ = self.likelihood(codes)
        return self.unmap_pixels(mean.sigmoid())
