"""A trained CLIP as the data side of the next stages sees it: frozen, with its tokenizer, in float32."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle.data.tokenizers import TextTokenizer


class FrozenCLIP(nn.Module):
    """Turns images and captions into embeddings; never trains, whatever its owner does.

    `net` has `image_size`, `embed_dim`, `text_width`, `context_length`, `encode_image(image in [-1, 1])` and
    `encode_text(text) -> (embedding, states, mask)`: `dalle.nets.clip.CLIP` or a wrapped open_clip model.

    Embeddings do not depend on an autocast around them, so that cached ones and fresh ones are the same.
    """

    def __init__(self, net: nn.Module, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self.net: Any = net.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.training = False
        self.image_size: int = self.net.image_size
        self.embed_dim: int = self.net.embed_dim
        self.text_width: int = self.net.text_width
        self.context_length: int = self.net.context_length

    def train(self, mode: bool = True) -> "FrozenCLIP":
        """Stays in evaluation mode: a Trainer puts all it finds into training mode."""
        return self

    @cached_property
    def weights_hash(self) -> str:
        """Short hash of the weights: embeddings of another CLIP are refused by it."""
        return weights_hash(self.net)

    @torch.no_grad()
    def embed_image(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Images in [-1, 1] of any size -> projected embeddings, not normalised."""
        with torch.autocast(image.device.type, enabled=False):
            return self.net.encode_image(image.float()).float()

    @torch.no_grad()
    def embed_text(self, text: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """Ids -> text_embed (B, E), not normalised; text_hidden (B, T, D); text_mask (B, T), True = real."""
        with torch.autocast(text.device.type, enabled=False):
            embed, hidden, mask = self.net.encode_text(text)
        return {"text_embed": embed.float(), "text_hidden": hidden.float(), "text_mask": mask}

    def embed_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> what `embed_text` gives, and the ids as `text` (B, T)."""
        device = next(self.net.parameters()).device
        text = self.tokenizer(captions).to(device)
        return {"text": text, **self.embed_text(text)}


def weights_hash(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, types, shapes and bytes of all saved tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
