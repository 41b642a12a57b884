"""The network of the diffusion prior: a causal transformer (DALL-E 2, sec. 2.2 and App. C).

Sequence: text states | caption embedding | time | noised image embedding | learned query; the answer is
read at the query. The states are CLIP's, to which layers of the prior's own can add what they make of the
token ids. Text pads, and all text of a dropped caption, become learned tokens, one per position
(DALL-E sec. 2.2), so no key is masked but by causality. And because it is causal, the text part knows
nothing of time and noise: `prefix` computes its keys and values once, and every sampling step then runs
three tokens only.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.blocks import MLP, Attention, TimeMLP, keep_or_null
from dalle.nets.recompute import Checkpoint, recomputed
from dalle.ranges import Depth, Dropout, Layers, Length, PositiveInt, Vocabulary, Width

Cache = list[Tensor]  # keys | values (B, T + 1, 2 * width) of the text part, for each layer


class Layer(nn.Module):
    """Pre-norm attention and MLP, causal or not. With `past`, the tokens of `x` come after those keys and
    values.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True):
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B N D"], past: Float[Tensor, "B M 2*D"] | None = None
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N 2*D"]]:
        attended, own = self.attention(self.norm1(x), past, causal=self.causal)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm2(x))), own


class Prior(nn.Module):
    """x_t (B, E), t (B,) and the text -> the prediction (B, E); zero at birth.

    embed_dim, text_width: sizes of CLIP's embeddings and text states; context_length: its longest text.
    text_layers: so many layers of its own read the token ids, of `vocab_size`, in both directions, and add to
        CLIP's text states what these have lost, as which of two objects is left.
    checkpoint: recompute each layer in the backward pass.
    """

    def __init__(
        self,
        embed_dim: Width,
        text_width: Width,
        context_length: Length,
        vocab_size: Vocabulary,
        width: Width,
        depth: Depth,
        heads: PositiveInt,
        text_layers: Layers = 0,
        dropout: Dropout = 0.0,
        checkpoint: Checkpoint = False,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"Prior: {heads} heads do not divide width {width}.")
        self.embed_dim, self.text_width, self.context_length = embed_dim, text_width, context_length
        self.width, self.checkpoint = width, checkpoint
        self.text_norm = nn.LayerNorm(embed_dim)  # a caption embedding's length carries no meaning in CLIP
        self.text_in = nn.Linear(embed_dim, width)
        if text_layers:
            self.words = nn.Embedding(vocab_size, width)
            self.word_position = nn.Parameter(torch.empty(context_length, width))
        self.text_layers = nn.ModuleList(Layer(width, heads, dropout, False) for _ in range(text_layers))
        self.hidden_in = nn.Linear(text_width, width)
        self.time = TimeMLP(width, width)
        self.image_in = nn.Linear(embed_dim, width)
        self.null_hidden = nn.Parameter(torch.empty(context_length, width))
        self.null_text = nn.Parameter(torch.empty(width))
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(context_length + 4, width))
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, embed_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """CLIP's text transformer init (residual outputs shrunk with depth), and an output of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        for layers in (self.text_layers, self.layers):
            for module in layers.modules():
                if isinstance(module, (Attention, MLP)):
                    fan = 2 * len(layers) * module.out.in_features
                    nn.init.normal_(module.out.weight, std=fan**-0.5)
        for free in (self.null_hidden, self.null_text, self.query):
            nn.init.normal_(free, std=self.width**-0.5)
        nn.init.normal_(self.position, std=0.01)
        if self.text_layers:  # positions as loud as words: order is what these layers are for
            nn.init.normal_(self.words.weight, std=0.5)
            nn.init.normal_(self.word_position, std=0.3)
        nn.init.zeros_(self.out.weight)

    def text_tokens(
        self,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
        text: Int64[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        length = text_hidden.shape[1]
        if length > self.context_length:
            raise ValueError(f"text of {length} tokens; this prior takes at most {self.context_length}.")
        real = text_mask if keep_text is None else text_mask & keep_text[:, None]
        hidden = self.hidden_in(text_hidden)
        if self.text_layers:
            hidden = hidden + self.read(text)
        hidden = torch.where(real[..., None], hidden, self.null_hidden[:length].to(hidden.dtype))
        pooled = keep_or_null(keep_text, self.text_in(self.text_norm(text_embed)), self.null_text)
        position = torch.cat((self.position[:length], self.position[-4:-3]))
        return torch.cat((hidden, pooled[:, None]), dim=1) + position

    def read(self, text: Int64[Tensor, "B T"] | None) -> Float[Tensor, "B T D"]:
        """What the layers of its own make of the token ids."""
        if text is None:
            raise ValueError("this prior has text_layers, so it needs the token ids as text.")
        words = self.words(text) + self.word_position[: text.shape[1]]
        for layer in self.text_layers:
            words, _ = self.run(layer, words)
        return words

    def run(self, layer: nn.Module, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.checkpoint and self.training:
            return recomputed(self.checkpoint, layer, x, past)
        return layer(x, past)

    def image_tokens(self, x: Float[Tensor, "B E"], t: Float[Tensor, "B"]) -> Float[Tensor, "B 3 D"]:
        time, image = self.time(t)[:, None], self.image_in(x)[:, None]
        query = self.query.to(image.dtype).expand(len(x), -1, -1)
        return torch.cat((time, image, query), dim=1) + self.position[-3:]

    def prefix(
        self,
        text_embed: Float[Tensor, "B E"],
        text_hidden: Float[Tensor, "B T S"],
        text_mask: Bool[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None = None,
        text: Int64[Tensor, "B T"] | None = None,
    ) -> Cache:
        """Keys and values of the text part, constant over sampling steps, for `forward(..., cache=)`."""
        tokens, cache = self.text_tokens(text_embed, text_hidden, text_mask, keep_text, text), []
        for layer in self.layers:
            tokens, own = layer(tokens)
            cache.append(own)
        return cache

    def forward(
        self,
        x: Float[Tensor, "B E"],
        t: Float[Tensor, "B"],
        *,
        text_embed: Float[Tensor, "B E"] | None = None,
        text_hidden: Float[Tensor, "B T S"] | None = None,
        text_mask: Bool[Tensor, "B T"] | None = None,
        keep_text: Bool[Tensor, "B"] | None = None,
        text: Int64[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B E"]:
        """Give the text, or the `cache` that `prefix` made of it (`keep_text` is in it already)."""
        tokens = self.image_tokens(x, t)
        if cache is None:
            if text_embed is None or text_hidden is None or text_mask is None:
                raise ValueError("the prior needs text_embed, text_hidden and text_mask, or a cache.")
            before = self.text_tokens(text_embed, text_hidden, text_mask, keep_text, text)
            tokens = torch.cat((before, tokens), dim=1)
        elif not (text_embed is text_hidden is text_mask is keep_text is text is None):
            raise ValueError("the text is in the cache: give one of them.")
        for i, layer in enumerate(self.layers):
            tokens, _ = self.run(layer, tokens, None if cache is None else cache[i])
        return self.out(self.norm(tokens[:, -1]))
