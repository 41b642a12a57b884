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
from jaxtyping import Float
from torch import Tensor, nn

from dalle.data.batch import Batch, text_of
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.guidance import clamped, guide, one_scale
from dalle.diffusion.samplers import Randn, Sampler
from dalle.nets.interfaces import PriorNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Depth, Fraction, Guidance, NonNegativeInt, Positive
from dalle.stages.embedding_stage import EmbeddingStage


class PriorStage(EmbeddingStage):
    """Trains `net` to sample normalised image embeddings (B, E).

    Args:
        net: `nets.prior.Prior` or another `PriorNet`.
        denoiser: makes the `Denoiser` around it (schedule, prediction, weighting).
        sampler: used for validation and wherever `sample` is not given one.
        text_dropout: share of training pairs whose text is dropped, for guidance.
        guidance: scale; 1 is none.
        candidates: embeddings drawn per caption, of which the best is kept.
        val_samples: how many validation captions are sampled for the cosines.
        clamp: no number of an estimate is larger while sampling; None: they are left.
    """

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
        clamp: Positive | None = None,
    ) -> None:
        super().__init__(optimizer, candidates, val_samples)
        self.denoiser, self.sampler = denoiser(check_interface(net, PriorNet)), sampler
        self.text_dropout, self.guidance, self.clamp = text_dropout, guidance, clamp

    @property
    def net(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # an attribute there
        return self.denoiser.net

    @property
    def reads_ids(self) -> bool:
        """Whether the network also reads a caption's token ids, by layers of its own."""
        return bool(getattr(self.net, "text_layers", ()))

    def speed_up(self, how: str) -> None:
        self.denoiser.speed_up(how)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        embed = batch["image_embed"]
        keep = torch.rand(len(embed), device=embed.device) >= self.text_dropout
        losses, t = self.denoiser.losses(embed, **text_of(batch, self.reads_ids), keep_text=keep)
        return {"loss": losses.mean(), "per_sample": losses, "t": t}

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
        text, prefix = text_of(batch, self.reads_ids), getattr(self.net, "prefix", None)
        scale = self.guidance if guidance is None else guidance
        nobody = torch.zeros(len(text["text_embed"]), dtype=torch.bool, device=text["text_embed"].device)
        unsaid = {**text, "keep_text": nobody}
        branches = one_scale(
            {"cache": prefix(**text)} if prefix else {**text, "keep_text": ~nobody},
            {} if scale == 1 else {"cache": prefix(**text, keep_text=nobody)} if prefix else unsaid,
            scale,
        )
        denoise = guide(self.denoiser, branches)
        if self.clamp is not None:
            denoise = clamped(denoise, self.clamp)
        run = sampler or self.sampler
        like = torch.empty(len(nobody), self.net.embed_dim, device=nobody.device)
        drawn = [
            run(denoise, randn(like), self.denoiser.schedule, randn=randn)
            for _ in range(candidates or self.candidates)
        ]
        return self.choose(drawn, text["text_embed"])
