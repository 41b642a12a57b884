"""DALL-E's transformer: one stream of text tokens, then a picture's codes (Ramesh et al. 2021, sec. 2.2).

Attention is causal, or sparse in the picture as in App. B.1, and one softmax runs over text and picture.
What differs from the paper: each kind of token has an output head of its own, which restricts the logits to
its vocabulary without a mask; there is a start token; `style="llama"` gives the same class modern blocks;
layers may read part of the token before and of the code above (`TokenShift`); and codes that are digits of
finite scalars (Mentzer et al. 2023) share what their digits share.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dalle.errors import UserError
from dalle.nets.blocks import (
    Place,
    StepLinear,
    Unembedding,
    at,
    attend,
    attend_one,
    gathered,
    grouped,
    hidden,
    linear_fp32,
    put,
    worth_skipping,
)
from dalle.nets.recompute import Checkpoint, recomputed
from dalle.ranges import Depth, Dropout, Length, Levels, PositiveInt, Side, Vocabulary, Width

SPARSE = ("row", "column", "conv")
ATTENTION = ("full", *SPARSE, "dalle")
STYLES = ("gpt", "llama")


class Cache(NamedTuple):
    """What `DALLE.step` needs of the tokens before, for each layer, made once and overwritten in place.

    kv: keys and values at every position that is an input.
    left, above: with a `TokenShift`, what attention and MLP take of the newest token and of the newest row.
    """

    kv: Float[Tensor, "L 2 B H S e"]
    left: Float[Tensor, "L 2 B q"] | None
    above: Float[Tensor, "L 2 B g q"] | None

    def upto(self, length: int) -> "Cache":
        """A view of the first positions, for steps that need not see the others."""
        return self._replace(kv=self.kv[..., :length, :])


def layer_kinds(attention: str, depth: int) -> list[str]:
    """The kind of attention of each layer; `dalle` is the paper's order: row, column, row, row, ..., conv."""
    if attention != "dalle":
        return [attention] * depth
    return ["column" if i % 4 == 1 else "row" for i in range(depth - 1)] + ["conv"]


def offsets(kind: str, grid: int, kernel: int) -> list[int]:
    """How many codes before itself (in raster order) each key lies that a code may look at."""
    codes, reach = grid * grid, kernel // 2
    allowed = {
        "full": range(codes),
        "row": range(grid + 1),  # as far as the same column one row up (Fig. 11)
        "column": range(0, codes, grid),
        "conv": (a * grid + b for a in range(reach + 1) for b in range(-reach, reach + 1)),
    }
    return sorted({d for d in allowed[kind] if 0 <= d < codes})


class SparseMask(nn.Module):
    """What the layers of one sparse kind see: all text before and, of the picture, the codes at `steps`.

    mask (S, S), S = text_length + grid^2, is for whole streams; `blocks` says the same to a kernel that skips
    what nobody sees. For one code at a time, whose query is of rank i in the picture, keys[i] are the
    positions that it sees, where seen[i]: the others are too early.
    """

    mask: Bool[Tensor, "S S"]
    allowed: Bool[Tensor, "N"]
    keys: Int64[Tensor, "N M"]
    seen: Bool[Tensor, "N M"]

    def __init__(self, text_length: int, grid: int, steps: Sequence[int]):
        super().__init__()
        codes, back = grid * grid, torch.tensor(steps)
        allowed = torch.zeros(codes, dtype=torch.bool).index_fill(0, back, True)
        rank = torch.arange(codes)
        mask = torch.ones(text_length + codes, text_length + codes, dtype=torch.bool).tril()
        mask[text_length:, text_length:] &= allowed[(rank[:, None] - rank).clamp(min=0)]
        before = rank[:, None] - back
        text = torch.arange(text_length).expand(codes, -1)
        keys = torch.cat((text, text_length + before.clamp(min=0)), dim=1)
        seen = torch.cat((torch.ones_like(text, dtype=torch.bool), before >= 0), dim=1)
        self.text_length, self.made = text_length, {}
        for name, buffer in (("mask", mask), ("keys", keys), ("seen", seen), ("allowed", allowed)):
            self.register_buffer(name, buffer, persistent=False)

    def blocks(self, length: int) -> BlockMask:
        """Of the first tokens of a stream; made once."""
        if torch.compiler.is_compiling():
            return self.make_blocks(length)
        key = length, self.allowed.device
        if key not in self.made:
            self.made = {key: self.make_blocks(length)}
        return self.made[key]

    def make_blocks(self, length: int) -> BlockMask:
        text_length, allowed = self.text_length, self.allowed

        def near(distance: Tensor) -> Tensor:
            return allowed[distance.clamp(0, len(allowed) - 1)]

        return create_block_mask(
            # a lambda: its arguments are counted, which a decorator of the tests would hide
            lambda batch, head, query, key: (key <= query) & ((key < text_length) | near(query - key)),
            None, None, length, length, device=allowed.device,
        )  # fmt: skip


