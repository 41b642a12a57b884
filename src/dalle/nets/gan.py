"""A text-conditional GAN: the generator draws a picture in one pass, the discriminator judges a picture and
a caption together (Miyato & Koyama 2018, "cGANs with projection discriminator").

The generator is a stack of residual blocks from a small feature map to the picture; noise and caption set
scale and shift of every norm (as in BigGAN, Brock et al. 2019), and its pixels may attend to the words. The
discriminator is its mirror without norms: a norm over the batch or the picture would mix what the gradient
penalty takes apart. Both read the caption as a frozen CLIP sees it.

What differs from the papers: the caption takes the place of a class, and the last feature map is flattened
instead of summed, so that the discriminator sees where things are.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as with_spectral_norm

from dalle.nets.blocks import Attention, GroupNorm, PixelAttention, check_sizes, linear_fp32, nearest
from dalle.nets.sizes import cut, levels_for, map_sides, padded
from dalle.ranges import Depth, Multipliers, PositiveInt, Side, Width

SLOPE = 0.2  # of the discriminator's leaky ReLUs


def pyramid(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Feature maps that suit both networks: 16 to 128 channels, the fewer the larger the map."""
    patch = given.get("patch") or 2
    levels = len(given.get("multipliers") or ()) or levels_for(image_size // patch)
    width = 32 if levels < 5 else 16
    channels = [128, 64, 32, 32, *[16] * levels][:levels]
    return {"patch": patch, "width": width, "multipliers": [max(c // width, 1) for c in reversed(channels)]}


class Caption(nn.Module):
    """A caption as one vector (B, D), the sum of CLIP's embedding and the mean word, and as its words
    (B, T, D).

    The mean word still holds what CLIP's embedding, made to tell captions apart, lost.
    """

    def __init__(self, width: int, embed_dim: int, text_width: int):
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        self.words = nn.Sequential(nn.Linear(text_width, width), nn.LayerNorm(width))
        self.mean_word = nn.Linear(width, width)

    def forward(
        self,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B T D"]]:
        words, real = self.words(text_hidden), text_mask[..., None]
        mean = (words * real).sum(1) / real.sum(1).clamp_min(1)
        return self.embed(text_embed) + self.mean_word(mean), words


class GeneratorBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), both norms modulated, with SiLU; attention behind it where `head_dim`.

    `modulation` (B, 4C): scales and shifts of both norms.
    """

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.channels = channels
        self.norm1, self.norm2 = (GroupNorm(channels, affine=False) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.attention = PixelAttention(channels, head_dim) if head_dim else None

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        modulation: Float[Tensor, "B 4*C"],
        context: Float[Tensor, "B T 2*C"] | None,
    ) -> Float[Tensor, "B C H W"]:
        scale1, shift1, scale2, shift2 = modulation.chunk(4, dim=1)
        h = self.conv1(self.norm1(x, 1 + scale1, shift1))
        h = x + self.conv2(self.norm2(h, 1 + scale2, shift2))
        return h if self.attention is None else self.attention(h, context)


class Generator(nn.Module):
    """Noise z (B, Z) and a caption -> a picture (B, 3, image_size, image_size) in [-1, 1].

    width: channels of the largest feature map; `multipliers` give those of all, each of half the side before.
    blocks: residual blocks of each feature map.
    attention: sides of the feature maps that attend to themselves and to the words.
    condition_width: of the vector that noise and caption become.
    patch: how many times the last feature map is enlarged before the last convolution makes a picture of it.
    Raises UserError where sizes do not fit each other.
    """

    def __init__(
        self,
        image_size: Side,
        latent_dim: Width,
        width: Width,
        multipliers: Multipliers,
        blocks: Depth,
        attention: Sequence[PositiveInt],
        head_dim: Width,
        condition_width: Width,
        embed_dim: Width,
        text_width: Width,
        patch: Side,
    ):
        super().__init__()
        check_sizes(image_size, patch, width, multipliers, attention, head_dim)
        self.image_size, self.latent_dim, self.patch = image_size, latent_dim, patch
        self.embed_dim, self.text_width = embed_dim, text_width
        sides = map_sides(image_size, patch, len(multipliers))[::-1]
        widths = [width * m for m in reversed(multipliers)]

        self.caption = Caption(condition_width, embed_dim, text_width)
        self.mapping = nn.Sequential(
            nn.Linear(latent_dim + condition_width, condition_width), nn.SiLU(),
            nn.Linear(condition_width, condition_width), nn.SiLU(),
        )  # fmt: skip
        self.lowest = (widths[0], sides[0], sides[0])
        self.sketch = nn.Linear(condition_width, widths[0] * sides[0] ** 2)
        self.levels = nn.ModuleList(
            nn.ModuleList(GeneratorBlock(c, head_dim if side in attention else 0) for _ in range(blocks))
            for c, side in zip(widths, sides, strict=True)
        )
        self.grow = nn.ModuleList(nn.Conv2d(c, d, 1) for c, d in pairwise(widths))
        self.conv_norm_out = GroupNorm(widths[-1], affine=False)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        made = [m for m in self.modules() if isinstance(m, GeneratorBlock)]
        self.modulations = [4 * b.channels for b in made] + [2 * widths[-1]]
        self.keys = [2 * b.channels for b in made if b.attention is not None]
        self.modulation = nn.Linear(condition_width, sum(self.modulations))
        if self.keys:
            self.pad = nn.Parameter(torch.zeros(condition_width))
            self.context = nn.Linear(condition_width, sum(self.keys))
        self.init_weights()

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        maps = pyramid(image_size, given)
        levels = len(given.get("multipliers") or maps["multipliers"])
        sides = map_sides(image_size, maps["patch"], levels)
        return {**maps, "attention": sides[-2:][:1]}

    def init_weights(self) -> None:
        """PyTorch's defaults, but each residual branch begins at zero."""
        last: list[nn.Conv2d | nn.Linear] = [m.conv2 for m in self.modules() if isinstance(m, GeneratorBlock)]
        last += [m.out for m in self.modules() if isinstance(m, Attention)]
        for layer in last:
            for p in layer.parameters():
                nn.init.zeros_(p)

    def forward(
        self,
        z: Float[Tensor, "B Z"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B 3 H W"]:
        caption, words = self.caption(text_embed, text_hidden, text_mask)
        vector = self.mapping(torch.cat((z.to(caption.dtype), caption), dim=1))
        modulation = iter(self.modulation(vector).float().split(self.modulations, dim=1))
        if self.keys:
            words = torch.where(text_mask[..., None], words, self.pad.to(words.dtype))
        context = iter(self.context(words).split(self.keys, dim=2) if self.keys else ())

        x = self.sketch(vector).view(-1, *self.lowest).contiguous(memory_format=torch.channels_last)
        for level, blocks in enumerate(self.levels):
            if level:
                x = nearest(self.grow[level - 1](x), 2)
            for block in blocks.children():
                x = block(x, next(modulation), None if block.attention is None else next(context))
        scale, shift = next(modulation).chunk(2, dim=1)
        x = nearest(self.conv_norm_out(x, 1 + scale, shift), self.patch)
        return cut(self.conv_out(x), self.image_size).float().tanh()


class DiscriminatorBlock(nn.Module):
    """(x + conv(conv(x))) / sqrt(2) with leaky ReLUs before the convolutions, then half the side."""

    def __init__(self, channels: int, out_channels: int, shrink: bool):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.conv_out = nn.Conv2d(channels, out_channels, 1) if shrink else nn.Identity()
        self.shrink = shrink

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, SLOPE)), SLOPE))
        x = (x + h) * 0.5**0.5
        return self.conv_out(F.avg_pool2d(x, 2) if self.shrink else x)


class Discriminator(nn.Module):
    """A picture and a caption -> a logit (B,): psi(f(x)) + <e(c), f(x)> (Miyato & Koyama 2018, eq. 4).

    width, multipliers: as the generator's. features: of f and e.
    patch: k folds k x k pixels into channels at the entry; 1 leaves them.
    spectral_norm: on every kernel and matrix (Miyato et al. 2018).
    Raises UserError where sizes do not fit each other.
    """

    def __init__(
        self,
        image_size: Side,
        embed_dim: Width,
        text_width: Width,
        width: Width,
        multipliers: Multipliers,
        features: Width,
        patch: Side,
        spectral_norm: bool = False,
    ):
        super().__init__()
        widths = [width * m for m in multipliers]
        side = map_sides(image_size, patch, len(widths))[-1]
        self.patch, self.factor = patch, patch << len(widths) - 1
        self.conv_in = nn.Conv2d(3 * patch**2, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(
            *(DiscriminatorBlock(c, d, True) for c, d in pairwise(widths)),
            DiscriminatorBlock(widths[-1], widths[-1], False),
        )
        self.dense = nn.Linear(widths[-1] * side**2, features)
        self.text = Caption(features, embed_dim, text_width)
        self.direction = nn.Sequential(nn.SiLU(), nn.Linear(features, features))
        self.psi = nn.Linear(features, 1)
        self.init_weights(spectral_norm)

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        return pyramid(image_size, given)

    def init_weights(self, spectral_norm: bool) -> None:
        """He et al. 2015 for leaky ReLUs: without norms the default would let a picture fade."""
        for module in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if spectral_norm:
                with_spectral_norm(module)

    def picture(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """f(x)."""
        x = F.pixel_unshuffle(padded(image, self.factor), self.patch)
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.leaky_relu(self.blocks(self.conv_in(x)), SLOPE)
        return F.leaky_relu(self.dense(x.flatten(1)), SLOPE)

    def caption(
        self,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B F"]:
        """e(c), divided by the root of its width so that the product is of order 1."""
        return self.direction(self.text(text_embed, text_hidden, text_mask)[0]) * self.psi.in_features**-0.5

    def logits(self, picture: Float[Tensor, "B F"], caption: Float[Tensor, "B F"]) -> Float[Tensor, "B"]:
        """In fp32."""
        picture = picture.to(torch.promote_types(picture.dtype, torch.float32))
        psi = linear_fp32(picture, self.psi.weight, self.psi.bias).squeeze(1)
        return psi + (caption * picture).sum(1)

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B"]:
        return self.logits(self.picture(image), self.caption(text_embed, text_hidden, text_mask))
