"""CLIP: an image tower and a text tower that meet in one embedding space (Radford et al. 2021).

Sizes, initialisation and parameter names are those of OpenAI's release, so that its weights (and open_clip's)
load unchanged. What differs: images come in [-1, 1] at any size; they are resized and normalised in here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.blocks import GroupNorm
from dalle.nets.recompute import Checkpoint, recomputed
from dalle.nets.sizes import levels_for, map_sides, padded, patch_for
from dalle.ranges import Depth, Length, PositiveInt, Side, Vocabulary, Width

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the [0, 1] pixels CLIP was trained on
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
LOGIT_SCALE_INIT = math.log(1 / 0.07)
FACTOR = 32  # of a ResNet: pixels to a position of its last feature map
EXPANSION = 4  # and a block's channels, over those within it


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): what OpenAI's weights were trained with."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Float[Tensor, "b n d"], causal: bool) -> Float[Tensor, "b n d"]:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, N, D / heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers, four times as wide between them."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm residual attention block."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)

    def forward(self, x: Float[Tensor, "b n d"], causal: bool) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. `checkpoint` recomputes each block in the backward pass to save memory."""

    def __init__(
        self, width: int, layers: int, heads: int, activation: str, causal: bool, checkpoint: Checkpoint
    ) -> None:
        super().__init__()
        self.causal, self.checkpoint = causal, checkpoint
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        for block in self.resblocks:
            if self.checkpoint and self.training:
                x = recomputed(self.checkpoint, block, x, self.causal)
            else:
                x = block(x, self.causal)
        return x