def rotations(length: int, head_dim: int) -> Float[Tensor, "2 S d"]:
    """Cosines and sines of rotary positions (Su et al. 2021), base 10000, one angle for d = head_dim / 2."""
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.stack((angle.cos(), angle.sin()))


class TokenShift(nn.Module):
    """A quarter of each token's channels become those of the token before, a quarter those of the code above
    (of a word: of the word before). What lies beyond an edge is 0.

    So every layer compares neighbours without having to learn an attention that finds them (DALLE-pytorch's
    `shift_tokens`).
    """

    def __init__(self, text_length: int, grid: int, width: int):
        super().__init__()
        self.text_length, self.grid, self.quarter = text_length, grid, width // 4

    def forward(self, x: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        left, above, own = x.tensor_split((self.quarter, 2 * self.quarter), dim=2)
        words, codes = above.tensor_split((self.text_length,), dim=1)
        lowered = F.pad(codes, (0, 0, self.grid, 0))[:, : codes.shape[1]]
        above = torch.cat((F.pad(words, (0, 0, 1, -1)), lowered), dim=1)
        return torch.cat((F.pad(left, (0, 0, 1, -1)), above, own), dim=2)

    def kept(self, x: Float[Tensor, "B M D"]) -> tuple[Float[Tensor, "B q"], Float[Tensor, "B g q"]]:
        """What `step` needs of a stream that ends here. The row is a ring: code r is at place r % grid."""
        left, above, _ = x.tensor_split((self.quarter, 2 * self.quarter), dim=2)
        codes = x.shape[1] - self.text_length
        row = above.new_zeros(len(x), self.grid, self.quarter)
        last = torch.arange(max(codes - self.grid, 0), codes, device=x.device)
        row[:, last % self.grid] = above[:, self.text_length + last]
        return left[:, -1], row

    def step(
        self,
        x: Float[Tensor, "B 1 D"],
        rank: Place,
        left: Float[Tensor, "B q"],
        above: Float[Tensor, "B g q"],
    ) -> Float[Tensor, "B 1 D"]:
        """Of the code of this rank alone; `left` and `above` are brought up to date."""
        own = x.tensor_split((self.quarter, 2 * self.quarter), dim=2)
        column = rank % self.grid
        shifted = torch.cat((left[:, None], at(above, 1, column), own[2]), dim=2)
        left.copy_(own[0][:, 0])
        put(above, 1, column, own[1])
        return shifted


class Attention(nn.Module):
    """Multi-head self-attention over a whole stream, or of its newest token over those in a cache."""

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv = StepLinear(width, 3 * width, bias)
        self.out = StepLinear(width, width, bias)

    def project(
        self, x: Float[Tensor, "B M D"], rotation: Float[Tensor, "2 M d"] | None
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B M 2*D"]]:
        """Queries, and keys | values; queries and keys rotated to their positions."""
        qkv = self.qkv(x)
        if rotation is not None:
            qk, v = qkv.split((2 * self.width, self.width), dim=2)
            a, b = qk.unflatten(2, (2 * self.heads, 2, -1)).unbind(3)  # (B, M, 2 heads, d)
            cos, sin = rotation[:, :, None]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=3).flatten(2)
            qkv = torch.cat((turned.to(v.dtype), v), dim=2)
        q, kv = qkv.split((self.width, 2 * self.width), dim=2)
        return q, kv

    def forward(
        self,
        x: Float[Tensor, "B M D"],
        rotation: Float[Tensor, "2 M d"] | None,
        mask: Bool[Tensor, "M M"] | BlockMask | None,
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B M 2*D"]]:
        """Without a mask, causal. Also gives the keys | values, for those who cache them."""
        q, kv = self.project(x, rotation)
        return self.out(attend(q, kv, self.heads, mask, causal=mask is None)), kv

    def step(
        self,
        x: Float[Tensor, "B 1 D"],
        rotation: Float[Tensor, "2 1 d"] | None,
        cache: Float[Tensor, "2 B H S e"],
        position: Place,
        keys: Int64[Tensor, "M"] | None,
        mask: Float[Tensor, "1 M"] | None,
    ) -> Float[Tensor, "B 1 D"]:
        """Writes the token into the cache, then attends to what is there: all of it, or what lies at `keys`,
        less what the mask (`hidden`) takes away.
        """
        q, kv = self.project(x, rotation)
        own = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (2, B, H, 1, e)
        put(cache, 3, position, own)
        if keys is not None:
            cache = gathered(cache, 3, keys)
        elif mask is None:
            cache = cache[..., : position + 1, :]
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)
        out = attend_one(q, cache[0], cache[1], mask)  # (B, H, 1, d)
        return self.out(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers, 4 x as wide between them; gated (SwiGLU), 8/3 x, which is as many weights."""

    def __init__(self, width: int, bias: bool, gated: bool):
        super().__init__()
        hidden = 64 * math.ceil(width / 24) if gated else 4 * width
        self.gated = gated
        self.proj_in = StepLinear(width, (1 + gated) * hidden, bias)
        self.out = StepLinear(hidden, width, bias)

    def forward(self, x: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        x = self.proj_in(x)
        if not self.gated:
            return self.out(F.gelu(x))
        gate, x = x.chunk(2, dim=2)
        return self.out(F.silu(gate) * x)


class Layer(nn.Module):
    """Pre-norm residual attention and MLP, each of the tokens themselves or of what `shift` makes of them."""

    def __init__(self, width: int, heads: int, dropout: float, style: str, shift: TokenShift | None):
        super().__init__()
        llama = style == "llama"
        self.norm1, self.norm2 = norm(width, style), norm(width, style)
        self.attention = Attention(width, heads, bias=not llama)
        self.mlp = MLP(width, bias=not llama, gated=llama)
        self.dropout = nn.Dropout(dropout)
        self.shift = shift

    def forward(
        self,
        x: Float[Tensor, "B M D"],
        rotation: Float[Tensor, "2 M d"] | None,
        mask: Bool[Tensor, "M M"] | BlockMask | None,
    ) -> tuple[Float[Tensor, "B M D"], tuple[Tensor, Tensor, Tensor]]:
        """Also gives what a cache is made of: keys | values, and what the two parts read before the shift."""
        shift = self.shift or nn.Identity()
        read1 = self.norm1(x)
        attended, kv = self.attention(shift(read1), rotation, mask)
        x = x + self.dropout(attended)
        read2 = self.norm2(x)
        return x + self.dropout(self.mlp(shift(read2))), (kv, read1, read2)

    def step(
        self,
        x: Float[Tensor, "B 1 D"],
        rank: Place,
        left: Float[Tensor, "2 B q"] | None,
        above: Float[Tensor, "2 B g q"] | None,
        *past,
    ) -> Float[Tensor, "B 1 D"]:
        """One code, after what is in the cache; `past` is what `Attention.step` takes besides."""

        def read(x: Tensor, part: int) -> Tensor:
            if self.shift is None or left is None or above is None:
                return x
            return self.shift.step(x, rank, left[part], above[part])

        x = x + self.attention.step(read(self.norm1(x), 0), *past)
        return x + self.mlp(read(self.norm2(x), 1))


class FactorizedEmbedding(nn.Module):
    """What codes with a digit in common share: a vector for each level of each digit, to read and to write.

    Codes of finite scalar quantization are numbers of such digits, the least first. Neighbours in them look
    alike, and most of a few thousand codes are rare: a table of independent vectors learns each by itself.
    Where digits come in groups (a patch's pattern, its colours), codes share a whole group's, too.

    spread (K, V) has a one for each of the V vectors that a code is the sum of.
    """

    spread: Float[Tensor, "K V"]

    def __init__(self, levels: Sequence[int] | Sequence[Sequence[int]], width: int):
        super().__init__()
        groups = grouped(levels)
        code, spread = torch.arange(math.prod(map(math.prod, groups))), []
        for group in groups:
            sizes = [math.prod(group)] if len(groups) > 1 and len(group) > 1 else []
            spread += [F.one_hot(code % size, size) for size in sizes]
            for level in group:
                spread.append(F.one_hot(code % level, level))
                code = code // level
        self.register_buffer("spread", torch.cat(spread, dim=1).float(), persistent=False)
        self.read = nn.Parameter(torch.empty(self.spread.shape[1], width))
        self.write = nn.Parameter(torch.empty(self.spread.shape[1], width))
        for part in (self.read, self.write):
            nn.init.normal_(part, std=0.02 / math.sqrt(len(spread)))


def norm(width: int, style: str) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6) if style == "llama" else nn.LayerNorm(width)


class DALLE(nn.Module):
    """Captions and codes -> logits of the next text token and of the next code.

    A caption's start token comes first, its end token has the largest id, and what follows is padding, which
    becomes id `text_vocab` + position: one learned token per position (sec. 2.2), never masked out.

    Args:
        text_vocab, text_length: ids of the text tokenizer (without the paddings here), and the length T.
        image_vocab, grid: ids of the image tokenizer, and the side of its square of N = grid^2 codes.
        image_levels: of the digits that its ids are made of (`FactorizedEmbedding`), whose product is
            `image_vocab`; in lists, of those that belong together.
        attention: full, row, column, conv, or dalle, the paper's order of the sparse ones.
        kernel: side of the square that a conv layer sees, odd.
        style: gpt (LayerNorm, GELU, learned text positions) or llama (RMSNorm, SwiGLU, no biases, rotary
            over the stream in place of text positions). Both learn rows and columns, of which a rotation over
            the stream knows nothing.
        shift: every layer reads part of the token before and of the code above (`TokenShift`).
        checkpoint: recompute each layer in the backward pass.

    Raises:
        UserError: an unknown attention or style, or sizes that do not fit.
    """

    layers: Any  # of Layer
    sights: Any  # of SparseMask, by kind
    rotation: Float[Tensor, "2 S d"] | None
    layer_step = staticmethod(Layer.step)
    stride = 128  # of the lengths that `reach` gives: each is a graph of its own, and reads its whole length

    def __init__(
        self,
        text_vocab: Vocabulary,
        text_length: Length,
        image_vocab: Vocabulary,
        grid: Side,
        width: Width,
        depth: Depth,
        heads: PositiveInt,
        attention: str = "full",
        kernel: PositiveInt = 3,
        dropout: Dropout = 0.0,
        style: str = "gpt",
        shift: bool = False,
        checkpoint: Checkpoint = False,
        *,
        image_levels: Levels | None,
    ):
        super().__init__()
        made = math.prod(map(math.prod, grouped(image_levels or ())))
        if image_levels is not None and made != image_vocab:
            raise UserError(
                f"DALLE: image_levels={image_levels} make {made} codes, but image_vocab={image_vocab}."
            )
        if attention not in ATTENTION:
            raise UserError(f"DALLE: attention is one of {', '.join(ATTENTION)}, not {attention!r}.")
        if style not in STYLES:
            raise UserError(f"DALLE: style is one of {', '.join(STYLES)}, not {style!r}.")
        if depth < 1:
            raise UserError(f"DALLE: depth {depth} leaves no layer.")
        if width % heads or (style == "llama" and width // heads % 2):
            even = " an even number of times" if style == "llama" else ""
            raise UserError(f"DALLE: {heads} heads do not divide width {width}{even}.")
        if kernel < 1 or kernel % 2 == 0:
            raise UserError(f"DALLE: kernel is an odd number, not {kernel}.")
        self.text_vocab, self.text_length = text_vocab, text_length
        self.image_vocab, self.grid, self.codes = image_vocab, grid, grid * grid
        self.width, self.heads, self.checkpoint = width, heads, checkpoint

        self.text_embedding = nn.Embedding(text_vocab + text_length, width)
        self.image_embedding = nn.Embedding(image_vocab, width)
        self.text_position = nn.Embedding(text_length, width) if style == "gpt" else None
        self.row, self.column = nn.Embedding(grid, width), nn.Embedding(grid, width)
        self.shift = TokenShift(text_length, grid, width) if shift else None
        self.layers = nn.ModuleList(Layer(width, heads, dropout, style, self.shift) for _ in range(depth))
        self.norm = norm(width, style)
        self.text_head = Unembedding(width, text_vocab + text_length)
        self.image_head = Unembedding(width, image_vocab)
        self.digits = None if image_levels is None else FactorizedEmbedding(image_levels, width)

        self.kinds = layer_kinds(attention, depth)
        kinds = sorted(set(self.kinds) - {"full"})
        self.sights = nn.ModuleDict(
            {kind: SparseMask(text_length, grid, offsets(kind, grid, kernel)) for kind in kinds}
        )
        rotation = rotations(text_length + self.codes, width // heads) if style == "llama" else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's: what is added to the residual stream shrinks with the number of layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            for out in (layer.attention.out, layer.mlp.out):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * len(self.layers)))
        if self.digits is not None:  # a code starts as little but its digits
            for table in (self.image_embedding, self.image_head):
                nn.init.normal_(table.weight, std=0.002)

    def read_codes(self, codes: Int64[Tensor, "*N"]) -> Float[Tensor, "*N D"]:
        x = self.image_embedding(codes)
        return x if self.digits is None else x + self.digits.spread[codes] @ self.digits.read

    def code_logits(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N K"]:
        """In fp32."""
        own = self.image_head.weight
        if self.digits is None:
            return linear_fp32(x, own)
        spread, write = self.digits.spread, self.digits.write
        if x.shape[:-1].numel() < self.width:  # one code at a time: less than adding up the table
            return linear_fp32(x, own) + linear_fp32(linear_fp32(x, write), spread)
        return linear_fp32(x, own + linear_fp32(spread, write.T))

    def padded(
        self, text: Int64[Tensor, "B T"], keep_text: Bool[Tensor, "B"] | None = None
    ) -> Int64[Tensor, "B T"]:
        """The ids that the network reads, paddings replaced; all are where `keep_text` is false."""
        if text.shape[1] != self.text_length:
            raise ValueError(f"captions of {text.shape[1]} ids; this DALLE takes {self.text_length}")
        position = torch.arange(self.text_length, device=text.device)
        real = position <= text.argmax(dim=1, keepdim=True)
        if keep_text is not None:
            real = real & keep_text[:, None]
        return torch.where(real, text, self.text_vocab + position)

    def tokens(
        self, text: Int64[Tensor, "B T"], codes: Int64[Tensor, "B P"], keep_text: Bool[Tensor, "B"] | None
    ) -> Float[Tensor, "B M D"]:
        """The embedded stream, M = T + P: token + position, token + row + column (Fig. 10)."""
        words = self.text_embedding(self.padded(text, keep_text))
        if self.text_position is not None:
            words = words + self.text_position.weight
        places = (self.row.weight[:, None] + self.column.weight).flatten(0, 1)
        return torch.cat((words, self.read_codes(codes) + places[: codes.shape[1]]), dim=1)

    def through(self, x: Float[Tensor, "B M D"], kept: list[Any] | None = None) -> Float[Tensor, "B M D"]:
        """All layers over the first M tokens of the stream; what caches are made of is appended to `kept`."""
        rotation = None if self.rotation is None else self.rotation[:, : x.shape[1]]
        length = x.shape[1]
        if self.training and worth_skipping(x, self.heads):
            masks = {kind: sight.blocks(length) for kind, sight in self.sights.items()}
        else:
            masks = {kind: sight.mask[:length, :length] for kind, sight in self.sights.items()}
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            if self.checkpoint and self.training:
                x, read = recomputed(self.checkpoint, layer, x, rotation, masks.get(kind))
            else:
                x, read = layer(x, rotation, masks.get(kind))
            if kept is not None:
                kept.append(read)
        return self.norm(x)

    def forward(
        self,
        text: Int64[Tensor, "B T"],
        codes: Int64[Tensor, "B N"],
        keep_text: Bool[Tensor, "B"] | None = None,
        text_loss: bool = True,
    ) -> tuple[Float[Tensor, "B U V"] | None, Float[Tensor, "B N K"]]:
        """-> fp32 logits of text[:, 1:], paddings included (B, T - 1, text_vocab + T), and of all codes.

        Without `text_loss` the first are None and cost nothing.
        """
        x = self.through(self.tokens(text, codes[:, :-1], keep_text))
        last = self.text_length - 1  # the last text token already says the first code
        text_logits = linear_fp32(x[:, :last], self.text_head.weight) if text_loss else None
        return text_logits, self.code_logits(x[:, last:])

    def prefill(
        self,
        text: Int64[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
        codes: Int64[Tensor, "B P"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "B K"], Cache]:
        """-> logits of the code after the text and the P first `codes`, and the cache `step` goes on with.

        The cache holds the whole stream, so that no step allocates; one that is given is used again.
        """
        codes = text[:, :0] if codes is None else codes
        kept: list[Any] = []
        x = self.through(self.tokens(text, codes, keep_text), kept)
        b, m, _ = x.shape
        left = above = None
        if self.shift is not None:
            parts = [self.shift.kept(read) for _, *reads in kept for read in reads]
            left, above = (torch.stack(part).unflatten(0, (-1, 2)) for part in zip(*parts, strict=True))
        if cache is None:
            size = (len(kept), 2, b, self.heads, self.text_length + self.codes - 1, self.width // self.heads)
            cache = Cache(kept[0][0].new_zeros(size), left, above)  # what is masked is multiplied by 0
        for old, new in ((cache.left, left), (cache.above, above)):
            if old is not None and new is not None:
                old.copy_(new)
        for layer, (kv, *_) in zip(cache.kv, kept, strict=True):
            layer[..., :m, :] = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.code_logits(x[:, -1]), cache

    def reach(self, rank: int) -> int:
        """A length of the cache (`Cache.upto`) that is enough for the step after the code of this rank."""
        whole = self.text_length + self.codes - 1
        if "full" not in self.kinds:  # they pick what they read
            return whole
        return min(-(-(self.text_length + rank + 1) // self.stride) * self.stride, whole)

    def compile_step(self) -> None:
        """Steps whose rank is a tensor go through `torch.compile`, layer by layer: all are one graph."""
        self.layer_step = torch.compile(Layer.step, fullgraph=True)

    def step(self, code: Int64[Tensor, "B"], rank: Place, cache: Cache) -> Float[Tensor, "B K"]:
        """Logits of the code after `code`, which is the one of raster rank `rank` (from 0).

        With the rank as a tensor, nothing is decided on the host, and all steps of a `reach` are one graph.
        `net.step = torch.compile(net.step, dynamic=True)` makes one graph for all ranks that are numbers.
        """
        row, column = at(self.row.weight, 0, rank // self.grid), at(self.column.weight, 0, rank % self.grid)
        x, position = self.read_codes(code) + row + column, self.text_length + rank
        x = x[:, None]
        rotation = None if self.rotation is None else at(self.rotation, 1, position)
        sights = {
            kind: (at(sight.keys, 0, rank)[0], hidden(at(sight.seen, 0, rank), cache.kv.dtype))
            for kind, sight in self.sights.items()
        }
        mask = None
        if isinstance(position, Tensor):
            places = torch.arange(cache.kv.shape[4], device=position.device)
            mask = hidden(places[None] <= position, cache.kv.dtype)
        nothing = [None] * len(self.layers)
        left = nothing if cache.left is None else cache.left
        above = nothing if cache.above is None else cache.above
        step = self.layer_step if isinstance(rank, Tensor) else Layer.step
        for layer, kind, kv, *edge in zip(self.layers, self.kinds, cache.kv, left, above, strict=True):
            x = step(layer, x, rank, *edge, rotation, kv, position, *sights.get(kind, (None, mask)))
        return self.code_logits(self.norm(x))[:, 0]
