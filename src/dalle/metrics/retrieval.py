"""Zero-shot retrieval: how often an image's own caption is among the k nearest, and the other way round.

Captions that are the same text count once as candidates, and any image they belong to is a right answer.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dalle.ranges import PositiveInt

ROWS = 1024  # queries ranked at once: bounds the memory of similarities


def ranks(
    queries: Float[Tensor, "q e"], candidates: Float[Tensor, "c e"], right: Bool[Tensor, "q c"]
) -> Int64[Tensor, " q"]:
    """How many wrong candidates are at least as near as the nearest right one (0 = found first).

    Ties count against the model, and so do similarities that are no numbers: constant or broken embeddings
    find nothing.
    """
    similarity = queries @ candidates.T
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return (~(similarity < best) & ~right).sum(dim=1)


class Retrieval(Metric):
    """Recall at k, image to text and text to image, over everything seen since the last reset (on all ranks).

    `compute()` gives a dict of scalars: `image_to_text_r1`, `text_to_image_r1`, ...
    """

    full_state_update = False
    higher_is_better = True
    image_embed: list[Tensor]
    text_embed: list[Tensor]
    caption: list[Tensor]

    def __init__(self, ks: Annotated[Sequence[PositiveInt], MinLen(1)] = (1, 5), **options: Any) -> None:
        super().__init__(**options)
        self.ks = tuple(ks)
        for name in ("image_embed", "text_embed", "caption"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        image_embed: Float[Tensor, "b e"],
        text_embed: Float[Tensor, "b e"],
        caption: Int64[Tensor, " b"],
    ) -> None:
        """Unit embeddings of pairs, and a number for each caption: equal numbers mean equal captions."""
        self.image_embed.append(image_embed.detach().float())
        self.text_embed.append(text_embed.detach().float())
        self.caption.append(caption)

    def compute(self) -> dict[str, Tensor]:
        images, texts = dim_zero_cat(self.image_embed), dim_zero_cat(self.text_embed)
        found = retrieve(images, texts, dim_zero_cat(self.caption))
        return {f"{name}_r{k}": (rank < k).float().mean() for name, rank in found.items() for k in self.ks}


def retrieve(
    images: Float[Tensor, "n e"], texts: Float[Tensor, "n e"], captions: Int64[Tensor, " n"]
) -> dict[str, Tensor]:
    """For `image_to_text` (n,) and `text_to_image` (distinct captions,): how many wrong ones come before the
    first right one. Arguments as in `Retrieval.update`.
    """
    captions, own = captions.unique(return_inverse=True)
    first = torch.full_like(captions, len(own)).scatter_reduce(
        0, own, torch.arange(len(own), device=own.device), "amin"
    )
    texts, number = texts[first], torch.arange(len(captions), device=own.device)
    to_text = [
        ranks(images[rows], texts, own[rows, None] == number)
        for rows in torch.arange(len(images), device=own.device).split(ROWS)
    ]
    to_image = [ranks(texts[rows], images, rows[:, None] == own) for rows in number.split(ROWS)]
    return {"image_to_text": torch.cat(to_text), "text_to_image": torch.cat(to_image)}
