"""A U-Net for small pictures and few operations: the decoder network of a laptop.

Conditioned like `unet.py`, the decoder of DALL-E 2 (sec. 2.1). What differs from ADM's U-Net, so that a
picture costs a third of the operations or less:

- skips are added, not concatenated, so that the way up costs no more than the way down;
- the condition sets scale and shift of every norm, the first of a block and the last of the network too;
- a linear map of the condition is a first sketch of the picture, added to the lowest feature map as in a
  GAN's generator: without it small networks are slow to learn where things are;
- every feature map has learned positions.
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
    GroupNorm,
    KnownPixels,
    PixelAttention,
    check_sizes,
    nearest,
)
from dalle.nets.recompute import Checkpoint, recomputed
from dalle.nets.sizes import cut, levels_for, map_sides, padded, patch_for, stretched
from dalle.ranges import Depth, Dropout, Length, Multipliers, PositiveInt, Side, Width


class Block(nn.Module):
    """x + conv(norm(conv(norm(x)))), both norms modulated, with SiLU; attention behind it where `head_dim`.

    `modulation` (B, 4C): scales and shifts of both norms.
    """

    def __init__(self, channels: int, head_dim: int, dropout: float):
        super().__init__()
        self.channels = channels
        self.norm1, self.norm2 = (GroupNorm(channels, affine=False) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.attention = PixelAttention(channels, head_dim) if head_dim else None

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        modulation: Float[Tensor, "B 4*C"],
        context: Float[Tensor, "B M 2*C"] | None,
    ) -> Float[Tensor, "B C H W"]:
        scale1, shift1, scale2, shift2 = modulation.chunk(4, dim=1)
        h = self.conv1(self.norm1(x, 1 + scale1, shift1))
        h = x + self.conv2(self.dropout(self.norm2(h, 1 + scale2, shift2)))
        return h if self.attention is None else self.attention(h, context)


class SmallUNet(nn.Module):
    """x_t, t and conditions -> the prediction (B, out_channels, image_size, image_size); zero at birth.

    width: channels of the first feature map; `multipliers` give those of all, each of half the side before.
    blocks: residual blocks of each feature map, on the way down and again on the way up; in the lowest once.
    attention: sides of the feature maps (after patching) that attend to themselves and to the context.
    condition_width: of the vector that time, embeddings and caption become.
    patch: k folds k x k pixels into channels; 1 leaves them.
    checkpoint: recompute each block in the backward pass: less memory, a third more time.
    inpaint: it also reads what is `known` of the picture, as `unet.UNet` does.
    pooled_text: the caption is also in that vector (`blocks.Conditioning`).
    Raises UserError where sizes do not fit each other.
    """

    def __init__(
        self,
        image_size: Side,
        channels: PositiveInt,
        out_channels: PositiveInt,
        width: Width,
        multipliers: Multipliers,
        blocks: Sequence[Depth],
        attention: Sequence[PositiveInt],
        head_dim: Width,
        condition_width: Width,
        embed_dim: Width,
        text_width: Width,
        patch: Side,
        image_tokens: Length = 4,
        dropout: Dropout = 0.0,
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
        if len(blocks) != len(multipliers):
            raise UserError(
                f"blocks {list(blocks)} needs a number for each of multipliers {list(multipliers)}."
            )
        if not attention:
            raise UserError("attention names no feature map, but that is where the caption is read.")
        self.conditioning = Conditioning(
            condition_width, width, embed_dim, text_width, image_tokens, pooled_text
        )
        self.deepen = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, condition_width))

        sides = map_sides(image_size, patch, len(multipliers))
        widths = [width * m for m in multipliers]

        def level(i: int) -> nn.ModuleList:
            heads = head_dim if sides[i] in attention else 0
            return nn.ModuleList(Block(widths[i], heads, dropout) for _ in range(blocks[i]))

        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.conv_known = KnownPixels(channels, widths[0], patch, kernel=3) if inpaint else None
        self.positions = nn.ParameterList(
            nn.Parameter(torch.zeros(1, c, side, side)) for c, side in zip(widths, sides, strict=True)
        )
        self.down = nn.ModuleList(level(i) for i in range(lowest))
        self.shrink = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1) for i in range(lowest)
        )
        self.lowest = sides[-1]
        self.sketch = nn.Linear(condition_width, widths[-1] * self.lowest**2)
        self.middle = level(lowest)
        self.grow = nn.ModuleList(nn.Conv2d(widths[i + 1], widths[i], 1) for i in reversed(range(lowest)))
        self.up = nn.ModuleList(level(i) for i in reversed(range(lowest)))
        self.conv_norm_out = GroupNorm(widths[0], affine=False)
        self.conv_out = nn.Conv2d(widths[0], out_channels * patch**2, 3, padding=1)

        made = [m for m in self.modules() if isinstance(m, Block)]
        self.modulations = [4 * b.channels for b in made] + [2 * widths[0]]
        self.keys = [2 * b.channels for b in made if b.attention is not None]
        self.modulation = nn.Linear(condition_width, sum(self.modulations))
        self.context = nn.Linear(condition_width, sum(self.keys))
        self.init_weights()

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        patch = given.get("patch") or patch_for(image_size, most=32)
        levels = len(given.get("multipliers") or given.get("blocks") or ()) or levels_for(image_size // patch)
        return {
            "patch": patch,
            "width": 32 if patch <= 4 else 64,
            "multipliers": [1, *[2] * (levels - 1)],
            "blocks": [2 if levels <= 3 else 1, *[1] * (levels - 1)],
            "attention": map_sides(image_size, patch, levels)[-1:],
        }

    def init_weights(self) -> None:
        """PyTorch's defaults, but each residual branch and the output begin at zero: net(x) == 0 at birth."""
        self.conditioning.init_weights()
        last: list[nn.Conv2d | nn.Linear] = [self.conv_out]
        last += [m.conv2 for m in self.modules() if isinstance(m, Block)]
        last += [m.out for m in self.modules() if isinstance(m, Attention)]
        for layer in last:
            for p in layer.parameters():
                nn.init.zeros_(p)

    def run(self, blocks: nn.Module, x: Tensor, modulations: Iterator, contexts: Iterator) -> Tensor:
        for block in blocks.children():
            given = next(modulations), None if block.attention is None else next(contexts)
            if self.checkpoint and self.training:
                x = recomputed(self.checkpoint, block, x, *given)
            else:
                x = block(x, *given)
        return x

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
        vector = F.silu(vector + self.deepen(vector))
        modulation = self.modulation(vector).float().split(self.modulations, dim=1)
        given = iter(modulation), iter(self.context(context).split(self.keys, dim=2))

        height, width = x.shape[-2:]
        x = self.conv_in(F.pixel_unshuffle(padded(x, self.whole), self.patch))
        if self.conv_known is not None and known is not None:
            x = x + self.conv_known(padded(known, self.whole))
        x = x + stretched(self.positions[0], *x.shape[-2:]).to(x.dtype)
        skips = []
        for blocks, shrink, positions in zip(self.down, self.shrink, self.positions[1:], strict=True):
            x = self.run(blocks, x, *given)
            skips.append(x)
            x = shrink(x)
            x = x + stretched(positions, *x.shape[-2:]).to(x.dtype)
        sketch = self.sketch(vector).view(-1, x.shape[1], self.lowest, self.lowest)
        x = x + stretched(sketch, *x.shape[-2:]).to(x.dtype)
        x = self.run(self.middle, x, *given)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            x = nearest(grow(x), 2) + skips.pop()
            x = self.run(blocks, x, *given)
        scale, shift = modulation[-1].chunk(2, dim=1)
        x = self.conv_out(self.conv_norm_out(x, 1 + scale, shift))
        return cut(F.pixel_shuffle(x, self.patch), height, width)
