"""The network of LAION's prior, as lucidrains' DALLE2-pytorch has it: for its weights.

Names of weights are that package's (`DiffusionPriorNetwork`). What differs from the priors beside it: one key
and value for all heads, and a learned one before all others; positions by T5's biases and by rotation; gated
MLPs; norms without biases. Its code has changed under the same names: `cosine` and `unsaid` say which it was.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.machine import precise
from dalle.nets.blocks import keep_or_null
from dalle.ranges import Depth, Dropout, Length, PositiveInt, Steps, Width

BUCKETS, FARTHEST = 32, 128  # of relative positions
COSINE_SCALE = 16.0

Unsaid = Literal["ignored", "states", "all"]


class Norm(nn.Module):
    """Layer norm without a bias. `stable` divides by the largest number first."""

    def __init__(self, width: int, stable: bool = False):
        super().__init__()
        self.g, self.stable = nn.Parameter(torch.ones(width)), stable

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        x = x / x.amax(dim=-1, keepdim=True).detach() if self.stable else x
        return F.layer_norm(x, x.shape[-1:], self.g)


class RelativeBias(nn.Module):
    """A number for each head and distance back, in buckets that widen (Raffel et al. 2020, T5)."""

    def __init__(self, heads: int):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(BUCKETS, heads)

    def forward(self, length: int) -> Float[Tensor, "H N M"]:
        """Of queries to themselves and to the learned key, which comes before them."""
        weight, exact = self.relative_attention_bias.weight, BUCKETS // 2
        places = torch.arange(length + 1, device=weight.device)
        back = (places[:length, None] - places).clamp(min=0)
        far = (back.clamp(min=1).float() / exact).log() / math.log(FARTHEST / exact) * (BUCKETS - exact)
        bucket = torch.where(back < exact, back, (exact + far.long()).clamp(max=BUCKETS - 1))
        return F.embedding(bucket, weight).permute(2, 0, 1)


class Rotation(nn.Module):
    """Turns pairs of neighbours by an angle that grows with the position (Su et al. 2021)."""

    freqs: Tensor

    def __init__(self, width: int):
        super().__init__()
        exponents = torch.arange(0, width, 2)[: width // 2].float() / width
        self.register_buffer("freqs", 10_000**-exponents)

    def forward(self, x: Float[Tensor, "*B N d"]) -> Float[Tensor, "*B N d"]:
        places = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
        angles = places[:, None] * self.freqs
        turned, kept = x[..., : 2 * len(self.freqs)].unflatten(-1, (-1, 2)), x[..., 2 * len(self.freqs) :]
        a, b = turned.unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((pairs.flatten(-2).to(x.dtype), kept), dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, rotary: bool, cosine: bool, dropout: float):
        super().__init__()
        self.heads, self.head_dim, self.cosine, self.dropout = heads, head_dim, cosine, dropout
        self.norm = Norm(width)
        self.null_kv = nn.Parameter(torch.randn(2, head_dim))
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_dim, bias=False)
        if rotary:
            self.rotary_emb = Rotation(min(32, head_dim))
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, width, bias=False), Norm(width))

    def forward(self, x: Float[Tensor, "B N D"], bias: Float[Tensor, "H N M"]) -> Float[Tensor, "B N D"]:
        x = self.norm(x)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x)[:, None].chunk(2, dim=-1)
        if hasattr(self, "rotary_emb"):
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        null = self.null_kv.to(k.dtype).expand(len(x), 1, 2, -1)
        k, v = torch.cat((null[:, :, :1], k), dim=2), torch.cat((null[:, :, 1:], v), dim=2)
        if self.cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = F.scaled_dot_product_attention(
            q,
            k.expand(-1, self.heads, -1, -1),
            v.expand(-1, self.heads, -1, -1),
            attn_mask=bias.to(q.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            scale=COSINE_SCALE if self.cosine else None,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def forward(self, x: Float[Tensor, "B N I"]) -> Float[Tensor, "B N J"]:
        x, gate = x.chunk(2, dim=-1)
        return x * F.silu(gate)


class CausalTransformer(nn.Module):
    """Layers of attention and MLP; `inner` is the width within the latter."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        head_dim: int,
        inner: int,
        normformer: bool,
        norm_in: bool,
        norm_out: bool,
        final_proj: bool,
        rotary: bool,
        cosine: bool,
        dropout: float,
    ):
        super().__init__()
        self.init_norm = Norm(width) if norm_in else nn.Identity()
        self.rel_pos_bias = RelativeBias(heads)

        def layer() -> nn.ModuleList:
            mlp = nn.Sequential(
                Norm(width),
                nn.Linear(width, 2 * inner, bias=False),
                SwiGLU(),
                Norm(inner) if normformer else nn.Identity(),
                nn.Dropout(dropout),
                nn.Linear(inner, width, bias=False),
            )
            return nn.ModuleList([Attention(width, heads, head_dim, rotary, cosine, dropout), mlp])

        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.norm = Norm(width, stable=True) if norm_out else nn.Identity()
        self.project_out = nn.Linear(width, width, bias=False) if final_proj else nn.Identity()

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x, n = self.init_norm(x), x.shape[1]
        later = torch.ones(n, n + 1, dtype=torch.bool, device=x.device).triu(2)
        bias = self.rel_pos_bias(n).masked_fill(later, -torch.inf)
        for layer in self.layers:
            attention, mlp = layer  # pyright: ignore[reportGeneralTypeIssues]  # a ModuleList of two
            x = attention(x, bias) + x
            x = mlp(x) + x
        return self.project_out(self.norm(x))


