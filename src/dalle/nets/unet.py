"""The decoder network: the U-Net of ADM (Dhariwal & Nichol 2021) conditioned as in DALL-E 2, sec. 2.1.

Differs from ADM in four ways: pixels may be folded into channels first (`patch`), which makes small images
cheap; one linear layer computes the scales and shifts of all residual blocks, and one the context keys and
values of all attention layers; attention is joint over pixels and context, as in GLIDE; down- and
upsampling are plain convolutions unless `resample="block"` asks for ADM's residual ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.blocks import (
    Attention,
    Conditioning,
    Downsample,
    GroupNorm,
    KnownPixels,
    PixelAttention,
    ResBlock,
    Upsample,
    check_sizes,
)
from dalle.nets.recompute import Checkpoint, recomputed
from dalle.nets.sizes import cut, levels_for, map_sides, multipliers_for, padded, patch_for, stretched
from dalle.ranges import Depth, Dropout, Length, Multipliers, PositiveInt, Side, Width


class Block(nn.Module):
    """A residual block, and attention behind it where `head_dim` is not 0."""

    def __init__(
        self, in_channels: int, out_channels: int, head_dim: int, dropout: float, resample: str = ""
    ):
        super().__init__()
        self.residual = ResBlock(in_channels, out_channels, dropout, resample)
        self.attention = PixelAttention(out_channels, head_dim) if head_dim else None

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        scale: Float[Tensor, "B D"],
        shift: Float[Tensor, "B D"],
        context: Float[Tensor, "B M K"] | None,
    ) -> Float[Tensor, "B D h w"]:
        x = self.residual(x, scale, shift)
        return x if self.attention is None else self.attention(x, context)


class UNet(nn.Module):
    """x_t, t and conditions -> the prediction (B, out_channels, image_size, image_size).

    width: channels of the first level; `multipliers` give the others, `blocks` the residual blocks of each.
    attention: sides of the feature maps (after patching) that attend; the paper's 64 px decoder: (32, 16, 8).
    patch: k folds k x k pixels into channels; 1 leaves them.
    resample: "conv" (strided, nearest + conv) or "block" (ADM's residual blocks).
    positions: adds a learned embedding of every pixel of the first feature map. Small networks place things
    far sooner with it; without it the network is convolutional and may be applied at another size.
    checkpoint: recompute each block in the backward pass: less memory, a third more time.
    inpaint: it also reads `known` pictures, 0 where nothing is known, with a mask, 1 where something is
    (K = channels + 1), by further channels of the first convolution, zero at birth (GLIDE, Nichol et al.
    2021, sec. 2.4). None is the same as nothing known.
    pooled_text: the caption is also in the vector that sets the norms (`blocks.Conditioning`).
    Raises UserError where sizes do not fit each other, or for another `resample`.
    """

    def __init__(
        self,
        image_size: Side,
        channels: PositiveInt,
        out_channels: PositiveInt,
        width: Width,
        multipliers: Multipliers,
        blocks: Depth,
        attention: Sequence[PositiveInt],
        head_dim: Width,
        embed_dim: Width,
        text_width: Width,
        patch: Side,
        image_tokens: Length = 4,
        dropout: Dropout = 0.0,
        resample: str = "conv",
        positions: bool = True,
        checkpoint: Checkpoint = False,
        inpaint: bool = False,
        pooled_text: bool = True,
    ):
        super().__init__()
        self.image_size, self.channels, self.out_channels = image_size, channels, out_channels
        self.embed_dim, self.text_width = embed_dim, text_width
        self.patch, self.checkpoint, self.inpaint = patch, checkpoint, inpaint
        check_sizes(image_size, patch, width, multipliers, attention, head_dim)
        self.whole = patch << len(multipliers) - 1
        if resample not in ("conv", "block"):
            raise UserError(f"resample is 'conv' or 'block', not {resample!r}.")
        self.conditioning = Conditioning(4 * width, width, embed_dim, text_width, image_tokens, pooled_text)

        sides = map_sides(image_size, patch, len(multipliers))
        widths = [width * m for m in multipliers]
        heads = [head_dim if s in attention else 0 for s in sides]

        self.conv_in = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.conv_known = KnownPixels(channels, widths[0], patch, kernel=3) if inpaint else None
        self.positions = nn.Parameter(torch.zeros(1, widths[0], sides[0], sides[0])) if positions else None
        skips = [widths[0]]
        self.down = nn.ModuleList()
        for level, c in enumerate(widths):
            if level:
                self.down.append(
                    Downsample(skips[-1])
                    if resample == "conv"
                    else Block(skips[-1], skips[-1], 0, dropout, "down")
                )
                skips.append(skips[-1])
            for _ in range(blocks):
                self.down.append(Block(skips[-1], c, heads[level], dropout))
                skips.append(c)
        c = skips[-1]
        self.middle = nn.ModuleList([Block(c, c, head_dim, dropout), Block(c, c, 0, dropout)])
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                self.up.append(Block(c + skips.pop(), widths[level], heads[level], dropout))
                c = widths[level]
            if level:
                self.up.append(Upsample(c) if resample == "conv" else Block(c, c, 0, dropout, "up"))
        self.conv_norm_out = GroupNorm(c)
        self.conv_out = nn.Conv2d(c, out_channels * patch**2, 3, padding=1)

        made = [m for m in self.modules() if isinstance(m, Block)]
        self.scales = [b.residual.out_channels for b in made]
        self.keys = [2 * b.residual.out_channels for b in made if b.attention is not None]
        self.modulation = nn.Linear(4 * width, 2 * sum(self.scales))
        self.context = nn.Linear(4 * width, sum(self.keys))
        self.init_weights()

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        patch = given.get("patch") or patch_for(image_size, most=32)
        levels = len(given.get("multipliers") or ()) or levels_for(image_size // patch)
        return {
            "patch": patch,
            "multipliers": multipliers_for(levels),
            "attention": map_sides(image_size, patch, levels)[-2:],
        }

    def init_weights(self) -> None:
        """PyTorch's defaults, but each residual branch and the output begin at zero: net(x) == 0 at birth."""
        self.conditioning.init_weights()
        last: list[nn.Conv2d | nn.Linear] = [self.conv_out]
        last += [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        last += [m.out for m in self.modules() if isinstance(m, Attention)]
        for layer in last:
            for p in layer.parameters():
                nn.init.zeros_(p)

    def run(
        self, layer: nn.Module, x: Tensor, scales: Iterator, shifts: Iterator, contexts: Iterator
    ) -> Tensor:
        if not isinstance(layer, Block):
            return layer(x)
        given = next(scales), next(shifts), None if layer.attention is None else next(contexts)
        if self.checkpoint and self.training:
            return recomputed(self.checkpoint, layer, x, *given)
        return layer(x, *given)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        *,
        image_embed: Float[Tensor, "B E"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_image: Bool[Tensor, "B"] | None = None,
        keep_text: Bool[Tensor, "B"] | None = None,
        known: Float[Tensor, "B K H W"] | None = None,
    ) -> Float[Tensor, "B O H W"]:
        vector, context = self.conditioning(
            t, image_embed, text_embed, text_hidden, text_mask, keep_image, keep_text
        )
        scale, shift = self.modulation(F.silu(vector)).float().chunk(2, dim=1)
        scales, shifts = ((1 + scale).split(self.scales, 1), shift.split(self.scales, 1))
        contexts = self.context(context).split(self.keys, dim=2)
        given = iter(scales), iter(shifts), iter(contexts)

        height, width = x.shape[-2:]
        x = self.conv_in(F.pixel_unshuffle(padded(x, self.whole), self.patch))
        if self.conv_known is not None and known is not None:
            x = x + self.conv_known(padded(known, self.whole))
        if self.positions is not None:
            x = x + stretched(self.positions, *x.shape[-2:]).to(x.dtype)
        skips = [x]
        for layer in self.down:
            x = self.run(layer, x, *given)
            skips.append(x)
        for layer in self.middle:
            x = self.run(layer, x, *given)
        for layer in self.up:
            x = torch.cat((x, skips.pop()), dim=1) if needs_skip(layer) else x
            x = self.run(layer, x, *given)
        x = F.pixel_shuffle(self.conv_out(self.conv_norm_out(x)), self.patch)
        return cut(x, height, width)


def needs_skip(layer: nn.Module) -> bool:
    return isinstance(layer, Block) and not layer.residual.resample
