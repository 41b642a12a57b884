"""What two networks share: attention, group norm, residual blocks, MLP, time embedding, the conditioning of
the decoders.

Pads and dropped captions are never masked: they become learned tokens (DALL-E sec. 2.2, GLIDE). So every
softmax has keys to look at, and SDPA may pick its fastest kernel on every device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dalle.compiler import can_compile, compiled, compiled_for_size
from dalle.errors import UserError
from dalle.nets.sizes import map_sides

Place = int | Int64[Tensor, "1"]  # a number that the host knows, or that only the device knows


def grouped(levels: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Levels of finite scalars, given as numbers or as lists of those that belong together, as lists."""
    numbers = [n for n in levels if isinstance(n, int)]
    return [numbers] if numbers else [list(group) for group in levels if not isinstance(group, int)]


def time_embedding(t: Float[Tensor, "B"], dim: int) -> Float[Tensor, "B D"]:
    """Sinusoids of 1000 t, laid out `[cos | sin]`, frequencies 10000^(-k/half) (ADM, GLIDE)."""
    half = dim // 2
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) / half * k)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def keep_or_null(
    keep: Bool[Tensor, "B"] | None, value: Float[Tensor, "B ..."], null: Float[Tensor, "..."]
) -> Float[Tensor, "B ..."]:
    """Rows of `value` where `keep` is true, the learned `null` elsewhere.

    Without `keep` every row is kept, but the null stays in the graph: DDP wants a gradient for each
    parameter.
    """
    if keep is None:
        keep = torch.ones(len(value), dtype=torch.bool, device=value.device)
    return torch.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, null.to(value.dtype))


def linear_fp32(
    x: Float[Tensor, "*N D"], weight: Float[Tensor, "K D"], bias: Float[Tensor, "K"] | None = None
) -> Float[Tensor, "*N K"]:
    """x weight^T + bias in fp32 (or more) despite an autocast around it and weights of half precision.

    For logits: DALL-E keeps unembeddings and logits in fp32 (sec. 2.4); 8 bits tie likely codes.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def attend(
    q: Float[Tensor, "B N D"],
    kv: Float[Tensor, "B M 2*D"],
    heads: int,
    mask: Bool[Tensor, "N M"] | BlockMask | None = None,
    causal: bool = False,
) -> Float[Tensor, "B N D"]:
    """Multi-head softmax attention of `q` over the keys | values packed in `kv`."""
    q = rearrange(q, "b n (h d) -> b h n d", h=heads)
    k, v = rearrange(kv, "b m (two h d) -> two b h m d", two=2, h=heads)
    if isinstance(mask, BlockMask):
        return rearrange(flexible(q)(q, k, v, block_mask=mask), "b h n d -> b n (h d)")
    few = torch.is_grad_enabled() and q.shape[2] * k.shape[2] <= 2**16
    if few and q.device.type == "cpu" and q.dtype != torch.float32:
        # SDPA's backward on the CPU takes 4 to 10 times as long on a few tokens in bf16
        scores = (q * q.shape[3] ** -0.5) @ k.mT
        if causal:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(dim=3) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return rearrange(out, "b h n d -> b n (h d)")


def worth_skipping(x: Float[Tensor, "B N D"], heads: int) -> bool:
    """Whether there is a kernel that computes the blocks of a sparse mask alone, as there is on GPUs."""
    return x.shape[2] // heads >= 16 and can_compile(x.device)


def flexible(q: Tensor) -> Callable[..., Any]:
    """FlexAttention (Dong et al. 2024), which is a kernel once it is compiled."""
    eager = torch.compiler.is_compiling() or not q.is_cuda
    return flex_attention if eager else compiled_for_size(flex_attention)


def attend_one(
    q: Float[Tensor, "B H 1 d"],
    k: Float[Tensor, "B H M d"],
    v: Float[Tensor, "B H M d"],
    mask: Float[Tensor, "1 M"] | None,
) -> Float[Tensor, "B H 1 d"]:
    """Attention of one query for each head; the mask, as of `hidden`, is added to the scores.

    A library's kernels give a head to one processor, which leaves most of a GPU idle where there are few
    heads; a compiler spreads the sums below over all of it.
    """
    if mask is None or not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q.float() * k.float()).sum(3) * q.shape[3] ** -0.5
    weights = (scores + mask).softmax(2)
    return (weights[..., None] * v.float()).sum(2, keepdim=True).to(q.dtype)


def hidden(seen: Bool[Tensor, "*N"], dtype: torch.dtype) -> Float[Tensor, "*N"]:
    """0 where something is seen, -inf elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)


