"""GLIDE's encoder of captions (Nichol et al. 2021), in the place of a CLIP: for its weights.

Names of weights are those of OpenAI's release. It sees the caption both ways, and learned pads after it,
which its decoder attends to as to words. What stands for the whole caption is the state of the last place.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.ranges import Depth, Length, PositiveInt, Vocabulary, Width


class Attention(nn.Module):
    """Rows of `c_qkv` have query, key and value of each head after one another."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_qkv, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.c_qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        for block in self.resblocks:
            x = block(x)
        return x


class GlideText(nn.Module):
    """Ids (B, T) -> states (B, T, D); a `CLIPNet` that embeds captions alone. The largest id is the pad.

    Raises:
        UserError: the heads do not divide the width, or it is asked for embeddings of pictures.
    """

    image_size = 64  # of the decoder's pictures

    def __init__(
        self, vocab_size: Vocabulary, context_length: Length, width: Width, layers: Depth, heads: PositiveInt
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"GlideText: {heads} heads do not divide width {width}.")
        self.embed_dim = self.text_width = width
        self.vocab_size, self.context_length = vocab_size, context_length
        self.logit_scale = torch.zeros(())  # of a contrastive loss, which it has none of
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.padding_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers, heads)
        self.final_ln = nn.LayerNorm(width)

    def encode_text(
        self, text: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """The last state, all of them, and that all count."""
        real = text != self.vocab_size - 1
        x = self.token_embedding(text) + self.positional_embedding
        x = torch.where(real[..., None], x, self.padding_embedding.to(x.dtype))
        hidden = self.final_ln(self.transformer(x))
        return hidden[:, -1], hidden, torch.ones_like(real)

    def encode_image(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        raise UserError("GLIDE's encoder of captions embeds no pictures; this needs a CLIP")

    def forward(
        self, image: Float[Tensor, "b 3 h w"], text: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"], Float[Tensor, ""]]:
        return self.encode_image(image), self.encode_text(text)[0], self.logit_scale.exp()
