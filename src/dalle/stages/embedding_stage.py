"""What both priors of DALL-E 2 share (Ramesh et al. 2022, sec. 2.2): the space of the image embeddings that
they make, the best of several, and how near those come to what the captions belong to.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle.data.batch import Batch
from dalle.data.embed_norm import EmbedNorm
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Depth, NonNegativeInt
from dalle.stages.base import Stage


class EmbeddingStage(Stage):
    """A stage whose `sample` makes normalised image embeddings (B, E).

    Args:
        candidates: embeddings drawn per caption, of which the best is kept.
        val_samples: how many validation captions are sampled for the cosines.
    """

    norm: EmbedNorm | None = None  # the space of `image_embed`; known once there is data or a manifest

    def __init__(
        self, optimizer: OptimizerFactory | None, candidates: Depth, val_samples: NonNegativeInt
    ) -> None:
        super().__init__(optimizer)
        self.candidates, self.val_samples, self.room = candidates, val_samples, val_samples

    def setup(self, stage: str) -> None:
        self.norm = self.trainer.datamodule.norm  # pyright: ignore[reportAttributeAccessIssue]  # Lightning sets it where it begins

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {**super().validation_step(batch, batch_idx), **self.log_cosines("val", batch, batch_idx)}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {**super().test_step(batch, batch_idx), **self.log_cosines("test", batch, batch_idx)}

    def log_cosines(self, split: str, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Cosines of sampled embeddings with the true image's, its caption's, and another caption's."""
        if batch_idx == 0:
            ranks = self.trainer.world_size if self._trainer else 1
            self.room = -(-self.val_samples // ranks)  # captions that are still to be sampled here
        values: Any = batch
        batch = Batch(**{key: value[: self.room] for key, value in values.items()})
        if not (size := len(batch["text_embed"])):
            return {}
        self.room -= size
        generator = torch.Generator().manual_seed(batch_idx)
        made = self.sample(batch, randn=lambda x: torch.randn(x.shape, generator=generator).to(x))
        text = batch["text_embed"]
        assert self.norm is not None
        made, true = self.norm.decode(made), self.norm.decode(batch["image_embed"])
        cosines = {
            "cosine_image": F.cosine_similarity(made, true).mean(),
            "cosine_caption": F.cosine_similarity(made, text).mean(),
            "cosine_other_caption": F.cosine_similarity(made, text.roll(1, 0)).mean(),
            "cosine_caption_of_data": F.cosine_similarity(true, text).mean(),
        }
        self.log_scalars(split, cosines, batch)
        return cosines

    def choose(self, drawn: list[Tensor], text_embed: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """The best of several, of the true length: the decoder has seen no other."""
        made = best(drawn, text_embed, self.norm or EmbedNorm("unit"))
        return made if self.norm is None else self.norm.project(made)


def best(drawn: list[Tensor], text_embed: Float[Tensor, "B E"], norm: EmbedNorm) -> Float[Tensor, "B E"]:
    """Of several embeddings per caption the one of the largest dot product with the caption's (Ramesh et al.
    2022, sec. 2.2), of unit vectors where the norm is a unit one.
    """
    if len(drawn) == 1:
        return drawn[0]
    scores = torch.stack([(norm.decode(z) * text_embed).sum(1) for z in drawn])
    return torch.stack(drawn)[scores.argmax(0), torch.arange(len(text_embed), device=text_embed.device)]