class LaionPrior(nn.Module):
    """x_t (B, E), t (B,) and the text -> the prediction (B, E); a `PriorNet`.

    Sequence: text states | caption embedding | time | noised image embedding | learned query, where the
    answer is read; causal. Pads are learned. E is the width of all, and that of CLIP's text states.

    Args:
        max_text_len: text states are cut, or padded, to so many.
        inner: width within the MLPs. normformer: with a norm in there, too.
        norm_in, norm_out, final_proj: whether there is a norm before, one after, and a projection after that.
        rotary: whether queries and keys are rotated, beside T5's biases.
        cosine: whether attention is by cosines (times 16), not by dot products over sqrt(head_dim).
        unsaid: what the code did without a caption: nothing else (`ignored`: it cannot be guided); or it
            learned nulls in place of text states and noised embedding (`states`) and of the caption's
            embedding (`all`).

    Raises:
        UserError: heads of odd width.
    """

    def __init__(
        self,
        embed_dim: Width,
        depth: Depth,
        heads: PositiveInt,
        head_dim: Width,
        max_text_len: Length,
        inner: Width,
        normformer: bool,
        norm_in: bool,
        norm_out: bool,
        final_proj: bool,
        rotary: bool,
        cosine: bool,
        unsaid: Unsaid,
        dropout: Dropout = 0.05,
        steps: Steps = 1000,
    ):
        super().__init__()
        if head_dim % 2:
            raise UserError(f"LaionPrior: heads are of even width, not {head_dim}.")
        self.embed_dim, self.steps, self.unsaid = embed_dim, steps, unsaid
        self.to_time_embeds = nn.Sequential(nn.Embedding(steps, embed_dim))
        self.learned_query = nn.Parameter(torch.randn(embed_dim))
        self.null_text_encodings = nn.Parameter(torch.randn(1, max_text_len, embed_dim))
        if unsaid != "ignored":
            self.null_text_embeds = nn.Parameter(torch.randn(1, 1, embed_dim))
            self.null_image_embed = nn.Parameter(torch.randn(1, embed_dim))
        self.causal_transformer = CausalTransformer(
            embed_dim, depth, heads, head_dim, inner, normformer, norm_in, norm_out, final_proj, rotary,
            cosine, dropout,
        )  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "B E"],
        t: Float[Tensor, "B"],
        *,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T E"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B E"]:
        level = (precise(t) * self.steps).round().long().clamp(1, self.steps) - 1
        embed = F.normalize(text_embed.float(), dim=-1).to(x.dtype)
        nulls = self.null_text_encodings
        room = nulls.shape[1] - text_hidden.shape[1]
        hidden, real = F.pad(text_hidden, (0, 0, 0, room)), F.pad(text_mask, (0, room))
        if self.unsaid != "ignored":
            real = real if keep_text is None else real & keep_text[:, None]
            x = keep_or_null(keep_text, x, self.null_image_embed[0])
        if self.unsaid == "all":
            embed = keep_or_null(keep_text, embed, self.null_text_embeds[0, 0])
        hidden = torch.where(real[..., None], hidden, nulls.to(hidden.dtype))
        query = self.learned_query.expand(len(x), -1)
        last = [token[:, None].to(hidden.dtype) for token in (embed, self.to_time_embeds(level), x, query)]
        return self.causal_transformer(torch.cat([hidden, *last], dim=1))[:, -1]
