"""Trained networks as the data side of the next stages sees them: frozen and in float32, or bf16 where asked.

What they make does not depend on an autocast around them, so that what was kept on disk and what is made
afresh are the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from dalle.data.tokenizers import TextTokenizer
from dalle.weight_names import first_name

FROZEN = ("clip", "image_tokenizer")  # what a DataModule, its settings and a manifest call them


class Frozen(nn.Module):
    """A network that never trains, whatever its owner does, and is known by the hash of its weights.

    Args:
        bf16: compute in bf16, convolutions channels-last; the weights stay as they are.
    """

    def __init__(self, net: nn.Module, bf16: bool = False) -> None:
        super().__init__()
        self.net: Any = net.eval().requires_grad_(False)
        self.bf16 = bf16
        if bf16:
            self.net.to(memory_format=torch.channels_last)
        self.training = False
        self.image_size: int = self.net.image_size

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in evaluation mode: a Trainer puts all it finds into training mode."""
        return self

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def precision(self, device: torch.device) -> torch.autocast:
        """What it computes under, whatever is around it."""
        return torch.autocast(device.type, torch.bfloat16 if self.bf16 else None, enabled=self.bf16)

    def pictures(self, image: Tensor) -> Tensor:
        """As it takes them."""
        image = image.float()
        return image.contiguous(memory_format=torch.channels_last) if self.bf16 else image

    @property
    def made_by(self) -> list[str]:
        """What tells what it makes from what others make, or the same one in another precision."""
        return [self.weights_hash, *(["bf16"] if self.bf16 else [])]

    @cached_property
    def weights_hash(self) -> str:
        """Short hash of the weights: what another network made is refused by it."""
        return weights_hash(self.net)


class FrozenCLIP(Frozen):
    """Turns images and captions into embeddings.

    `net` has `image_size`, `embed_dim`, `text_width`, `context_length`, `encode_image(image in [-1, 1])` and
    `encode_text(text) -> (embedding, states, mask)`: `dalle.nets.clip.CLIP` or a wrapped open_clip model.
    """

    def __init__(self, net: nn.Module, tokenizer: TextTokenizer, bf16: bool = False) -> None:
        super().__init__(net, bf16)
        self.tokenizer = tokenizer
        self.embed_dim: int = self.net.embed_dim
        self.text_width: int = self.net.text_width
        self.context_length: int = self.net.context_length

    @torch.no_grad()
    def embed_image(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Images in [-1, 1] of any size -> projected embeddings, not normalised."""
        with self.precision(image.device):
            return self.net.encode_image(self.pictures(image)).float()

    @torch.no_grad()
    def embed_text(self, text: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """Ids -> text_embed (B, E), not normalised; text_hidden (B, T, D); text_mask (B, T), True = real."""
        with self.precision(text.device):
            embed, hidden, mask = self.net.encode_text(text)
        return {"text_embed": embed.float(), "text_hidden": hidden.float(), "text_mask": mask}

    def embed_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> what `embed_text` gives, and the ids as `text` (B, T)."""
        text = self.tokenizer(captions).to(self.device)
        return {"text": text, **self.embed_text(text)}


class FrozenTokenizer(Frozen):
    """Turns images into codes and codes into images: a dVAE or a VQGAN as the transformer sees it.

    `net` has `image_size`, `vocab_size` (K), `grid` (side; N = grid ** 2 codes in raster order),
    `encode(image in [-1, 1]) -> codes` and `decode(codes) -> image`: `dalle.nets.dvae.DVAE`,
    `dalle.nets.vqgan.VQGAN`. Where codes are digits, `levels` says how many values each has, the least first.
    """

    def __init__(self, net: nn.Module, bf16: bool = False) -> None:
        super().__init__(net, bf16)
        self.vocab_size: int = self.net.vocab_size
        self.grid: int = self.net.grid
        self.levels: list[Any] | None = getattr(self.net, "levels", None)

    @torch.no_grad()
    def encode(self, image: Float[Tensor, "b 3 h w"]) -> Int64[Tensor, "b n"]:
        """Images in [-1, 1] of the network's size -> codes in [0, K). Another size: UserError."""
        with self.precision(image.device):
            return self.net.encode(self.pictures(image))

    @torch.no_grad()
    def decode(self, codes: Int64[Tensor, "b n"]) -> Float[Tensor, "b 3 h w"]:
        """Codes -> images in [-1, 1]."""
        with self.precision(codes.device):
            return self.net.decode(codes).float().clamp(-1, 1)


def frozen_of(datamodule: Any) -> dict[str, Frozen]:
    """The frozen networks that a DataModule works with, by name."""
    found = {name: getattr(datamodule, name, None) for name in FROZEN}
    return {name: net for name, net in found.items() if net is not None}


def weights_hash(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over first names, types, shapes and bytes of all saved tensors."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The same of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items(), key=lambda item: first_name(item[0])):
        digest.update(f"{first_name(name)} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
