"""Named normalisations of CLIP image embeddings, the space in which a prior works.

Ramesh et al. 2022 (DALL-E 2) train the prior on unit embeddings scaled by 17.2; at their dimension 1024 that
is a standard deviation of 0.5375 per dimension, that of ImageNet pixels in [-1, 1]. `unit_times_sqrt_dim`
keeps it at any dimension: |z| = 0.5375 sqrt(E).
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from dalle.errors import UserError

Kind = Literal["none", "unit", "unit_times_sqrt_dim", "standardized"]

UNIT: tuple[Kind, ...] = ("unit", "unit_times_sqrt_dim")  # all embeddings have one length

STD_PER_DIM = 17.2 / 1024**0.5  # 0.5375
SMALLEST_STD = 1e-6  # a dimension that never moves is left at zero, not blown up


class EmbedNorm:
    """Maps raw CLIP embeddings (B, E) to the space a prior works in, and back.

    Args:
        kind: `none`; `unit` (length 1); `unit_times_sqrt_dim` (length 0.5375 sqrt(E)); `standardized` (zero
            mean and unit variance per dimension, measured by `fit`).
        mean, std: (E,), only for `standardized`.
    """

    def __init__(self, kind: str, mean: Tensor | None = None, std: Tensor | None = None):
        if kind not in get_args(Kind):
            raise UserError(f"image_embed_norm={kind} is unknown; choose one of {', '.join(get_args(Kind))}")
        self.kind, self.mean, self.std = kind, mean, std

    @property
    def needs_fit(self) -> bool:
        return self.kind == "standardized" and self.mean is None

    def fit(self, embeds: Float[Tensor, "n e"]) -> "EmbedNorm":
        """Measures mean and standard deviation per dimension; nothing to do for the other kinds."""
        if self.kind == "standardized":
            self.mean = embeds.double().mean(0).float()
            self.std = embeds.double().std(0, correction=0).float().clamp(min=SMALLEST_STD)
        return self

    def encode(self, raw: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        if self.kind == "none":
            return raw
        if self.kind == "standardized":
            mean, std = self._statistics(raw)
            return (raw - mean) / std
        return normalize(raw, dim=-1) * self.scale(raw.shape[-1])

    def decode(self, normalised: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        """The unit vector for the two unit kinds (the length is lost), the raw embedding for the others."""
        if self.kind == "none":
            return normalised
        if self.kind == "standardized":
            mean, std = self._statistics(normalised)
            return normalised * std + mean
        return normalize(normalised, dim=-1)

    def project(self, normalised: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        """The nearest that an encoded embedding can be: of the right length for the two unit kinds."""
        return self.encode(self.decode(normalised)) if self.kind in UNIT else normalised

    def dot(self, normalised: Float[Tensor, "b e"], text: Float[Tensor, "b e"]) -> Float[Tensor, " b"]:
        """Dot products with caption embeddings: of unit vectors where these are, else of raw ones."""
        if self.kind in UNIT:
            return cosine_similarity(normalised, text)
        return (self.decode(normalised) * text).sum(1)

    def scale(self, dim: int) -> float:
        """Length of an encoded vector of the two unit kinds."""
        return STD_PER_DIM * dim**0.5 if self.kind == "unit_times_sqrt_dim" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; float32 values survive the trip exactly."""
        if self.mean is None or self.std is None:
            return {"kind": self.kind}
        return {"kind": self.kind, "mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "EmbedNorm":
        mean, std = (None if state.get(k) is None else torch.tensor(state[k]) for k in ("mean", "std"))
        return cls(state["kind"], mean, std)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean is None or self.std is None:
            raise UserError("image_embed_norm=standardized is not fitted yet: fit it on training embeddings")
        return self.mean.to(like), self.std.to(like)
