"""How good the image embeddings are that a prior imagines for captions, before any decoder draws them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from dalle.images import from_uint8
from dalle.metrics.clip_score import ImageTextEmbedder, recalls
from dalle.metrics.intervals import Figure, of_mean
from dalle.metrics.metric import EvaluationMetric, Rows

COSINES = {
    "cosine_image": ("made", "image_embed"),
    "cosine_caption": ("made", "text_embed"),
    "cosine_caption_of_data": ("image_embed", "text_embed"),
}


class ImaginedEmbeddings(EvaluationMetric):
    """How near they are to those of the captions' pictures and of the captions themselves, which captions
    they find, and seconds for each. Beside them, what the pictures' own embeddings have.

    Args:
        clip: embeds the real pictures.
        imagine: `imagine(captions, items)` -> caption embeddings (B, E) and imagined ones.
        key: tells what imagines apart.
        which: cosines, retrieval.
    """

    columns = ("made", "image_embed", "text_embed", "seconds")

    def __init__(
        self,
        clip: ImageTextEmbedder,
        imagine: Callable[[list[str], list[int]], tuple[Tensor, Tensor]],
        key: Any,
        which: Sequence[str] = ("cosines", "retrieval"),
    ) -> None:
        super().__init__()
        self.clip, self.imagine, self.key, self.which = clip, imagine, key, which
        self.items: list[int] = []

    @property
    def reference(self) -> Any:
        return {"imagined": self.key}

    def update(
        self, image: Tensor, captions: Sequence[str], items: Sequence[int], real: bool = False
    ) -> None:
        self.items = list(items)  # what is imagined for an item is the same in any batch
        super().update(image, captions, items, real)

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str]) -> Rows:
        started = time.perf_counter()
        text, made = self.imagine(captions, self.items)
        made = F.normalize(made, dim=1).cpu()  # which waits for a GPU
        seconds = (time.perf_counter() - started) / len(made)
        image_embed = self.clip.embed_image(from_uint8(image)).float()
        return {
            "made": made,
            "image_embed": F.normalize(image_embed, dim=1).cpu(),
            "text_embed": F.normalize(text, dim=1).cpu(),
            "seconds": torch.full((len(made),), seconds),
        }

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        found = {}
        if "cosines" in self.which:
            found |= {name: of_mean((real[a] * real[b]).sum(1)) for name, (a, b) in COSINES.items()}
            found["seconds_per_embedding"] = of_mean(real["seconds"])
        if "retrieval" in self.which:
            found |= recalls({**real, "image_embed": real["made"]}, captions)
            of_data = recalls(real, captions).items()
            found |= {name.replace("retrieval/", "retrieval_of_data/"): figure for name, figure in of_data}
        return found
