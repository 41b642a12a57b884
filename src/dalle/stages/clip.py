"""CLIP's training: which caption of a batch belongs to which image (Radford et al. 2021, sec. 2.3, 2.5).

What differs from the paper: captions that are the same text share their images as right answers. A batch of
small data holds many equal captions; none can tell those apart, and trying drives images off their captions.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from torchmetrics import Metric

from dalle.data.batch import Batch
from dalle.stages.base import Stage
from dalle.stages.optim import Recipe

LOGIT_SCALE_MAX = math.log(100)


def contrastive_loss(
    image_embed: Float[Tensor, "b e"],
    text_embed: Float[Tensor, "b e"],
    all_images: Float[Tensor, "n e"],
    all_texts: Float[Tensor, "n e"],
    scale: Float[Tensor, ""],
    right: Bool[Tensor, "b n"],
) -> Float[Tensor, ""]:
    """Symmetric cross entropy of this rank's rows against the batch of all ranks.

    Args:
        image_embed, text_embed: unit vectors; pair i is row i of both.
        all_images, all_texts: the same of all ranks.
        scale: exp of the logit scale.
        right: which of all pairs are a right answer to pair i; they share its target evenly. With one right
            answer for each this is CLIP's loss.
    """
    target = right / right.sum(dim=1, keepdim=True)
    with torch.autocast(image_embed.device.type, enabled=False):  # 8 bits of a cosine, times 100: noise
        to_text = scale * image_embed @ all_texts.T
        to_image = scale * text_embed @ all_images.T
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2


def caption_keys(text: Int[Tensor, "b t"]) -> Int64[Tensor, " b"]:
    """A 64-bit hash of each row of ids, to compare rows without a (B, B, T) tensor or a host sync."""
    base = torch.full((text.shape[1],), 6364136223846793005, dtype=torch.int64, device=text.device)
    return (text.to(torch.int64) * base.cumprod(0)).sum(dim=1)  # wraps modulo 2^64, as wanted


class ClipStage(Stage):
    """Trains both towers and the temperature.

    Args:
        net: called with images and ids, gives unit embeddings of both and the scale; has `logit_scale`.
        optimizer: the recipe; None where the stage is only used.
        retrieval: a metric with `update(image_embed, text_embed, caption)` over a whole validation or test.
        share_equal_captions: pairs of equal captions are right answers to one another. Off: the paper's loss.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Recipe | None = None,
        retrieval: Metric | None = None,
        share_equal_captions: bool = True,
    ) -> None:
        super().__init__(optimizer)
        self.net = net
        self.retrieval = retrieval
        self.share_equal_captions = share_equal_captions

    def step(self, batch: Batch) -> dict[str, Tensor]:
        image_embed, text_embed, scale = self.net(batch["image"], batch["text"])
        caption = caption_keys(batch["text"])
        pair = torch.arange(len(caption), device=caption.device) + self.global_rank * len(caption)
        answer = caption if self.share_equal_captions else pair
        loss = contrastive_loss(
            image_embed,
            text_embed,
            self._of_all_ranks(image_embed),
            self._of_all_ranks(text_embed),
            scale,
            right=answer[:, None] == self._of_all_ranks(answer),
        )
        return {
            "loss": loss,
            "scale": scale,
            "image_embed": image_embed,
            "text_embed": text_embed,
            "caption": caption,
        }

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        """(B, ...) -> (ranks * B, ...), with gradients to every rank: DDP averages them to the full ones."""
        if self._trainer is None or self.trainer.world_size == 1:
            return x
        gathered = self.all_gather(x, sync_grads=x.is_floating_point())
        return gathered.flatten(0, 1)  # pyright: ignore[reportAttributeAccessIssue]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not at the batch's end: before a moving average or a checkpoint sees the parameter.
        with torch.no_grad():
            self.net.logit_scale.clamp_(0, LOGIT_SCALE_MAX)  # pyright: ignore[reportCallIssue]

    def _evaluate(self, split: str, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        out = super()._evaluate(split, batch, batch_idx)
        if self.retrieval is not None:
            self.retrieval.update(out["image_embed"], out["text_embed"], out["caption"])
        return out

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def _log_retrieval(self, split: str) -> None:
        if self.retrieval is not None:
            recalls = self.retrieval.compute()
            self.log_dict({f"{split}/{name}": value for name, value in recalls.items()}, sync_dist=True)
            self.retrieval.reset()
