"""A second decoder network: the diffusion transformer with adaLN-zero (Peebles & Xie 2023, DiT).

Differs from DiT: in the place of its class label are the conditions of DALL-E 2, sec. 2.1, the context
tokens being extra keys and values in every attention layer; one linear layer computes the modulations of
all blocks, and one their context keys and values.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.blocks import MLP, Attention, Conditioning, KnownPixels
from dalle.nets.recompute import Checkpoint, recomputed
from dalle.nets.sizes import cut, map_sides, padded, patch_for
from dalle.ranges import Depth, Dropout, Length, PositiveInt, Side, Width


def positions(
    rows: int, columns: int, width: int, device: torch.device | None = None
) -> Float[Tensor, "N D"]:
    """Fixed 2-D sinusoids: a quarter of the width each for sin and cos of row and column."""
    frequency = 10000.0 ** (-torch.arange(width // 4, device=device) / (width // 4))
    angle = torch.arange(max(rows, columns), device=device)[:, None] * frequency  # (places, D/4)
    line = torch.cat((angle.sin(), angle.cos()), dim=1)
    row, column = line[:rows, None].expand(-1, columns, -1), line[None, :columns].expand(rows, -1, -1)
    return torch.cat((row, column), dim=2).flatten(0, 1)


def modulate(
    x: Float[Tensor, "B N D"], shift: Float[Tensor, "B D"], scale: Float[Tensor, "B D"]
) -> Float[Tensor, "B N D"]:
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    """x + gate * attention(modulated norm(x)), then the same with the MLP."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, dropout=dropout)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        modulation: Float[Tensor, "B 6*D"],
        context: Float[Tensor, "B M 2*D"],
    ) -> Float[Tensor, "B N D"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        attended, _ = self.attention(modulate(self.norm(x), shift1, scale1), context)
        x = torch.addcmul(x, gate1[:, None], attended)
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(self.norm(x), shift2, scale2)))


class DiT(nn.Module):
    """x_t, t and conditions -> the prediction (B, out_channels, image_size, image_size); zero at birth.

    patch: side of the square patches that become tokens.
    checkpoint: recompute each block in the backward pass.
    inpaint: it also reads what is `known` of the picture, as `unet.UNet` does; pooled_text: as there.
    Raises UserError where heads do not divide the width.
    """

    def __init__(
        self,
        image_size: Side,
        channels: PositiveInt,
        out_channels: PositiveInt,
        patch: Side,
        width: Width,
        depth: Depth,
        heads: PositiveInt,
        embed_dim: Width,
        text_width: Width,
        image_tokens: Length = 4,
        dropout: Dropout = 0.0,
        checkpoint: Checkpoint = False,
        inpaint: bool = False,
        pooled_text: bool = True,
    ):
        super().__init__()
        if width % heads or width % 4:
            raise UserError(f"width {width} must be a multiple of heads {heads} and of 4.")
        self.image_size, self.channels, self.out_channels = image_size, channels, out_channels
        self.embed_dim, self.text_width = embed_dim, text_width
        self.patch, self.width, self.checkpoint, self.inpaint = patch, width, checkpoint, inpaint
        self.whole = patch
        self.conditioning = Conditioning(width, width, embed_dim, text_width, image_tokens, pooled_text)
        self.proj_in = nn.Linear(channels * patch**2, width)
        self.conv_known = KnownPixels(channels, width, patch, kernel=1) if inpaint else None
        (self.side,) = map_sides(image_size, patch, 1)
        self.register_buffer("position", positions(self.side, self.side, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.modulation = nn.Linear(width, (6 * depth + 2) * width)
        self.context = nn.Linear(width, 2 * depth * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, out_channels * patch**2)
        self.init_weights()

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        return {"patch": patch_for(image_size, most=16, least=4)}

    def init_weights(self) -> None:
        """DiT's: Xavier, but zero modulations and output, so that each block is the identity at birth."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.conditioning.init_weights()
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.proj_out.weight)

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
        *modulations, last = self.modulation(F.silu(vector)).split(6 * self.width, dim=1)
        contexts = self.context(context).split(2 * self.width, dim=2)

        k, (height, width) = self.patch, x.shape[-2:]
        rows, columns = -(-height // k), -(-width // k)
        x = rearrange(padded(x, k), "b c (h p) (w q) -> b (h w) (p q c)", p=k, q=k)
        square = rows == columns == self.side
        x = self.proj_in(x) + (self.position if square else positions(rows, columns, self.width, x.device))
        if self.conv_known is not None and known is not None:
            x = x + self.conv_known(padded(known, k)).flatten(2).mT
        for block, modulation, keys in zip(self.blocks, modulations, contexts, strict=True):
            if self.checkpoint and self.training:
                x = recomputed(self.checkpoint, block, x, modulation, keys)
            else:
                x = block(x, modulation, keys)
        x = self.proj_out(modulate(self.norm(x), *last.chunk(2, dim=1)))
        x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=k, q=k)
        return cut(x, height, width)
