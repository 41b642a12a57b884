"""The transformer of DALL-E mini and mega (Dayma et al. 2021), as min-dalle keeps it: for its weights.

What differs from `dalle.DALLE`: the caption has an encoder of its own, which the decoder of codes looks at;
nothing learns text. Layers are NormFormer's (norms before and after attention, and in the gated MLP), and no
projection has a bias. Without a caption it is told the empty one.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.ranges import Depth, Length, NonNegativeInt, PositiveInt, Side, Vocabulary, Width

START, PAD, END = 0, 1, 2  # of captions


class Cache(NamedTuple):
    """Keys and values of each layer: of all codes, overwritten in place, and of the caption; its mask."""

    own: Float[Tensor, "L 2 B H N d"]
    text: Float[Tensor, "L 2 B H T d"]
    real: Bool[Tensor, "B 1 1 T"]


class GLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.ln0, self.ln1 = nn.LayerNorm(width), nn.LayerNorm(inner)
        self.fc0, self.fc1 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.fc2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = self.ln0(x)
        return self.fc2(self.ln1(F.gelu(self.fc0(x)) * self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def keys_values(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "2 B H N d"]:
        both = torch.stack((self.k_proj(x), self.v_proj(x)))
        return both.unflatten(-1, (self.heads, -1)).transpose(2, 3)

    def forward(
        self, x: Float[Tensor, "B N D"], kv: Float[Tensor, "2 B H M d"], mask: Bool[Tensor, "..."] | None
    ) -> Float[Tensor, "B N D"]:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.pre_self_attn_layer_norm, self.self_attn_layer_norm = (nn.LayerNorm(width) for _ in range(2))
        self.self_attn, self.glu = Attention(width, heads), GLU(width, inner)

    def forward(self, x: Float[Tensor, "B T D"], real: Bool[Tensor, "B 1 1 T"]) -> Float[Tensor, "B T D"]:
        h = self.pre_self_attn_layer_norm(x)
        x = x + self.self_attn_layer_norm(self.self_attn(h, self.self_attn.keys_values(h), real))
        return x + self.glu(x)


class DecoderLayer(EncoderLayer):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__(width, heads, inner)
        self.pre_encoder_attn_layer_norm, self.encoder_attn_layer_norm = (
            nn.LayerNorm(width) for _ in range(2)
        )
        self.encoder_attn = Attention(width, heads)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # it has more to look at
        self,
        x: Float[Tensor, "B N D"],
        own: Float[Tensor, "2 B H M d"],
        text: Float[Tensor, "2 B H T d"],
        causal: Bool[Tensor, "N K"] | None,
        real: Bool[Tensor, "B 1 1 T"],
        at: int,
    ) -> Float[Tensor, "B N D"]:
        """`own` holds keys and values of all codes; those of `x`, from place `at` on, are put into it."""
        h = self.pre_self_attn_layer_norm(x)
        made, end = self.self_attn.keys_values(h), at + x.shape[1]
        if at or x.shape[1] == 1:  # a whole stream needs nothing from before, and gradients of what is in it
            own[..., at:end, :] = made
            made = own[..., :end, :]
        elif not torch.is_grad_enabled():
            own[..., :end, :] = made
        x = x + self.self_attn_layer_norm(self.self_attn(h, made, causal))
        h = self.pre_encoder_attn_layer_norm(x)
        x = x + self.encoder_attn_layer_norm(self.encoder_attn(h, text, real))
        return x + self.glu(x)


class Stack(nn.Module):
    """Embeddings, layers and the last norm."""

    layers: Any

    def __init__(self, layer: type, vocab: int, length: int, width: int, depth: int, heads: int, inner: int):
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(layer(width, heads, inner) for _ in range(depth))
        self.layernorm_embedding, self.final_ln = nn.LayerNorm(width), nn.LayerNorm(width)

    def embed(self, ids: Int64[Tensor, "B N"], at: int = 0) -> Float[Tensor, "B N D"]:
        places = self.embed_positions.weight[at : at + ids.shape[1]]
        return self.layernorm_embedding(self.embed_tokens(ids) + places)


class DalleBart(nn.Module):
    """Captions (B, T), codes (B, N) -> logits of all codes (B, N, K); a `TransformerNet` without text logits.

    Args:
        text_vocab, text_length: ids of the text tokenizer, and the length T.
        image_vocab, grid: K, the image tokenizer's codes, and the side of its square of N = grid^2.
        inner: width within the MLPs.
        image_rows: of the table of codes, which has some that are no codes.
        start: the row that stands before the first code: min-dalle takes 16383, dalle-mini 16384.

    Raises:
        UserError: the heads do not divide the width, or `start` is beyond the table.
    """

    def __init__(
        self,
        text_vocab: Vocabulary,
        text_length: Length,
        image_vocab: Vocabulary,
        grid: Side,
        width: Width,
        depth: Depth,
        heads: PositiveInt,
        inner: Width,
        image_rows: Vocabulary,
        start: NonNegativeInt,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"DalleBart: {heads} heads do not divide width {width}.")
        if start >= image_rows or image_vocab > image_rows:
            raise UserError(
                f"DalleBart: start={start} or image_vocab={image_vocab} is beyond the table of {image_rows}."
            )
        self.text_vocab, self.text_length = text_vocab, text_length
        self.image_vocab, self.codes, self.start, self.heads = image_vocab, grid * grid, start, heads
        self.encoder = Stack(EncoderLayer, text_vocab, text_length, width, depth, heads, inner)
        self.decoder = Stack(DecoderLayer, image_rows, self.codes, width, depth, heads, inner)
        self.decoder.lm_head = nn.Linear(width, image_rows, bias=False)

    def padded(
        self, text: Int64[Tensor, "B T"], keep_text: Bool[Tensor, "B"] | None = None
    ) -> Int64[Tensor, "B T"]:
        """The ids that the network reads: those of the empty caption where `keep_text` is false."""
        if text.shape[1] != self.text_length:
            raise ValueError(f"captions of {text.shape[1]} ids; this network takes {self.text_length}")
        if keep_text is None:
            return text
        empty = torch.full_like(text[:1], PAD)
        empty[:, 0], empty[:, 1] = START, END
        return torch.where(keep_text[:, None], text, empty)

    def begin(
        self, text: Int64[Tensor, "B T"], keep_text: Bool[Tensor, "B"] | None
    ) -> tuple[Float[Tensor, "L 2 B H T d"], Bool[Tensor, "B 1 1 T"]]:
        """What the decoder's layers see of the captions."""
        text = self.padded(text, keep_text)
        real = (text != PAD)[:, None, None]
        x = self.encoder.embed(text)
        for layer in self.encoder.layers:
            x = layer(x, real)
        x = self.encoder.final_ln(x)
        return torch.stack([layer.encoder_attn.keys_values(x) for layer in self.decoder.layers]), real

    def through(self, ids: Int64[Tensor, "B M"], at: int, cache: Cache) -> Float[Tensor, "B M K"]:
        """Logits after each of these rows of the table, the first of which is at place `at`."""
        x, m = self.decoder.embed(ids, at), ids.shape[1]
        causal = None if m == 1 else torch.ones(m, at + m, dtype=torch.bool, device=x.device).tril(at)
        for layer, own, text in zip(self.decoder.layers, cache.own, cache.text, strict=True):
            x = layer(x, own, text, causal, cache.real, at)
        head: Any = self.decoder.lm_head
        weight = head.weight[: self.image_vocab]
        return F.linear(self.decoder.final_ln(x), weight).float()

    def started(self, codes: Int64[Tensor, "B P"]) -> Int64[Tensor, "B M"]:
        return F.pad(codes, (1, 0), value=self.start)

    def forward(
        self,
        text: Int64[Tensor, "B T"],
        codes: Int64[Tensor, "B N"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> tuple[None, Float[Tensor, "B N K"]]:
        told, real = self.begin(text, keep_text)
        own = told.new_empty(*told.shape[:4], self.codes, told.shape[5])
        return None, self.through(self.started(codes[:, :-1]), 0, Cache(own, told, real))

    def prefill(
        self,
        text: Int64[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None,
        codes: Int64[Tensor, "B P"],
    ) -> tuple[Float[Tensor, "B K"], Cache]:
        """Logits of the code after the first P, and what `step` goes on with."""
        told, real = self.begin(text, keep_text)
        cache = Cache(told.new_empty(*told.shape[:4], self.codes, told.shape[5]), told, real)
        return self.through(self.started(codes), 0, cache)[:, -1], cache

    def step(self, code: Int64[Tensor, "B"], rank: int, cache: Cache) -> Float[Tensor, "B K"]:
        """Logits of the code after `code`, which is the one of raster rank `rank` (from 0)."""
        return self.through(code[:, None], rank + 1, cache)[:, 0]
