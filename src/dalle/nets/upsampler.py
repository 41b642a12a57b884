"""The network of an upsampler: the U-Net of ADM (Dhariwal & Nichol 2021) without attention and without text
(DALL-E 2, sec. 2.1 and App. C).

Convolutions and norms alone, so that it is trained on crops and drawn with at any size. The small picture is
enlarged (bicubic) and concatenated to the noised one, as in SR3 and GLIDE; the level of the noise that it was
augmented with (Ho et al. 2022, "Cascaded Diffusion Models", sec. 4.2) is embedded like the time. Differs from
ADM as `unet.py` does: pixels may be folded into channels, and one linear layer makes all scales and shifts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.blocks import Downsample, GroupNorm, ResBlock, TimeMLP, Upsample
from dalle.nets.recompute import Checkpoint, recomputed
from dalle.nets.sizes import enlarged, map_sides
from dalle.ranges import Depth, Dropout, Multipliers, PositiveInt, Side, Width


class UpsamplerUNet(nn.Module):
    """x_t, t, the small picture and the level of its noise -> the prediction, of x_t's size.

    image_size: side of the whole large pictures; factor: how many times that of the small ones.
    width: channels of the first level; `multipliers` give the others, `blocks` the residual blocks of each.
    patch: k folds k x k pixels into channels; 1 leaves them.
    resample: "conv" (strided, nearest + conv) or "block" (ADM's residual blocks).
    residual: adds the enlarged picture to the output, for prediction=x0: at birth it is the bicubic one.
    checkpoint: recompute each block in the backward pass: less memory, a third more time.
    Raises UserError where sizes do not fit each other, or for another `resample`.
    """

    def __init__(
        self,
        image_size: Side,
        factor: Side,
        channels: PositiveInt,
        out_channels: PositiveInt,
        width: Width,
        multipliers: Multipliers,
        blocks: Depth,
        patch: Side,
        dropout: Dropout = 0.0,
        resample: str = "conv",
        residual: bool = True,
        checkpoint: Checkpoint = False,
    ):
        super().__init__()
        if image_size % factor:
            raise UserError(f"factor={factor} does not divide the side of {image_size} pixels.")
        if resample not in ("conv", "block"):
            raise UserError(f"resample is 'conv' or 'block', not {resample!r}.")
        if residual and out_channels != channels:
            raise UserError(f"residual needs out_channels={channels}, not {out_channels}.")
        self.image_size, self.factor = image_size, factor
        self.channels, self.out_channels = channels, out_channels
        self.patch, self.residual, self.checkpoint = patch, residual, checkpoint
        map_sides(image_size, patch, len(multipliers))
        self.whole = patch << len(multipliers) - 1  # sides are padded to a multiple of it
        self.time, self.level = (TimeMLP(width, 4 * width) for _ in range(2))

        widths = [width * m for m in multipliers]
        self.conv_in = nn.Conv2d(2 * channels * patch**2, widths[0], 3, padding=1)
        skips = [widths[0]]
        self.down = nn.ModuleList()
        for number, c in enumerate(widths):
            if number:
                last = skips[-1]
                self.down.append(
                    Downsample(last) if resample == "conv" else ResBlock(last, last, dropout, "down")
                )
                skips.append(last)
            for _ in range(blocks):
                self.down.append(ResBlock(skips[-1], c, dropout))
                skips.append(c)
        c = skips[-1]
        self.middle = nn.ModuleList(ResBlock(c, c, dropout) for _ in range(2))
        self.up = nn.ModuleList()
        for number in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(c + skips.pop(), widths[number], dropout))
                c = widths[number]
            if number:
                self.up.append(Upsample(c) if resample == "conv" else ResBlock(c, c, dropout, "up"))
        self.conv_norm_out = GroupNorm(c)
        self.conv_out = nn.Conv2d(c, out_channels * patch**2, 3, padding=1)

        self.scales = [m.out_channels for m in self.modules() if isinstance(m, ResBlock)]
        self.modulation = nn.Linear(4 * width, 2 * sum(self.scales))
        self.init_weights()

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size: folded by the factor, each small pixel is one place."""
        return {"patch": min(given.get("factor") or 2, 4)}

    def init_weights(self) -> None:
        """PyTorch's defaults, but each residual branch and the output begin at zero."""
        for layer in [self.conv_out, *(m.conv2 for m in self.modules() if isinstance(m, ResBlock))]:
            for p in layer.parameters():
                nn.init.zeros_(p)

    def run(self, layer: nn.Module, x: Tensor, scales: Iterator, shifts: Iterator) -> Tensor:
        if not isinstance(layer, ResBlock):
            return layer(x)
        given = next(scales), next(shifts)
        if self.checkpoint and self.training:
            return recomputed(self.checkpoint, layer, x, *given)
        return layer(x, *given)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        *,
        low: Float[Tensor, "B C h w"],
        level: Float[Tensor, "B"],
    ) -> Float[Tensor, "B O H W"]:
        vector = self.time(t) + self.level(level)
        scale, shift = self.modulation(F.silu(vector)).float().chunk(2, dim=1)
        given = iter((1 + scale).split(self.scales, 1)), iter(shift.split(self.scales, 1))

        height, width = x.shape[-2:]
        base = enlarged(low.to(x.dtype), height, width)
        x = torch.cat((x, base), dim=1).contiguous(memory_format=torch.channels_last)
        more = -height % self.whole, -width % self.whole
        x = F.pad(x, (0, more[1], 0, more[0]), mode="replicate") if any(more) else x
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [x]
        for layer in self.down:
            x = self.run(layer, x, *given)
            skips.append(x)
        for layer in self.middle:
            x = self.run(layer, x, *given)
        for layer in self.up:
            skip = isinstance(layer, ResBlock) and not layer.resample
            x = torch.cat((x, skips.pop()), dim=1) if skip else x
            x = self.run(layer, x, *given)
        out = F.pixel_shuffle(self.conv_out(self.conv_norm_out(x)), self.patch)[..., :height, :width]
        return out + base.to(out.dtype) if self.residual else out
