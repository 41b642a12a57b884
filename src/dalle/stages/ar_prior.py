"""The autoregressive prior: a CLIP image embedding from a caption, code by code (Ramesh et al. 2022,
DALL-E 2, sec. 2.2).

The embedding's principal components are cut into buckets, and a transformer writes their numbers after the
caption. A token before them says how large the dot product of caption and image embedding is; at sampling it
is drawn from the upper half of the training's. The text of 10 % of the training pairs is dropped, and with it
this token, which is about the text.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dalle.autoregressive.draws import Uniforms
from dalle.autoregressive.sampling import check_options, generate
from dalle.autoregressive.static import Static
from dalle.data.batch import Batch, text_of
from dalle.data.embed_norm import EmbedNorm
from dalle.diffusion.samplers import Randn
from dalle.nets.interfaces import ARPriorNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Depth, Fraction, Guidance, NonNegative, NonNegativeInt, PositiveInt, Share
from dalle.stages.embedding_stage import EmbeddingStage


class ARPriorStage(EmbeddingStage):
    """Trains `net` to write the codes of normalised image embeddings (B, E).

    Args:
        net: `nets.ar_prior.ARPrior` or another `ARPriorNet`.
        text_dropout: share of training pairs whose text is dropped, for guidance.
        temperature, top_k, top_p, guidance: how codes are drawn wherever `sample` is not told; None and a
            guidance of 1 are off.
        dot_quantile: the dot product's token is drawn from the training's at and above this quantile.
        candidates: embeddings drawn per caption, of which the best is kept.
        val_samples: how many validation captions are sampled for the cosines.
    """

    static: Static | None = None

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory | None = None,
        text_dropout: Fraction = 0.1,
        temperature: NonNegative = 1.0,
        top_k: PositiveInt | None = None,
        top_p: Share | None = None,
        guidance: Guidance = 1.0,
        dot_quantile: Fraction = 0.5,
        candidates: Depth = 1,
        val_samples: NonNegativeInt = 256,
    ) -> None:
        super().__init__(optimizer, candidates, val_samples)
        self.net: ARPriorNet = check_interface(net, ARPriorNet)
        check_options(self.net.buckets, temperature, top_k, top_p)
        self.text_dropout, self.dot_quantile = text_dropout, dot_quantile
        self.drawing: dict[str, Any] = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance
        }  # fmt: skip

    def speed_up(self, how: str) -> None:
        self.static = None if how == "none" else Static(how == "full")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":  # a checkpoint, loaded later, brings its own
            data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  # Lightning sets it where it begins
            self.net.codes.load_state_dict(data.codes.state_dict())

    def step(self, batch: Batch) -> dict[str, Tensor]:
        embed, text = batch["image_embed"], text_of(batch)
        keep = torch.rand(len(embed), device=embed.device) >= self.text_dropout
        codes = self.codes_of(embed, text["text_embed"])
        logits = self.net(codes, **text, keep_text=keep)
        losses = F.cross_entropy(logits.float().flatten(0, 1), codes[:, 1:].flatten(), reduction="none")
        # an embedding that is no number has no code: the guard leaves out a loss that is none
        loss = losses.mean() + 0 * embed.sum()
        return {
            "loss": loss,
            "bits_per_code": loss.detach() / math.log(2),
            "cosine_of_codes": F.cosine_similarity(self.net.codes.decode(codes[:, 1:]), embed).mean(),
        }

    def codes_of(
        self, image_embed: Float[Tensor, "B E"], text_embed: Float[Tensor, "B E"]
    ) -> Int64[Tensor, "B C"]:
        """The code of the dot product, and those of the dimensions."""
        codes, dots = self.net.codes, (self.norm or EmbedNorm("unit")).dot(image_embed, text_embed)
        return torch.cat((codes.encode_dot(dots)[:, None], codes.encode(image_embed)), dim=1)

    @torch.inference_mode()
    def sample(
        self,
        batch: Batch,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        dot_quantile: float | None = None,
        candidates: int | None = None,
        randn: Randn = torch.randn_like,
    ) -> Float[Tensor, "B E"]:
        """Normalised image embeddings for the captions whose text features are in `batch`."""

        uniform = Uniforms(randn)
        told = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        options = {key: self.drawing[key] if value is None else value for key, value in told.items()}
        least = self.dot_quantile if dot_quantile is None else dot_quantile
        text = text_of(batch)
        (size, length, _), device = text["text_hidden"].shape, text["text_embed"].device
        rows, drawn = torch.arange(size, device=device)[:, None].expand(-1, length), []
        for _ in range(candidates or self.candidates):
            quantile = least + (1 - least) * uniform(torch.empty(size, 1, device=device))[:, 0]
            dot = self.net.codes.dot_at(quantile)[:, None]
            writer = Writer(self.net, text)
            codes = generate(writer, rows, **options, prefix=dot, uniform=uniform, static=self.static)
            drawn.append(self.net.codes.decode(codes[:, 1:]))
        return self.choose(drawn, text["text_embed"])


class Writer:
    """The network as `generate` asks for it: a caption's tokens all are the number of its row in `text`."""

    def __init__(self, net: ARPriorNet, text: dict[str, Tensor]) -> None:
        self.net, self.text = net, text
        self.image_vocab, self.codes = net.buckets, 1 + net.dims
        self.step = net.step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def prefill(
        self,
        rows: Int64[Tensor, "B T"],
        keep_text: Tensor | None,
        codes: Int64[Tensor, "B P"],
        **options: Any,
    ) -> tuple[Float[Tensor, "B K"], Any]:
        text = {key: values[rows[:, 0]] for key, values in self.text.items()}
        return self.net.prefill(codes, **text, keep_text=keep_text, **options)
