"""Named normalisations of CLIP image embeddings, the space in which a prior works.

Ramesh et al. 2022 (DALL-E 2) train the prior on unit embeddings scaled by 17.2; at their dimension 1024 that
is a standard deviation of 0.5375 per dimension, that of ImageNet pixels in [-1, 1]. `unit_times_sqrt_dim`
keeps it at any dimension: |z| = 0.5375 sqrt(E). `unit_variance` is DALLE2-pytorch's: |z| = sqrt(E).

A CLIP trained for minutes says most of what it knows along few directions, and the rest so quietly that a
prior loses it and a decoder does not find it. `whitened` makes all directions equally loud.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from dalle.errors import UserError
from dalle.nets.ar_prior import principal_components
from dalle.nets.blocks import linear_fp32

Kind = Literal["none", "unit", "unit_times_sqrt_dim", "unit_variance", "standardized", "whitened"]

# the length of the raw one is lost
UNIT: tuple[Kind, ...] = ("unit", "unit_times_sqrt_dim", "unit_variance", "whitened")
FITTED: tuple[Kind, ...] = ("standardized", "whitened")

STD_PER_DIM = 17.2 / 1024**0.5  # 0.5375
SMALLEST_STD = 1e-6  # a dimension that never moves is left at zero, not blown up
WHITE_FLOOR = 1e-3  # of the largest variance: directions far below it are noise, and stay quiet


class EmbedNorm:
    """Maps raw CLIP embeddings (B, E) to the space a prior works in, and back.

    Args:
        kind: `none`; `unit` (length 1); `unit_times_sqrt_dim` (length 0.5375 sqrt(E)); `unit_variance`
            (length sqrt(E)); `standardized` (zero mean and unit variance per dimension, measured by `fit`);
            `whitened` (the same along the principal components of the unit embeddings, each divided by
            sqrt(variance + 0.001 of the largest)).
        mean, std: (E,), for `standardized` and `whitened`.
        components: (E, E), directions as rows, for `whitened`.
    """

    def __init__(
        self,
        kind: str,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        components: Tensor | None = None,
    ):
        if kind not in get_args(Kind):
            raise UserError(f"image_embed_norm={kind} is unknown; choose one of {', '.join(get_args(Kind))}")
        self.kind, self.mean, self.std, self.components = kind, mean, std, components

    @property
    def needs_fit(self) -> bool:
        return self.kind in FITTED and self.mean is None

    def fit(self, embeds: Float[Tensor, "n e"]) -> "EmbedNorm":
        """Measures what the kind needs of raw training embeddings; nothing for most."""
        if self.kind == "standardized":
            self.mean = embeds.double().mean(0).float()
            self.std = embeds.double().std(0, correction=0).float().clamp(min=SMALLEST_STD)
        elif self.kind == "whitened":
            mean, variances, rows = principal_components(normalize(embeds, dim=-1))
            self.mean, self.components = mean.float(), rows.float()
            self.std = (variances + WHITE_FLOOR * variances[0]).sqrt().float().clamp(min=SMALLEST_STD)
        return self

    def fits(self, embed_dim: int) -> bool:
        """Whether what was measured is whole, and of embeddings of this size."""
        measured = {"mean": (embed_dim,), "std": (embed_dim,), "components": (embed_dim, embed_dim)}
        needed = {"standardized": ("mean", "std"), "whitened": tuple(measured)}.get(self.kind, ())
        for name, shape in measured.items():
            value = getattr(self, name)
            if (value is None) == (name in needed) or (value is not None and tuple(value.shape) != shape):
                return False
        return self.std is None or bool((self.std > 0).all())

    def encode(self, raw: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        match self.kind:
            case "none":
                return raw
            case "standardized":
                mean, std, _ = self._measured(raw)
                return (raw - mean) / std
            case "whitened":
                mean, std, components = self._measured(raw)
                return linear_fp32(normalize(raw, dim=-1) - mean, components) / std
        return normalize(raw, dim=-1) * self.scale(raw.shape[-1])

    def decode(self, normalised: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        """The unit vector for the unit kinds and `whitened` (the length is lost), else the raw embedding."""
        match self.kind:
            case "none":
                return normalised
            case "standardized":
                mean, std, _ = self._measured(normalised)
                return normalised * std + mean
            case "whitened":
                mean, std, components = self._measured(normalised)
                return normalize(linear_fp32(normalised * std, components.T) + mean, dim=-1)
        return normalize(normalised, dim=-1)

    def project(self, normalised: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        """The nearest that an encoded embedding can be: of a unit vector where the length is lost."""
        return self.encode(self.decode(normalised)) if self.kind in UNIT else normalised

    def shrink(self, start: Float[Tensor, "1 e"], raw: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
        """Raw embeddings less what leads from `start` along directions in which pictures do not vary.

        Captions' embeddings differ in such directions, too; `whitened` would make them louder than all that a
        decoder has seen. For the other kinds the embeddings themselves.
        """
        if self.kind != "whitened":
            return raw
        _, std, _ = self._measured(raw)
        share = 1 - WHITE_FLOOR / (1 + WHITE_FLOOR) * (std.max() / std) ** 2  # variance / (variance + floor)
        there = self.encode(start)
        return self.decode(there + share * (self.encode(raw) - there))

    def dot(self, normalised: Float[Tensor, "b e"], text: Float[Tensor, "b e"]) -> Float[Tensor, " b"]:
        """Dot products with caption embeddings: of unit vectors where the length is lost, else of raw."""
        decoded = self.decode(normalised)
        return cosine_similarity(decoded, text) if self.kind in UNIT else (decoded * text).sum(1)

    def scale(self, dim: int) -> float:
        """Length of an encoded vector of the unit kinds that are not fitted."""
        per_dim = {"unit_times_sqrt_dim": STD_PER_DIM, "unit_variance": 1.0}.get(self.kind)
        return 1.0 if per_dim is None else per_dim * dim**0.5

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; float32 values survive the trip exactly."""
        measured = {name: getattr(self, name) for name in ("mean", "std", "components")}
        return {"kind": self.kind} | {k: as_lists(v) for k, v in measured.items() if v is not None}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "EmbedNorm":
        values = (state.get(k) for k in ("mean", "std", "components"))
        try:
            return cls(state["kind"], *(None if v is None else torch.tensor(v) for v in values))
        except ValueError:
            raise UserError("image_embed_norm is damaged: rows of components differ in length") from None

    def _measured(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviations and directions; the last is nothing but for `whitened`."""
        if self.mean is None or self.std is None:
            raise UserError(f"image_embed_norm={self.kind} is not fitted yet: fit it on training embeddings")
        if self.mean.device != like.device:  # once, not in every step
            self.mean, self.std = self.mean.to(like.device), self.std.to(like.device)
            self.components = None if self.components is None else self.components.to(like.device)
        components = like.new_empty(0) if self.components is None else self.components.to(like)
        return self.mean.to(like), self.std.to(like), components


def as_lists(values: Tensor) -> list[Any]:
    """Numbers as short as float32 needs them."""
    if values.ndim > 1:
        return [as_lists(row) for row in values]
    return [float(str(x)) for x in values.float().cpu().numpy()]