def at(table: Tensor, dim: int, place: Place) -> Tensor:
    """The entry at a place, its axis kept."""
    return table.index_select(dim, place) if isinstance(place, Tensor) else table.narrow(dim, place, 1)


def gathered(table: Tensor, dim: int, places: Int64[Tensor, "M"]) -> Tensor:
    """The entries at places. Kernels copy number by number, so here sixteen bytes are one."""
    wide = torch.complex128.itemsize
    if torch.compiler.is_compiling() or table.shape[-1] * table.itemsize % wide:
        return table.index_select(dim, places)
    return table.view(torch.complex128).index_select(dim, places).view(table.dtype)


def put(table: Tensor, dim: int, place: Place, entry: Tensor) -> None:
    """Overwrites the entry at a place."""
    if isinstance(place, Tensor):
        table.index_copy_(dim, place, entry.to(table.dtype))
    else:
        table.narrow(dim, place, 1).copy_(entry)


class StepLinear(nn.Linear):
    """A linear layer. Compiled, and where nothing is trained, its product with a single row is a sum, which
    reads the matrix as fast as memory gives it; kernels for products of matrices do not.
    """

    def forward(self, input: Float[Tensor, "*N D"]) -> Float[Tensor, "*N K"]:
        if not torch.compiler.is_compiling() or torch.is_grad_enabled() or input.shape[:-1].numel() > 1:
            return super().forward(input)
        dtype = self.weight.dtype
        out = (input.to(dtype).float()[..., None, :] * self.weight.float()).sum(-1)
        return (out if self.bias is None else out + self.bias.float()).to(dtype)


class Unembedding(nn.Linear):
    """Logits in fp32, of weights that stay so where others become bf16 (`dalle.nets.half`)."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__(width, vocabulary, bias=False)

    def forward(self, input: Float[Tensor, "*N D"]) -> Float[Tensor, "*N K"]:
        return linear_fp32(input, self.weight)


class Attention(nn.Module):
    """Self-attention that can also look at given context keys and values, as GLIDE's blocks do.

    `context` (B, M, 2D) holds keys | values that every query sees; `causal` orders the tokens of `x` only.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B M 2*D"] | None = None, causal: bool = False
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N 2*D"]]:
        """-> the attended tokens, and the keys | values of `x` for those who cache them."""
        q, own = self.qkv(x).split((self.width, 2 * self.width), dim=-1)
        if context is None:
            return self.out(attend(q, own, self.heads, causal=causal)), own
        kv = torch.cat((context.to(own.dtype), own), dim=1)
        mask = None
        if causal:  # SDPA's own causal mask starts at the first key, ours at the first own key
            mask = torch.ones(q.shape[1], kv.shape[1], dtype=torch.bool, device=q.device).tril(
                context.shape[1]
            )
        return self.out(attend(q, kv, self.heads, mask)), own


