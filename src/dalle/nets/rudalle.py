"""The transformer of ruDALL-E (Sber AI 2021), for its weights, whose names these are.

What differs from `dalle.DALLE`: layers have norms before and after attention and MLP (CogView's sandwich),
another norm before the last, and biases everywhere; text and codes share one output head. Releases of version
v2 put a start token before the caption, v3 none; sparse masks, counted from the caption's end, are the same
for both, but v2's convolution goes round the picture's edges.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.ranges import Depth, Dropout, Length, PositiveInt, Side, Vocabulary, Width

PAD, START, END = 0, 2, 3  # of captions
REACH = 5  # of a convolution, to each side
CLAMP = 65504.0  # of what attention adds, as half precision has it

Version = Literal["v2", "v3"]


class Cache(NamedTuple):
    """Keys and values of each layer at all places, overwritten in place."""

    kv: Float[Tensor, "L 2 B H S d"]


def sparse_mask(kind: str, text_length: int, grid: int, version: str) -> Bool[Tensor, "S S"]:
    """Which places see which: all text before them, and of the codes before them those of a kind."""
    places = torch.arange(text_length + grid**2, device="cpu")
    at, to = places[:, None], places
    back, (rows, columns) = at - to, ((places - text_length) // grid, (places - text_length) % grid)
    if kind == "row":  # as far as the same column one row up
        near = back <= grid
    elif kind == "column":
        near = back % grid == 0
    else:
        apart = [(part[:, None] - part).abs() for part in (rows, columns)]
        if version == "v2":
            apart = [torch.minimum(part % grid, -part % grid) for part in apart]
        near = (apart[0] <= REACH) & (apart[1] <= REACH)
    return (back >= 0) & ((to < text_length) | near)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.output_dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B N D"], kv: Float[Tensor, "2 B H S d"], mask: Bool[Tensor, "N M"], at: int
    ) -> Float[Tensor, "B N D"]:
        """`kv` holds keys and values of all places; those of `x`, from place `at` on, are put into it."""
        made = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        end = at + x.shape[1]
        if torch.is_grad_enabled():  # a whole stream, for the gradients of what is in it
            past = made[1:]
        else:
            kv[..., at:end, :] = made[1:]
            past = kv[..., :end, :]
        dropped = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(made[0], past[0], past[1], attn_mask=mask, dropout_p=dropped)
        return self.output_dropout(self.dense(out.transpose(1, 2).flatten(2)).clamp(-CLAMP, CLAMP))


class MLP(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.dropout(self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh")))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.input_layernorm, self.before_first_addition_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.before_second_addition_layernorm = nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads, dropout), MLP(width, dropout)

    def forward(
        self, x: Float[Tensor, "B N D"], kv: Float[Tensor, "2 B H S d"], mask: Bool[Tensor, "N M"], at: int
    ) -> Float[Tensor, "B N D"]:
        attended = self.attention(self.input_layernorm(x), kv, mask, at)
        x = x + self.before_first_addition_layernorm(attended)
        return x + self.before_second_addition_layernorm(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.final_layernorm = nn.LayerNorm(width)


class RuDalle(nn.Module):
    """Captions (B, T), codes (B, N) -> logits of all codes (B, N, K); a `TransformerNet` without text logits.

    Args:
        text_vocab, text_length: ids of the text tokenizer, and the length T. Pads are tokens of their own,
            one for each place.
        image_vocab, grid: K, the image tokenizer's codes, and the side of its square of N = grid^2.
        version: of the release: `v2` (Emojich) or `v3` (Malevich, Surrealist).

    Raises:
        UserError: the heads do not divide the width.
    """

    to_logits: Any

    def __init__(
        self,
        text_vocab: Vocabulary,
        text_length: Length,
        image_vocab: Vocabulary,
        grid: Side,
        width: Width,
        depth: Depth,
        heads: PositiveInt,
        version: Version,
        dropout: Dropout = 0.1,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"RuDalle: {heads} heads do not divide width {width}.")
        self.text_vocab, self.text_length = text_vocab, text_length
        self.image_vocab, self.codes, self.heads, self.version = image_vocab, grid * grid, heads, version
        self.before = text_length + (version == "v2")  # places before the first code
        self.text_embeddings = nn.Embedding(text_vocab + text_length, width)
        self.image_embeddings = nn.Embedding(image_vocab, width)
        self.text_pos_embeddings = nn.Embedding(text_length + 1, width)
        self.image_row_embeddings, self.image_col_embeddings = (
            nn.Embedding(grid, width),
            nn.Embedding(grid, width),
        )
        self.embedding_dropout = nn.Dropout(dropout)
        self.transformer = Transformer(width, depth, heads, dropout)
        self.to_logits = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, text_vocab + text_length + image_vocab)
        )
        kinds = ["column" if i % 4 == 1 else "row" for i in range(depth - 1)]
        self.kinds = [*kinds, "column" if depth % 4 == 2 else "conv"]
        for kind in set(self.kinds):
            mask = sparse_mask(kind, text_length, grid, version)
            self.register_buffer(f"{kind}_mask", mask, persistent=False)

    def padded(
        self, text: Int64[Tensor, "B T"], keep_text: Bool[Tensor, "B"] | None = None
    ) -> Int64[Tensor, "B T"]:
        """The ids that the network reads: each place has its pad; those of the empty caption where
        `keep_text` is false.
        """
        if text.shape[1] != self.text_length:
            raise ValueError(f"captions of {text.shape[1]} ids; this network takes {self.text_length}")
        if keep_text is not None:
            empty = torch.full_like(text[:1], PAD)
            empty[:, 0], empty[:, 1] = START, END
            text = torch.where(keep_text[:, None], text, empty)
        pads = self.text_vocab + torch.arange(self.text_length, device=text.device)
        return torch.where(text == PAD, pads, text)

    def read_text(
        self, text: Int64[Tensor, "B T"], keep_text: Bool[Tensor, "B"] | None
    ) -> Float[Tensor, "B M D"]:
        ids = self.padded(text, keep_text)
        ids = F.pad(ids, (1, 0), value=START) if self.version == "v2" else ids
        return self.text_embeddings(ids) + self.text_pos_embeddings.weight[: ids.shape[1]]

    def read_codes(self, codes: Int64[Tensor, "B P"], first: int = 0) -> Float[Tensor, "B P D"]:
        """Of raster ranks `first` and on."""
        places = self.image_row_embeddings.weight[:, None] + self.image_col_embeddings.weight
        return self.image_embeddings(codes) + places.flatten(0, 1)[first : first + codes.shape[1]]

    def room(self, batch: int) -> Cache:
        width = self.image_embeddings.embedding_dim
        size = (len(self.kinds), 2, batch, self.heads, self.before + self.codes - 1, width // self.heads)
        return Cache(self.image_embeddings.weight.new_empty(size))

    def through(self, x: Float[Tensor, "B M D"], at: int, cache: Cache) -> Float[Tensor, "B M D"]:
        """States after each of these, the first of which is at place `at`."""
        end, x = at + x.shape[1], self.embedding_dropout(x)
        for layer, kind, kv in zip(self.transformer.layers, self.kinds, cache.kv, strict=True):
            x = layer(x, kv, getattr(self, f"{kind}_mask")[at:end, :end], at)
        return self.transformer.final_layernorm(x)

    def logits(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        norm, head = self.to_logits
        weight, bias = (part[-self.image_vocab :] for part in (head.weight, head.bias))
        return F.linear(norm(x), weight, bias).float()

    def forward(
        self,
        text: Int64[Tensor, "B T"],
        codes: Int64[Tensor, "B N"],
        keep_text: Bool[Tensor, "B"] | None = None,
    ) -> tuple[None, Float[Tensor, "B N K"]]:
        x = torch.cat((self.read_text(text, keep_text), self.read_codes(codes[:, :-1])), dim=1)
        return None, self.logits(self.through(x, 0, self.room(len(text)))[:, self.before - 1 :])

    def prefill(
        self,
        text: Int64[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None,
        codes: Int64[Tensor, "B P"],
    ) -> tuple[Float[Tensor, "B K"], Cache]:
        """Logits of the code after the first P, and what `step` goes on with."""
        x = torch.cat((self.read_text(text, keep_text), self.read_codes(codes)), dim=1)
        cache = self.room(len(text))
        return self.logits(self.through(x, 0, cache)[:, -1]), cache

    def step(self, code: Int64[Tensor, "B"], rank: int, cache: Cache) -> Float[Tensor, "B K"]:
        """Logits of the code after `code`, which is the one of raster rank `rank` (from 0)."""
        return self.logits(
            self.through(self.read_codes(code[:, None], rank), self.before + rank, cache)[:, 0]
        )
