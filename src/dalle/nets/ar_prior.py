"""The network of the autoregressive prior (Ramesh et al. 2022, DALL-E 2, sec. 2.2): an image embedding as a
row of codes, and a causal transformer that writes it after the caption.

Sequence: text states | caption embedding | dot product | code of dimension 1 | ... ; each code is read at the
token before it. Dimensions are those of a principal component analysis, the one that varies most first.
Text pads, and all of a dropped caption (the dot product is one with it, too), become learned tokens, one per
position, so no key is masked but by causality.

What differs from the paper: the text states are a frozen CLIP's; tables of codes can share waves over the
buckets, so that neighbouring buckets are not learned one by one (`waves`; 0: independent, as a vocabulary).
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.blocks import (
    MLP,
    Attention,
    Place,
    Unembedding,
    at,
    attend_one,
    hidden,
    keep_or_null,
    linear_fp32,
    put,
)
from dalle.nets.recompute import Checkpoint, recomputed
from dalle.ranges import Depth, Dropout, Length, NonNegativeInt, PositiveInt, Vocabulary, Width

TAIL = 1e-4  # of a dimension's values that lie below its buckets, and as many above
NARROWEST = 1e-6  # range of a dimension that never moves


class Cache(NamedTuple):
    """Keys and values of each layer at every position, overwritten in place; the first `text` are text."""

    kv: Float[Tensor, "L 2 B H S e"]
    text: int

    def upto(self, length: int) -> "Cache":
        """A view of the first positions, for steps that need not see the others."""
        return self._replace(kv=self.kv[..., :length, :])


def principal_components(
    embeds: Float[Tensor, "n e"],
) -> tuple[Float[Tensor, "e"], Float[Tensor, "e"], Float[Tensor, "e e"]]:
    """Mean, variances from the largest to the smallest, and their directions as rows; exact, in float64.

    The largest number of each direction is positive, which makes it the same on every machine.

    Raises:
        UserError: a value that is no number.
    """
    mean = embeds.mean(0, dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=embeds.device)
    for some in embeds.split(4096):
        centred = some.double() - mean
        covariance.addmm_(centred.T, centred)
    if not covariance.isfinite().all():
        raise UserError("the image embeddings hold values that are no numbers; look how CLIP was trained")
    variances, columns = torch.linalg.eigh(covariance / len(embeds))
    variances, rows = variances.flip(0).clamp(min=0), columns.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return mean, variances, rows * largest.sign()


def dims_for(variances: Float[Tensor, "e"], kept: float) -> int:
    """How few of the first dimensions keep this share of the variance; 1 where nothing varies."""
    shares = variances.cumsum(0) / variances.sum().clamp(min=torch.finfo(variances.dtype).tiny)
    return min(len(variances), 1 + int((shares < kept - 1e-12).sum()))


class EmbeddingCodes(nn.Module):
    """Image embeddings as whole numbers, and back: principal components, each cut into equal buckets.

    `fit` measures what it needs on training pairs; it is kept with the weights of the network. A value beyond
    the buckets counts to the outermost, what is no number to the first. Dot products with the caption's
    embedding are cut into as many buckets, at their quantiles.

    embed_dim: E; dims: D, the components kept; buckets: K of each.
    """

    mean: Float[Tensor, "E"]
    components: Float[Tensor, "D E"]
    low: Float[Tensor, "D"]
    high: Float[Tensor, "D"]
    dots: Float[Tensor, "K+1"]

    def __init__(self, embed_dim: int, dims: int, buckets: int):
        super().__init__()
        self.embed_dim, self.dims, self.buckets = embed_dim, dims, buckets
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("components", torch.eye(dims, embed_dim))
        self.register_buffer("low", torch.full((dims,), -1.0))
        self.register_buffer("high", torch.full((dims,), 1.0))
        self.register_buffer("dots", torch.linspace(-1, 1, buckets + 1))

    def fit(self, embeds: Float[Tensor, "n E"], dots: Float[Tensor, "n"]) -> "EmbeddingCodes":
        """Of training pairs: their image embeddings, and dot products of these with the captions'.

        Raises:
            UserError: more dimensions than there are, or a value that is no number.
        """
        if self.dims > self.embed_dim:
            raise UserError(f"dims={self.dims} are more than the {self.embed_dim} of the image embeddings")
        mean, _, rows = principal_components(embeds)
        self.mean.copy_(mean)
        self.components.copy_(rows[: self.dims])
        tails = torch.tensor([TAIL, 1 - TAIL], device=embeds.device)
        ends = torch.stack([values.quantile(tails) for values in self.project(embeds).T.contiguous()])
        self.low.copy_(ends[:, 0])
        self.high.copy_(ends[:, 1].maximum(ends[:, 0] + NARROWEST))
        self.dots.copy_(dots.quantile(torch.linspace(0, 1, self.buckets + 1, device=dots.device)))
        return self

    def project(self, embeds: Float[Tensor, "B E"]) -> Float[Tensor, "B D"]:
        return linear_fp32(embeds - self.mean, self.components)

    def encode(self, embeds: Float[Tensor, "B E"]) -> Int64[Tensor, "B D"]:
        place = (self.project(embeds) - self.low) / (self.high - self.low) * self.buckets
        return place.floor().clamp(0, self.buckets - 1).nan_to_num(0).long()

    def decode(self, codes: Int64[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        """The middles of the buckets, as an embedding."""
        values = self.low + (codes + 0.5) / self.buckets * (self.high - self.low)
        return linear_fp32(values, self.components.T) + self.mean

    def encode_dot(self, dots: Float[Tensor, "B"]) -> Int64[Tensor, "B"]:
        return torch.bucketize(dots.contiguous(), self.dots[1:-1].contiguous())

    def dot_at(self, quantile: Float[Tensor, "B"]) -> Int64[Tensor, "B"]:
        """The code of the dot product that so many (0 to 1) of the training's are below."""
        place = (quantile * self.buckets).clamp(0, self.buckets)
        below = place.floor().clamp(max=self.buckets - 1).long()
        return self.encode_dot(torch.lerp(self.dots[below], self.dots[below + 1], place - below))


