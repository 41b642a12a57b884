"""The diffusion prior: a CLIP image embedding from a caption (Ramesh et al. 2022, DALL-E 2, sec. 2.2 and
App. C).

Predicts the clean embedding itself, drops the text of 10 % of the training pairs, and at sampling draws
several embeddings per caption and keeps the one with the largest dot product with the caption's embedding.
The text part of the network's sequence does not change while sampling, so its keys and values are computed
once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle.data.batch import Batch
from dalle.data.embed_norm import EmbedNorm
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.guidance import guide, one_scale
from dalle.diffusion.samplers import Randn, Sampler
from dalle.nets.interfaces import PriorNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Depth, Fraction, Guidance, NonNegativeInt
from dalle.stages.base import Stage


class PriorStage(Stage):
    """Trains `net` to sample normalised image embeddings (B, E).

    Args:
        net: `nets.prior.Prior` or another `PriorNet`.
        denoiser: makes the `Denoiser` around it (schedule, prediction, weighting).
        sampler: used for validation and wherever `sample` is not given one.
        text_dropout: share of training pairs whose text is dropped, for guidance.
        guidance: scale; 1 is none.
        candidates: embeddings drawn per caption, of which the best is kept.
        val_samples: how many validation captions are sampled for the cosines.
    """

    norm: EmbedNorm | None = None  # the space of `image_embed`; known once there is data or a manifest

    def __init__(
        self,
        net: nn.Module,
        denoiser: Callable[[nn.Module], Denoiser],
        sampler: Sampler,
        optimizer: OptimizerFactory | None = None,
        text_dropout: Fraction = 0.1,
        guidance: Guidance = 1.0,
        candidates: Depth = 2,
        val_samples: NonNegativeInt = 256,
    ) -> None:
        super().__init__(optimizer)
        self.denoiser, self.sampler = denoiser(check_interface(net, PriorNet)), sampler
        self.text_dropout, self.guidance = text_dropout, guidance
        self.candidates, self.val_samples, self.room = candidates, val_samples, val_samples

    @property
    def net(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.denoiser.net

    def setup(self, stage: str) -> None:
        self.norm = self.trainer.datamodule.norm  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, batch: Batch) -> dict[str, Tensor]:
        embed = batch["image_embed"]
        keep = torch.rand(len(embed), device=embed.device) >= self.text_dropout
        losses, t = self.denoiser.losses(embed, **text_of(batch), keep_text=keep)
        return {"loss": losses.mean(), "per_sample": losses, "t": t}

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
        cosines = {
            "cosine_image": F.cosine_similarity(made, batch["image_embed"]).mean(),
            "cosine_caption": F.cosine_similarity(self.norm.decode(made), text).mean(),
            "cosine_other_caption": F.cosine_similarity(self.norm.decode(made), text.roll(1, 0)).mean(),
            "cosine_caption_of_data": F.cosine_similarity(
                self.norm.decode(batch["image_embed"]), text
            ).mean(),
        }
        self.log_scalars(split, cosines, batch)
        return cosines

    @torch.inference_mode()
    def sample(
        self,
        batch: Batch,
        sampler: Sampler | None = None,
        guidance: float | None = None,
        candidates: int | None = None,
        randn: Randn = torch.randn_like,
    ) -> Float[Tensor, "B E"]:
        """Normalised image embeddings for the captions whose text features are in `batch`."""
        text, prefix = text_of(batch), getattr(self.net, "prefix", None)
        scale = self.guidance if guidance is None else guidance
        nobody = torch.zeros(len(text["text_embed"]), dtype=torch.bool, device=text["text_embed"].device)
        unsaid = {**text, "keep_text": nobody}
        branches = one_scale(
            {"cache": prefix(**text)} if prefix else text,
            {} if scale == 1 else {"cache": prefix(**text, keep_text=nobody)} if prefix else unsaid,
            scale,
        )
        denoise = guide(self.denoiser, branches)
        run = sampler or self.sampler
        like = torch.empty(len(nobody), self.net.embed_dim, device=nobody.device)
        drawn = [
            run(denoise, randn(like), self.denoiser.schedule, randn=randn)
            for _ in range(candidates or self.candidates)
        ]
        made = best(drawn, text["text_embed"], self.norm or EmbedNorm("unit"))
        # the mean of what an embedding may be is shorter than each: the decoder has seen the true length only
        return made if self.norm is None else self.norm.project(made)


def best(drawn: list[Tensor], text_embed: Float[Tensor, "B E"], norm: EmbedNorm) -> Float[Tensor, "B E"]:
    """Of several embeddings per caption the one of the largest dot product with the caption's (Ramesh et al.
    2022, sec. 2.2), of unit vectors where the norm is a unit one.
    """
    if len(drawn) == 1:
        return drawn[0]
    scores = torch.stack([(norm.decode(z) * text_embed).sum(1) for z in drawn])
    return torch.stack(drawn)[scores.argmax(0), torch.arange(len(text_embed), device=text_embed.device)]


def text_of(batch: Batch) -> dict[str, Any]:
    """The part of a batch that says what the caption says."""
    return {key: batch[key] for key in ("text_embed", "text_hidden", "text_mask")}
