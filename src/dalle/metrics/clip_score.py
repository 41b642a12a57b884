"""CLIP score, the per-pair 100-form: mean over pairs of 100 * max(cos(image, caption), 0).

What most papers print. It equals torchmetrics' CLIPScore only while no pair is negative (that one clamps the
mean), is not Hessel et al.'s 2.5-form with its "A photo depicts" prefix, and depends on the CLIP: compare
figures of one CLIP only.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric


@runtime_checkable
class ImageTextEmbedder(Protocol):
    """What is used of a `FrozenCLIP`."""

    def embed_image(self, image: Tensor, /) -> Tensor: ...

    def embed_captions(self, captions: list[str], /) -> Any: ...


class CLIPScore(Metric):
    """How well pictures fit their captions in the eyes of `clip`: 0 to 100, higher is better.

    The CLIP stays out of the module tree: whoever owns it moves and saves it.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    score_sum: Tensor
    pairs: Tensor

    def __init__(self, clip: ImageTextEmbedder) -> None:
        super().__init__()
        self.embed_image, self.embed_captions = clip.embed_image, clip.embed_captions
        self.add_state("score_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, image: Float[Tensor, "B 3 H W"], captions: Sequence[str]) -> None:
        """Adds pictures in [-1, 1] and the caption of each."""
        if len(image) != len(captions):
            raise ValueError(f"{len(image)} pictures, but {len(captions)} captions")
        image_embed = self.embed_image(image).float()
        text_embed = self.embed_captions(list(captions))["text_embed"].float()
        cosine = cosine_similarity(image_embed, text_embed, dim=-1)
        self.score_sum += 100 * cosine.clamp(min=0).double().sum()
        self.pairs += len(image)

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all pairs of all ranks; nan without any."""
        return self.score_sum / self.pairs
