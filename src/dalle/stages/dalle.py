"""DALL-E's transformer: a picture's codes, one by one, from its caption (Ramesh et al. 2021, sec. 2.2).

Text and picture are one stream of tokens, and both are learned: an eighth of the loss is the text's, seven
eighths the picture's. What differs from the paper: some captions are dropped in training (replaced by
paddings), which makes classifier-free guidance possible, and whether paddings count in the text loss, which
the paper does not say, is a switch.

The stage makes codes; the DataModule or the pipeline, who have the image tokenizer, make pictures of them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dalle.autoregressive.draws import OnStep, Uniforms
from dalle.autoregressive.sampling import check_options, generate
from dalle.autoregressive.static import Static
from dalle.data.batch import Batch
from dalle.diffusion.samplers import Randn
from dalle.nets.interfaces import TransformerNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Fraction, Guidance, NonNegative, PositiveInt, Share, Weight
from dalle.stages.base import Stage


class DalleStage(Stage):
    """Trains `net` to write codes (B, N) for captions (B, T).

    Args:
        net: `nets.dalle.DALLE` or another `TransformerNet`.
        text_weight, image_weight: of the two mean cross entropies in the loss.
        text_dropout: share of training pairs whose caption is dropped, for guidance.
        pad_loss: whether the paddings after a caption count in the text loss.
        temperature, top_k, top_p, guidance: how codes are drawn wherever `sample` is not told; None and a
            guidance of 1 are off.
    """

    makes_images = True
    static: Static | None = None

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory | None = None,
        text_weight: Weight = 1 / 8,
        image_weight: Weight = 7 / 8,
        text_dropout: Fraction = 0.1,
        pad_loss: bool = True,
        temperature: NonNegative = 0.5,
        top_k: PositiveInt | None = None,
        top_p: Share | None = None,
        guidance: Guidance = 2.0,
    ) -> None:
        super().__init__(optimizer)
        self.net: TransformerNet = check_interface(net, TransformerNet)
        check_options(self.net.image_vocab, temperature, top_k, top_p)
        self.text_weight, self.image_weight = text_weight, image_weight
        self.text_dropout, self.pad_loss = text_dropout, pad_loss
        self.drawing: dict[str, Any] = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance
        }  # fmt: skip

    def speed_up(self, how: str) -> None:
        self.static = None if how == "none" else Static(how == "full")

    def step(self, batch: Batch) -> dict[str, Tensor]:
        text, codes = batch["text"], batch["codes"]
        keep = torch.rand(len(text), device=text.device) >= self.text_dropout
        text_logits, image_logits = self.net(text, codes, keep)
        text_loss = image_logits.new_zeros(())  # of a network that learns no text
        if text_logits is not None:
            text_loss = self.text_loss(text_logits, self.net.padded(text, keep)[:, 1:])
        image_loss = F.cross_entropy(image_logits.float().flatten(0, 1), codes.flatten())
        return {
            "loss": self.text_weight * text_loss + self.image_weight * image_loss,  # sec. 2.2
            "text_loss": text_loss.detach(),
            "image_loss": image_loss.detach(),
            "bits_per_code": image_loss.detach() / math.log(2),
            "accuracy": (image_logits.argmax(2) == codes).float().mean(),
        }

    def text_loss(self, logits: Float[Tensor, "B T V"], target: Int64[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Mean cross entropy of the next text token, over the tokens that count."""
        counts: Bool[Tensor, "B T"] = torch.ones_like(target, dtype=torch.bool)
        if not self.pad_loss:
            counts = target < self.net.text_vocab
        losses = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        return (losses * counts.flatten()).sum() / counts.sum().clamp(min=1)

    @torch.inference_mode()
    def sample(
        self,
        batch: Batch,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        prefix: Int64[Tensor, "B P"] | None = None,
        known: Int64[Tensor, "B N"] | None = None,
        randn: Randn = torch.randn_like,
        on_step: OnStep | None = None,
    ) -> Int64[Tensor, "B N"]:
        """Codes for the captions whose ids are in `batch`.

        `prefix` are first codes that are kept, `known` such anywhere, with -1 where one is drawn.
        """

        told = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        options = {key: self.drawing[key] if value is None else value for key, value in told.items()}
        options |= {"prefix": prefix, "known": known, "uniform": Uniforms(randn), "on_step": on_step}
        options["static"] = self.static
        return generate(self.net, batch["text"], **options)