class VisionTower(nn.Module):
    """A vision transformer whose class token, normalised and projected, is the image's embedding."""

    def __init__(
        self, image_size: int, patch_size: int, width: int, embed_dim: int, transformer: Transformer
    ) -> None:
        super().__init__()
        self.patch = patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        tokens = 1 + map_sides(image_size, patch_size, 1)[0] ** 2
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b e"]:
        x = self.conv1(padded(pixels, self.patch)).flatten(2).transpose(1, 2)  # (B, patches, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class ResBlock(nn.Module):
    """Pre-norm residual block of two convolutions; the identity at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(channels), GroupNorm(channels)  # with SiLU
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        for p in self.conv2.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class ConvTower(nn.Module):
    """A small residual network, for tens of thousands of pictures, from which a transformer learns little.

    Pixels are folded `patch_size` x `patch_size` into channels; each of `layers` levels is a residual block,
    the next half as large and twice as wide. The embedding is a projection of the maximum over all positions
    (what there is, wherever) plus one of all positions (where it is). The paper's ResNets pool by attention;
    with few pictures the maximum finds shapes long before.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        embed_dim: int,
        checkpoint: Checkpoint,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        widths = [width * 2**level for level in range(layers)]
        self.fold, self.factor = patch_size, patch_size << layers - 1
        self.stem = nn.Conv2d(3 * patch_size**2, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(c) for c in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1) for c in widths[:-1])
        self.norm = GroupNorm(widths[-1])
        side = map_sides(image_size, patch_size, layers)[-1]
        self.what = nn.Linear(widths[-1], embed_dim)
        self.where = nn.Linear(widths[-1] * side**2, embed_dim)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpoint and self.training:
            return recomputed(self.checkpoint, block, x)
        return block(x)

    def forward(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b e"]:
        x = F.pixel_unshuffle(padded(pixels, self.factor), self.fold)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.run(self.blocks[0], self.stem(x))
        for shrink, block in zip(self.shrink, self.blocks[1:], strict=True):
            x = self.run(block, shrink(x))
        x = self.norm(x)
        return self.what(x.amax((2, 3))) + self.where(x.flatten(1))


class Bottleneck(nn.Module):
    """Of a `ResNetTower`: 1x1, 3x3 and 1x1 convolutions, plus the input; a stride is a mean before the last
    one of both ways.
    """

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
    """The paper's ResNets (sec. 2.4): pixels, normalised -> the image's embedding.

    Unlike a common ResNet it begins with three convolutions and a mean, takes means where others have strides
    (no convolution leaves pixels out), and ends in attention.

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
        heads = heads or max(1, last // 64)
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


class CLIP(nn.Module):
    """The two towers and the learned temperature.

    `vision` is vit, the paper's transformer on patches; conv, the `ConvTower`, whose `vision_layers` are
    levels; or resnet, the paper's `ResNetTower`, whose `vision_layers` are four numbers of blocks and whose
    `patch_size` is 32. `vision_heads` and `text_heads` are width / 64 where None, as in the paper's models.

    Raises:
        UserError: the heads do not divide the width, or there is no such tower or activation.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image_size: Side,
        patch_size: Side,
        vision_width: Width,
        vision_layers: Depth | Sequence[Depth],
        text_width: Width,
        text_layers: Depth,
        context_length: Length,
        vocab_size: Vocabulary,
        embed_dim: Width,
        text_heads: PositiveInt | None,
        vision_heads: PositiveInt | None = None,
        activation: str = "gelu",
        checkpoint: Checkpoint = False,
        vision: str = "conv",
    ) -> None:
        super().__init__()
        self.image_size, self.embed_dim = image_size, embed_dim
        self.text_width, self.context_length, self.vocab_size = text_width, context_length, vocab_size
        if vision not in ("vit", "conv", "resnet"):
            raise UserError(f"CLIP: vision is vit, conv or resnet, not {vision!r}.")
        if activation not in ("gelu", "quick_gelu"):
            raise UserError(f"CLIP: activation is gelu or quick_gelu, not {activation!r}.")
        text_heads = _heads("text", text_width, text_heads)

        if not isinstance(vision_layers, int):
            if vision != "resnet" or patch_size != FACTOR:
                raise UserError(
                    f"CLIP: a list of vision_layers is for vision=resnet with patch_size={FACTOR}."
                )
            self.visual = ResNetTower(image_size, vision_width, vision_layers, vision_heads, embed_dim)
        elif vision == "resnet":
            raise UserError(f"CLIP: vision=resnet has a list of vision_layers, not {vision_layers}.")
        elif vision == "conv":
            if vision_layers < 1:
                raise UserError(f"CLIP: a conv tower has at least one of vision_layers, not {vision_layers}.")
            self.visual = ConvTower(
                image_size, patch_size, vision_width, vision_layers, embed_dim, checkpoint
            )
        else:
            heads = _heads("vision", vision_width, vision_heads)
            tower = Transformer(vision_width, vision_layers, heads, activation, False, checkpoint)
            self.visual = VisionTower(image_size, patch_size, vision_width, embed_dim, tower)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.transformer = Transformer(text_width, text_layers, text_heads, activation, True, checkpoint)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        self._init_text()

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        if given.get("vision") == "resnet":
            return {"patch_size": FACTOR, "vision_layers": [3, 4, 6, 3]}  # ResNet-50
        if given.get("vision") == "vit":
            return {"patch_size": patch_for(image_size, most=16), "vision_layers": 3}
        patch = given.get("patch_size") or patch_for(image_size, most=32)
        return {"patch_size": patch, "vision_layers": levels_for(image_size // patch)}

    def _init_text(self) -> None:
        """The text tower's initialisation of the release; the image tower keeps PyTorch's, as there."""
        width, layers = self.text_width, len(self.transformer.resblocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)

    def encode_image(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Images in [-1, 1], resized where their size is another one -> embeddings, not normalised."""
        size = (self.image_size, self.image_size)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.visual(((image + 1) / 2 - self.pixel_mean) / self.pixel_std)

    def encode_text(
        self, text: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Ids -> the embeddings (not normalised), the states after the last norm, and which ids are real.

        The embedding is read at the end token: the largest id, up to which (included) ids are real.
        """
        if text.shape[1] > self.context_length:
            raise ValueError(f"{text.shape[1]} ids, but the context length is {self.context_length}")
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        hidden = self.ln_final(self.transformer(x))
        end = text.argmax(dim=1, keepdim=True)  # (B, 1)
        pooled = hidden.take_along_dim(end[..., None], dim=1)[:, 0]
        mask = torch.arange(text.shape[1], device=text.device) <= end
        return pooled @ self.text_projection, hidden, mask

    def forward(
        self, image: Float[Tensor, "b 3 h w"], text: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"], Float[Tensor, ""]]:
        """-> unit image embeddings, unit text embeddings, the scale of their cosines, all float32."""
        image_embed = F.normalize(self.encode_image(image).float(), dim=-1)
        text_embed = F.normalize(self.encode_text(text)[0].float(), dim=-1)
        return image_embed, text_embed, self.logit_scale.exp()


def _heads(tower: str, width: int, heads: int | None) -> int:
    heads = heads if heads is not None else max(1, width // 64)
    if width % heads:
        raise UserError(f"CLIP: {heads} heads do not divide {tower}_width {width}; set {tower}_heads.")
    return heads