class NormSiLU(torch.autograd.Function):
    """silu(scale * groupnorm(x) + shift), or without the silu; `scale` and `shift` are (B, C) or (C,).

    A few passes in fp32, whatever x is, and nothing kept but x and numbers per channel. PyTorch's own kernel
    takes 2 to 4 times as long on channels_last bf16 on the CPU, and rounds more. The mean is taken off before
    anything is squared: E[x^2] - E[x]^2 loses the variance of numbers far from zero. On a GPU a compiler
    makes two passes of it (`fused_forward`).
    """

    @staticmethod
    def forward(ctx, x, scale, shift, groups: int, eps: float, silu: bool):
        ctx.groups, ctx.eps, ctx.silu, ctx.fused = groups, eps, silu, worth_fusing(x) and eps == EPS
        if ctx.fused:
            out, mean, rstd = compiled(fused_forward)(x, scale, shift, groups, silu)
            ctx.save_for_backward(x, scale, shift, mean, rstd)
            return out
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = group_mean(wide.mean((2, 3)), groups)
        h = centred(wide, mean, x)
        rstd = group_mean((h * h).mean((2, 3)), groups).add(eps).rsqrt()
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        torch.addcmul(pixel(shift), h, pixel(rstd * scale), out=h)  # memory in the cache beats a new tensor
        return (F.silu(h, inplace=True) if silu else h).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a penalty on gradients (R1) differentiates once more
            inputs = [s for s, wanted in zip((x, scale, shift), ctx.needs_input_grad, strict=False) if wanted]
            out = norm_silu(x, scale, shift, ctx.groups, ctx.eps, ctx.silu)
            made = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return *(next(made) if wanted else None for wanted in ctx.needs_input_grad[:3]), None, None, None
        if ctx.fused:
            saved = grad, x, scale, shift, mean, rstd
            dx, scale_grad, shift_grad = compiled(fused_backward)(*saved, ctx.groups, ctx.silu)
            return dx, scale_grad, shift_grad, None, None, None
        wide, g = (s.to(mean.dtype) for s in (x, grad))
        d, a = centred(wide, mean, x), rstd * scale
        h = torch.addcmul(pixel(shift), d, pixel(a))
        g = torch.ops.aten.silu_backward(g, h) if ctx.silu else g
        shift_grad = g.sum((2, 3))
        scale_grad = rstd * torch.mul(g, d, out=h).sum((2, 3))
        # dx = rstd (scale g - <scale g> - xhat <scale g xhat>), averages over a group, xhat = rstd d
        both = group_mean(torch.stack((scale * scale_grad, scale * shift_grad)), ctx.groups)
        p, q = -rstd / (x.shape[2] * x.shape[3]) * both
        dx = torch.addcmul(pixel(q), d, pixel(rstd * p), out=h).addcmul_(g, pixel(a)).to(x.dtype)
        if scale.ndim == 1:
            scale_grad, shift_grad = scale_grad.sum(0), shift_grad.sum(0)
        return dx, scale_grad, shift_grad, None, None, None


