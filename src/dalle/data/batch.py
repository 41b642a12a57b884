"""The one vocabulary of batches, from every DataModule to every stage."""

from typing import Any, TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """Every DataModule fills the keys its stage needs. B batch, T text, D width, E embedding, N tokens."""

    image: Tensor  # (B, 3, H, W) float32 in [-1, 1]; until the batch is on its device it may be uint8
    square: Tensor  # (B, 3, S, S), the same in the shape that CLIP sees, where pictures are oblong
    low: Tensor  # (B, 3, h, w) float32 in [-1, 1], the same pictures made small, for an upsampler
    caption: list[str]  # B captions
    index: Tensor  # (B,) int64, the item's number in its split
    text: Tensor  # (B, T) int64 token ids
    text_embed: Tensor  # (B, E) float32, CLIP's raw text embedding
    text_hidden: Tensor  # (B, T, D) float32, CLIP's last text states
    text_mask: Tensor  # (B, T) bool, True = a real token, start and end included
    image_embed: Tensor  # (B, E) float32, normalised as `EmbedNorm` says
    known: Tensor  # (B, 4, H, W) float32, what is known of pictures, and 1 where something is
    codes: Tensor  # (B, N) int64, dVAE image tokens


def text_of(batch: Batch, ids: bool = False) -> dict[str, Any]:
    """The part of a batch that says what the caption says; with the token `ids`, for who reads them anew."""
    said = {key: batch[key] for key in ("text_embed", "text_hidden", "text_mask")}
    return said | {"text": batch["text"]} if ids else said