class Layer(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N 2*D"]]:
        """Also gives the keys | values, for those who cache them."""
        attended, kv = self.attention(self.norm1(x), causal=True)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm2(x))), kv

    def step(
        self,
        x: Float[Tensor, "B 1 D"],
        cache: Float[Tensor, "2 B H S e"],
        position: Place,
        mask: Float[Tensor, "1 S"] | None,
    ) -> Float[Tensor, "B 1 D"]:
        """One token after those in the cache, into which it is written."""
        attention = self.attention
        parts = attention.qkv(self.norm1(x)).unflatten(2, (3, attention.heads, -1))
        q, own = parts.permute(2, 0, 3, 1, 4).split((1, 2))  # (1 | 2, B, H, 1, e)
        put(cache, 3, position, own)
        past = cache if isinstance(position, Tensor) else cache[..., : position + 1, :]
        attended = attend_one(q[0], past[0], past[1], mask)
        x = x + attention.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ARPrior(nn.Module):
    """Codes (B, 1 + D), of the dot product and of each dimension, after a caption -> logits of the latter.

    embed_dim, text_width: E and S, sizes of CLIP's embeddings and text states; context_length: its longest
    text; dims, buckets: D and K of `EmbeddingCodes`; waves: shared by the tables of codes; checkpoint:
    recompute each layer in the backward pass.
    """

    layers: Any  # of Layer
    layer_step = staticmethod(Layer.step)
    stride = 128  # of the lengths that `reach` gives: each is a graph of its own, and reads its whole length
    wave: Float[Tensor, "K F"]  # with waves

    def __init__(
        self,
        embed_dim: Width,
        text_width: Width,
        context_length: Length,
        dims: Width,
        buckets: Vocabulary,
        width: Width,
        depth: Depth,
        heads: PositiveInt,
        waves: NonNegativeInt,
        dropout: Dropout = 0.0,
        checkpoint: Checkpoint = False,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"ARPrior: {heads} heads do not divide width {width}.")
        if waves > buckets:
            raise UserError(f"ARPrior: {waves} waves are more than the {buckets} buckets.")
        self.embed_dim, self.text_width, self.context_length = embed_dim, text_width, context_length
        self.dims, self.buckets, self.width, self.checkpoint = dims, buckets, width, checkpoint
        self.heads = heads
        self.codes = EmbeddingCodes(embed_dim, dims, buckets)
        self.text_norm = nn.LayerNorm(embed_dim)  # a caption embedding's length carries no meaning in CLIP
        self.text_in = nn.Linear(embed_dim, width)
        self.hidden_in = nn.Linear(text_width, width)
        self.null_hidden = nn.Parameter(torch.empty(context_length, width))
        self.null_text = nn.Parameter(torch.empty(width))
        self.null_dot = nn.Parameter(torch.empty(width))
        self.dot_embedding = nn.Embedding(buckets, width)
        self.code_embedding = nn.Embedding(buckets, width)
        self.position = nn.Parameter(torch.empty(context_length + 1 + dims, width))
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = Unembedding(width, buckets)
        self.waves = None
        if waves:  # the rows of a discrete cosine transform, without the constant one
            place = (torch.arange(buckets)[:, None] + 0.5) / buckets
            self.register_buffer(
                "wave", torch.cos(math.pi * place * torch.arange(1, waves + 1)), persistent=False
            )
            self.waves = nn.ParameterDict(
                {name: nn.Parameter(torch.empty(waves, width)) for name in ("dot", "read", "write")}
            )
        self.init_weights()

    def init_weights(self) -> None:
        """CLIP's text transformer init: residual outputs shrunk with depth."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.layers.modules():
            if isinstance(module, (Attention, MLP)):
                fan = 2 * len(self.layers) * module.out.in_features
                nn.init.normal_(module.out.weight, std=fan**-0.5)
        for free in (self.null_hidden, self.null_text, self.null_dot):
            nn.init.normal_(free, std=self.width**-0.5)
        nn.init.normal_(self.position, std=0.01)
        for table in (self.dot_embedding, self.code_embedding, self.head):  # little of their own at first
            nn.init.normal_(table.weight, std=0.002 if self.waves else 0.02)
        for table in self.waves.values() if self.waves else ():
            nn.init.normal_(table, std=0.02)

    def read(self, codes: Int64[Tensor, "*N"], own: nn.Embedding, name: str) -> Float[Tensor, "*N D"]:
        """A vector for each code: its bucket's own, and its part of the waves."""
        x = own(codes)
        return x if self.waves is None else x + linear_fp32(self.wave[codes], self.waves[name].T)

    def text_tokens(
        self,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None,
    ) -> Float[Tensor, "B N D"]:
        length = text_hidden.shape[1]
        if length > self.context_length:
            raise ValueError(f"text of {length} tokens; this prior takes at most {self.context_length}.")
        real = text_mask if keep_text is None else text_mask & keep_text[:, None]
        hidden = self.hidden_in(text_hidden)
        hidden = torch.where(real[..., None], hidden, self.null_hidden[:length].to(hidden.dtype))
        pooled = keep_or_null(keep_text, self.text_in(self.text_norm(text_embed)), self.null_text)
        position = torch.cat((self.position[:length], self.position[self.context_length, None]))
        return torch.cat((hidden, pooled[:, None]), dim=1) + position

    def code_tokens(
        self, codes: Int64[Tensor, "B P"], keep_text: Bool[Tensor, "B"] | None
    ) -> Float[Tensor, "B P D"]:
        """Of the first codes; number 0 is the dot product's."""
        dot = self.read(codes[:, 0], self.dot_embedding, "dot")
        dot = keep_or_null(keep_text, dot, self.null_dot)[:, None]
        own = self.read(codes[:, 1:], self.code_embedding, "read")
        return torch.cat((dot, own), dim=1) + self.position[self.context_length + 1 :][: codes.shape[1]]

    def logits(self, x: Float[Tensor, "B *N D"]) -> Float[Tensor, "B *N K"]:
        """In fp32."""
        x, own = self.norm(x), self.head.weight
        if self.waves is None:
            return linear_fp32(x, own)
        if x.shape[:-1].numel() < self.buckets:  # one code at a time: less than adding up the table
            return linear_fp32(x, own) + linear_fp32(linear_fp32(x, self.waves["write"]), self.wave)
        return linear_fp32(x, own + linear_fp32(self.wave, self.waves["write"].T))

    def forward(
        self,
        codes: Int64[Tensor, "B C"],
        *,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B N K"]:
        """-> fp32 logits of codes[:, 1:]; C = 1 + D."""
        text = self.text_tokens(text_embed, text_hidden, text_mask, keep_text)
        x = torch.cat((text, self.code_tokens(codes[:, :-1], keep_text)), dim=1)
        for layer in self.layers:
            if self.checkpoint and self.training:
                x, _ = recomputed(self.checkpoint, layer, x)
            else:
                x, _ = layer(x)
        return self.logits(x[:, text.shape[1] :])

    def prefill(
        self,
        codes: Int64[Tensor, "B P"],
        *,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "B K"], Cache]:
        """-> logits of the code after the text and the first P >= 1 codes, and the cache for `step`.

        The cache holds the whole sequence, so that no step allocates; one that is given is used again.
        """
        text = self.text_tokens(text_embed, text_hidden, text_mask, keep_text)
        x = torch.cat((text, self.code_tokens(codes, keep_text)), dim=1)
        (b, m, _), length = x.shape, text.shape[1]
        for i, layer in enumerate(self.layers):
            x, kv = layer(x)
            if cache is None:
                size = (len(self.layers), 2, b, self.heads, length + self.dims, self.width // self.heads)
                cache = Cache(kv.new_zeros(size), length)  # what is masked is multiplied by 0
            cache.kv[i, ..., :m, :] = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        assert cache is not None
        if cache.text != length:
            raise ValueError(f"text of {length} tokens, but the cache is for {cache.text}")
        return self.logits(x[:, -1]), cache

    def reach(self, rank: int) -> int:
        """A length of the cache (`Cache.upto`) that is enough for the step after the code of this number."""
        whole = self.context_length + 1 + self.dims
        return min(-(-(self.context_length + 1 + rank + 1) // self.stride) * self.stride, whole)

    def compile_step(self) -> None:
        """As `nets.dalle.DALLE.compile_step`."""
        self.layer_step = torch.compile(Layer.step, fullgraph=True)

    def step(self, code: Int64[Tensor, "B"], rank: Place, cache: Cache) -> Float[Tensor, "B K"]:
        """Logits of the code after `code`, which is number `rank`, at least 1.

        With the rank as a tensor, nothing is decided on the host, and all steps of a `reach` are one graph.
        """
        own = self.read(code[:, None], self.code_embedding, "read")
        x = own + at(self.position, 0, self.context_length + 1 + rank)
        position, mask = cache.text + rank, None
        if isinstance(position, Tensor):
            places = torch.arange(cache.kv.shape[4], device=position.device)
            mask = hidden(places[None] <= position, cache.kv.dtype)
        step = self.layer_step if isinstance(rank, Tensor) else Layer.step
        for layer, kv in zip(self.layers, cache.kv, strict=True):
            x = step(layer, x, kv, position, mask)
        return self.logits(x[:, 0])