def norm_silu(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """What `NormSiLU` computes, in operations that autograd differentiates as often as one likes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    d = wide - pixel(group_mean(wide.mean((2, 3)), groups))
    rstd = group_mean(d.square().mean((2, 3)), groups).add(eps).rsqrt()
    h = pixel(shift) + d * pixel(rstd * scale)
    return (F.silu(h) if silu else h).to(x.dtype)


EPS = 1e-5  # of group norms


def fused_forward(
    x: Float[Tensor, "B C H W"], scale: Tensor, shift: Tensor, groups: int, silu: bool
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """What `NormSiLU` computes, and mean and 1 / standard deviation, for a compiler: it reads x once for both
    of these (Welford) and once more for the rest, with no fp32 copy of it in between.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean_of_channel = torch.var_mean(wide, (2, 3), correction=0)
    mean = spread(mean_of_channel, groups)
    rstd = (spread(variance + (mean_of_channel - mean).square(), groups) + EPS).rsqrt()
    h = (wide - pixel(mean)) * pixel(rstd * scale) + pixel(shift)
    return (F.silu(h) if silu else h).to(x.dtype), mean, rstd


def fused_backward(
    grad: Float[Tensor, "B C H W"],
    x: Float[Tensor, "B C H W"],
    scale: Tensor,
    shift: Tensor,
    mean: Float[Tensor, "B C"],
    rstd: Float[Tensor, "B C"],
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, scale and shift: x and `grad` are read twice, too."""
    normal, g = (x.to(mean.dtype) - pixel(mean)) * pixel(rstd), grad.to(mean.dtype)
    if silu:
        h = normal * pixel(scale) + pixel(shift)
        sigmoid = h.sigmoid()
        g = g * sigmoid * (1 + h * (1 - sigmoid))
    shift_grad, scale_grad = g.sum((2, 3)), (g * normal).sum((2, 3))
    level, along = (spread(scale * s, groups) / (x.shape[2] * x.shape[3]) for s in (shift_grad, scale_grad))
    dx = (g * pixel(scale) - pixel(level) - normal * pixel(along)) * pixel(rstd)
    if scale.ndim == 1:
        scale_grad, shift_grad = scale_grad.sum(0), shift_grad.sum(0)
    return dx.to(x.dtype), scale_grad, shift_grad


def spread(s: Float[Tensor, "B C"], groups: int) -> Float[Tensor, "B C"]:
    """Each entry the mean of its group: `group_mean` for any number of channels in one kernel."""
    s = s.unflatten(1, (groups, -1))
    return s.mean(2, keepdim=True).expand_as(s).flatten(1)


FEWEST = 2**20  # numbers in a feature map, below which launching kernels takes as long as they do


def worth_fusing(x: Tensor) -> bool:
    """Whether a compiler is worth its time, and there is one for this device."""
    return x.numel() >= FEWEST and can_compile(x.device)


def centred(wide: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    """wide - mean; in place where `wide` is a copy of x, not x itself."""
    return wide - pixel(mean) if wide is x else wide.sub_(pixel(mean))


def group_mean(s: Tensor, groups: int) -> Tensor:
    """(..., C) -> (..., C), each entry the mean of its group."""
    return s.unflatten(-1, (groups, -1)).mean(-1).repeat_interleave(s.shape[-1] // groups, -1)


def pixel(s: Tensor) -> Tensor:
    return s[..., None, None]


class GroupNorm(nn.Module):
    """Group norm and SiLU; scale and shift learned or given. At most 32 groups, of >= 4 channels."""

    def __init__(self, channels: int, affine: bool = True, silu: bool = True):
        super().__init__()
        self.groups, self.silu = math.gcd(32, max(channels // 4, 1), channels), silu
        if affine:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        scale: Float[Tensor, "B C"] | None = None,
        shift: Float[Tensor, "B C"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        scale, shift = (self.weight, self.bias) if scale is None or shift is None else (scale, shift)
        if x.is_cuda and torch.compiler.is_compiling():
            return fused_forward(x, scale, shift, self.groups, self.silu)[0]
        return NormSiLU.apply(x, scale, shift, self.groups, EPS, self.silu)


class PixelAttention(nn.Module):
    """x + attention of the pixels over context and pixels."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.norm = GroupNorm(channels, silu=False)
        self.attention = Attention(channels, channels // head_dim)

    def forward(
        self, x: Float[Tensor, "B C H W"], context: Float[Tensor, "B M 2*C"]
    ) -> Float[Tensor, "B C H W"]:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # a view where x is channels_last
        out, _ = self.attention(tokens, context)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class KnownPixels(nn.Conv2d):
    """What is known of pictures (B, channels + 1, H, W), 0 where nothing is, the last channel 1 where
    something is -> features (B, out, H/patch, W/patch) to add to the network's first ones; zero at birth.

    They are what further input channels of the first convolution would be (GLIDE, Nichol et al. 2021, sec.
    2.4), as a layer of its own, so that the weights of a network without it stay as they are.
    """

    def __init__(self, channels: int, out: int, patch: int, kernel: int) -> None:
        super().__init__((channels + 1) * patch**2, out, kernel, padding=kernel // 2, bias=False)
        self.patch = patch
        nn.init.zeros_(self.weight)

    def forward(self, known: Float[Tensor, "B K H W"]) -> Float[Tensor, "B O h w"]:
        return super().forward(F.pixel_unshuffle(known, self.patch))


def nearest(x: Float[Tensor, "B C h w"], factor: int) -> Float[Tensor, "B C H W"]:
    """As many times the size, in the precision of x: an autocast would make it fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=float(factor), mode="nearest")


class Downsample(nn.Conv2d):
    """Half the size by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Twice the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 2*H 2*W"]:
        return super().forward(nearest(input, 2))


class ResBlock(nn.Module):
    """norm, SiLU, (resample,) conv; norm, scale and shift, SiLU, dropout, conv; plus the input.

    `scale` and `shift` are those of the second norm ("adaGN"). `resample`: "down", "up" or "".
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, resample: str = ""):
        super().__init__()
        self.out_channels, self.resample = out_channels, resample
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def resize(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return nearest(x, 2) if self.resample == "up" else x

    def forward(
        self, x: Float[Tensor, "B C H W"], scale: Float[Tensor, "B D"], shift: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D h w"]:
        h = self.conv1(self.resize(self.norm1(x)))
        h = self.conv2(self.dropout(self.norm2(h, scale, shift)))
        return self.skip(self.resize(x)) + h


class MLP(nn.Module):
    """width -> `expand` x width -> width, GELU between."""

    def __init__(self, width: int, expand: int = 4, dropout: float = 0.0):
        super().__init__()
        self.proj_in = nn.Linear(width, expand * width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(expand * width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.out(self.dropout(F.gelu(self.proj_in(x), approximate="tanh")))


class TimeMLP(nn.Module):
    """Sinusoidal features of t through two linear layers: (B,) -> (B, width)."""

    def __init__(self, features: int, width: int):
        super().__init__()
        if features % 2:
            raise UserError(f"width {features} is not even: half of it are cosines of the time, half sines.")
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, "B"]) -> Float[Tensor, "B D"]:
        return self.mlp(time_embedding(t, self.features))


class Conditioning(nn.Module):
    """What a decoder network is told (DALL-E 2 sec. 2.1), as one vector and one sequence of context tokens.

    - vector (B, D): the sum of the time embedding and the projection of the image embedding; with
      `pooled_text` also those of caption embedding and mean text state, which still holds words that CLIP's
      embedding, made to tell captions apart, lost. They are as loud as the image embedding;
    - context (B, M + T, D): the image embedding as M extra tokens, then the projected text states.

    A dropped image or caption embedding becomes a learned null, text pads and the states of a dropped
    caption one learned token. The caption embedding is layer-normalised first, for its length carries no
    meaning in CLIP.
    """

    def __init__(
        self,
        width: int,
        features: int,
        embed_dim: int,
        text_width: int,
        image_tokens: int,
        pooled_text: bool = True,
    ):
        super().__init__()
        self.image_tokens, self.pooled_text = image_tokens, pooled_text
        self.time = TimeMLP(features, width)
        self.image_vector = nn.Linear(embed_dim, width)
        self.image_context = nn.Linear(embed_dim, image_tokens * width)
        if pooled_text:
            self.text_norm = nn.LayerNorm(embed_dim)
            self.text_vector = nn.Linear(embed_dim, width)
        self.text_context = nn.Linear(text_width, width)
        self.text_context_norm = nn.LayerNorm(width)
        if pooled_text:
            self.text_words = nn.Linear(width, width)
        self.null_image = nn.Parameter(torch.zeros(embed_dim))
        if pooled_text:
            self.null_text = nn.Parameter(torch.zeros(embed_dim))
        self.null_token = nn.Parameter(torch.zeros(width))

    def init_weights(self) -> None:
        """Nulls start as small random vectors: unlike any real condition, and never without a gradient."""
        for name, parameter in self.named_parameters():
            if name.startswith("null_"):
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        t: Float[Tensor, "B"],
        image_embed: Float[Tensor, "B E"],
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_image: Bool[Tensor, "B"] | None = None,
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B L D"]]:
        image = keep_or_null(keep_image, image_embed, self.null_image)
        vector = self.time(t) + self.image_vector(image)
        real = text_mask if keep_text is None else text_mask & keep_text[:, None]
        tokens = self.text_context_norm(self.text_context(text_hidden))
        tokens = torch.where(real[..., None], tokens, self.null_token.to(tokens.dtype))
        if self.pooled_text:
            text = keep_or_null(keep_text, self.text_norm(text_embed), self.null_text)
            # a dropped caption is the mean of its null tokens
            said = (real | ~real.any(1, keepdim=True)).to(tokens.dtype)
            words = (tokens * said[..., None]).sum(1) / said.sum(1, keepdim=True)
            vector = vector + self.text_vector(text) + self.text_words(words)
        image_tokens = rearrange(self.image_context(image), "b (m d) -> b m d", m=self.image_tokens)
        return vector, torch.cat((image_tokens.to(tokens.dtype), tokens), dim=1)


def check_sizes(
    image_size: int,
    patch: int,
    width: int,
    multipliers: Sequence[int],
    attention: Sequence[int],
    head_dim: int,
) -> None:
    widths = [width * m for m in multipliers]
    sides = dict(zip(map_sides(image_size, patch, len(widths)), widths, strict=True))
    if set(attention) - set(sides):
        raise UserError(f"attention names feature maps of side {list(attention)}; there are {list(sides)}.")
    attending = [c for side, c in sides.items() if side in attention] + [width * multipliers[-1]]
    if any(c % head_dim for c in attending):
        raise UserError(f"head_dim {head_dim} must divide the channels of the attention levels {attending}.")
