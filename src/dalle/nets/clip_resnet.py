"""The ResNets of CLIP (Radford et al. 2021, sec. 2.4), for OpenAI's weights, whose names these are.

What differs from a common ResNet: three convolutions and a mean in place of the first one and its maximum; a
mean before each stride, so that no convolution leaves pixels out; and attention in place of the last mean.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle.errors import UserError

FACTOR = 32  # pixels to a position of the last feature map
EXPANSION = 4  # a block's channels, over those within it
HEAD = 64  # width of a head, where nothing else is said


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, plus the input; a stride is a mean before the last one of both ways."""

    def __init__(self, n_in: int, inner: int, stride: int) -> None:
        super().__init__()
        n_out = EXPANSION * inner
        self.conv1, self.bn1 = nn.Conv2d(n_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.stride, self.downsample = stride, None
        if stride > 1 or n_in != n_out:
            layers = {"0": nn.Conv2d(n_in, n_out, 1, bias=False), "1": nn.BatchNorm2d(n_out)}
            self.downsample = nn.ModuleDict(layers)

    def shrink(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.shrink(F.relu(self.bn2(self.conv2(h))))
        h = self.bn3(self.conv3(h))
        if self.downsample is not None:
            x = self.downsample["1"](self.downsample["0"](self.shrink(x)))
        return F.relu(h + x)


class AttentionPool(nn.Module):
    """The mean of all positions asks them and itself."""

    def __init__(self, side: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(side**2 + 1, width))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b e"]:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        asked = (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in asked)
        pooled = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, D / heads)
        return self.c_proj(pooled.transpose(1, 2).flatten(1))


class ResNetTower(nn.Module):
    """Pixels, normalised -> the image's embedding.

    Args:
        image_size: a multiple of 32.
        width: channels within the blocks of the first level, doubled in each further one.
        layers: blocks of each of the four levels.
        heads: of the last attention; None: 64 wide each.

    Raises:
        UserError: other than four levels, a size that is no multiple of 32, heads that do not fit.
    """

    def __init__(
        self, image_size: int, width: int, layers: Sequence[int], heads: int | None, embed_dim: int
    ) -> None:
        super().__init__()
        if len(layers) != 4 or image_size % FACTOR or width % 2:
            raise UserError(
                f"CLIP: a resnet has an even width, four numbers of layers, and pictures of a multiple of "
                f"{FACTOR} px, not {width}, {list(layers)}, {image_size}."
            )
        self.width, self.layers, last = width, list(layers), EXPANSION * 8 * width
        heads = heads or max(1, last // HEAD)
        if last % heads:
            raise UserError(f"CLIP: {heads} heads do not divide {last}; set vision_heads.")
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width // 2), nn.BatchNorm2d(width // 2)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for level, blocks in enumerate(layers):
            inner, made = width << level, list[nn.Module]()
            for i in range(blocks):
                made.append(Bottleneck(channels, inner, 2 if level and not i else 1))
                channels = EXPANSION * inner
            setattr(self, f"layer{level + 1}", nn.Sequential(*made))
        self.attnpool = AttentionPool(image_size // FACTOR, last, heads, embed_dim)
        for name, gain in self.named_parameters():
            if name.endswith("bn3.weight") and name.startswith("layer"):
                nn.init.zeros_(gain)  # each block is the identity at birth

    def forward(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b e"]:
        x = pixels
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        for level in range(1, 5):
            x = getattr(self, f"layer{level}")(x)
        return self.attnpool(x)
