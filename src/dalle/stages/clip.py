"""CLIP's training: which caption of a batch belongs to which image (Radford et al. 2021, sec. 2.3, 2.5).

What differs from the paper: captions that are the same text share their images as right answers. A batch of
small data holds many equal captions; none can tell those apart, and trying drives images off their captions.
And an image's embedding also learns to name the words of its caption (`classification_loss`). Of what a
picture shows, contrast alone learns what tells most captions of a batch apart, and the rest late.

A contrastive loss grows with the number of candidates. That of a validation or test is therefore taken at the
epoch's end, each pair against a fixed number of others: it is the same for all batch sizes and ranks.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dalle.data.batch import Batch
from dalle.nets.interfaces import CLIPNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import NonNegative, PositiveInt
from dalle.stages.base import VALIDATION_SEED, Stage

LOGIT_SCALE_MAX = math.log(100)
CANDIDATES = 256  # for each pair of a validation or test, itself included


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


def bag_of_words(text: Int[Tensor, "b t"], vocab_size: int) -> Bool[Tensor, "b v"]:
    """Which ids each caption has, up to its end token, the largest."""
    end = text.argmax(dim=1, keepdim=True)
    real = torch.arange(text.shape[1], device=text.device) <= end
    counts = torch.zeros(len(text), vocab_size, device=text.device)
    return counts.scatter_add_(1, text.to(torch.int64), real.float()) > 0


def classification_loss(
    logits: Float[Tensor, "b v"], words: Bool[Tensor, "b v"], share: Float[Tensor, " v"]
) -> Float[Tensor, ""]:
    """Cross entropy of a caption's words, told from its image: SuperClass (Huang et al. 2024).

    The target is spread over the words of the caption, each as its inverse document frequency -ln(share): a
    word that all captions have counts nothing.

    Args:
        logits: of all words, a row for each image.
        words: which words its caption has.
        share: of the captions that have a word.
    """
    target = words * -share.clamp(min=1e-6).log()
    target = target / target.sum(dim=1, keepdim=True).clamp(min=1e-6)
    return -(target * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


def caption_keys(text: Int[Tensor, "b t"]) -> Int64[Tensor, " b"]:
    """A 64-bit hash of each row of ids, to compare rows without a (B, B, T) tensor or a host sync."""
    base = torch.full((text.shape[1],), 6364136223846793005, dtype=torch.int64, device=text.device)
    return (text.to(torch.int64) * base.cumprod(0)).sum(dim=1)  # wraps modulo 2^64, as wanted


class ContrastiveLoss(Metric):
    """The loss over all pairs since the last reset, on all ranks, among `CANDIDATES` or all if fewer."""

    full_state_update = False
    higher_is_better = False
    image_embed: list[Tensor]
    text_embed: list[Tensor]
    answer: list[Tensor]
    index: list[Tensor]
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("image_embed", "text_embed", "answer", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("scale", default=torch.tensor(0.0), dist_reduce_fx="max")

    def update(
        self,
        image_embed: Float[Tensor, "b e"],
        text_embed: Float[Tensor, "b e"],
        answer: Int64[Tensor, " b"],
        index: Int64[Tensor, " b"],
        scale: Float[Tensor, ""],
    ) -> None:
        """Unit embeddings of pairs; equal answers are right for one another; an index is a pair's own."""
        self.image_embed.append(image_embed)
        self.text_embed.append(text_embed)
        self.answer.append(answer)
        self.index.append(index)
        self.scale = scale.detach().float()

    def compute(self) -> Float[Tensor, ""]:
        index = dim_zero_cat(self.index)
        order = index.argsort()
        new = torch.ones_like(order, dtype=torch.bool)
        new[1:] = index[order].diff() != 0  # a sampler repeats items so that all ranks have as many
        order = order[new]
        # neighbours may be alike: captions of one picture, pictures of one class
        mixed = torch.randperm(len(order), generator=torch.Generator().manual_seed(VALIDATION_SEED))
        order = order[mixed.to(order.device)]
        images, texts = dim_zero_cat(self.image_embed)[order], dim_zero_cat(self.text_embed)[order]
        answer, total = dim_zero_cat(self.answer)[order], torch.zeros_like(self.scale)
        for start in range(0, len(order), CANDIDATES):
            rows = slice(start, start + CANDIDATES)
            first = max(0, min(start, len(order) - CANDIDATES))  # the last ones have as many candidates
            among = slice(first, first + CANDIDATES)
            right = answer[rows, None] == answer[among]
            loss = contrastive_loss(images[rows], texts[rows], images[among], texts[among], self.scale, right)
            total = total + loss * len(right)
        return total / len(order)


class ClipStage(Stage):
    """Trains both towers and the temperature.

    Args:
        net: `nets.clip.CLIP` or another `CLIPNet`.
        optimizer: the recipe; None where the stage is only used.
        retrieval: a metric with `update(image_embed, text_embed, caption)` over a whole validation or test.
        share_equal_captions: pairs of equal captions are right answers to one another. Off: the paper's loss.
        classification_weight: of `classification_loss`; 0 is the paper's loss.
        micro_batch: pairs that go through the towers at once, each such part again in the backward pass; the
            loss is that of the whole batch. None: all of them.
    """

    least_batch = 2  # one pair has nothing to be told from

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory | None = None,
        retrieval: Metric | None = None,
        share_equal_captions: bool = True,
        classification_weight: NonNegative = 10.0,
        micro_batch: PositiveInt | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.net: CLIPNet = check_interface(net, CLIPNet)
        self.retrieval, self.whole_loss = retrieval, ContrastiveLoss()
        self.share_equal_captions, self.classification_weight = share_equal_captions, classification_weight
        self.micro_batch = micro_batch
        if classification_weight:
            self.classifier = nn.Linear(self.net.embed_dim, self.net.vocab_size)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        image_embed, text_embed, scale = self.embed(batch["image"], batch["text"])
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
        out = {"loss": loss, "contrastive": loss}
        if self.classification_weight:
            # the embedding as prior and decoder see it: of unit variance
            logits = self.classifier(image_embed * image_embed.shape[1] ** 0.5)
            words = bag_of_words(batch["text"], self.net.vocab_size)
            share = self._of_all_ranks(words.float().mean(dim=0, keepdim=True)).mean(dim=0)
            out["classification"] = classification_loss(logits, words, share)
            out["loss"] = loss + self.classification_weight * out["classification"]
        embeds = {"image_embed": image_embed, "text_embed": text_embed, "caption": caption}
        return {**out, "scale": scale, **embeds}

    def embed(
        self, image: Float[Tensor, "b 3 h w"], text: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"], Float[Tensor, ""]]:
        """Unit vectors, and the scale. With `micro_batch` this is gradient caching (Gao et al. 2021): only
        embeddings are kept, and the backward pass goes through one part after another.
        """
        if self.micro_batch is None:
            return self.net(image, text)
        parts = zip(image.split(self.micro_batch), text.split(self.micro_batch), strict=True)
        made: Any = [checkpoint(self.net, *part, use_reentrant=False) for part in parts]
        images, texts, scales = zip(*made, strict=True)
        return torch.cat(images), torch.cat(texts), scales[0]

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        """(B, ...) -> (ranks * B, ...), with gradients to every rank: DDP averages them to the full ones."""
        if self._trainer is None or self.trainer.world_size == 1:
            return x
        gathered = self.all_gather(x, sync_grads=x.is_floating_point())
        return gathered.flatten(0, 1)  # pyright: ignore[reportAttributeAccessIssue]  # a tensor, where a tensor is given

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not at the batch's end: before a moving average or a checkpoint sees the parameter.
        with torch.no_grad():
            self.net.logit_scale.clamp_(0, LOGIT_SCALE_MAX)  # pyright: ignore[reportCallIssue]  # a parameter, of which the hint does not know

    def log_scalars(self, split: str, values: dict[str, Tensor], batch: Batch) -> None:
        if split != "train":  # see ContrastiveLoss
            values = {key: value for key, value in values.items() if key not in ("loss", "contrastive")}
        super().log_scalars(split, values, batch)

    def _evaluate(self, split: str, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        out = super()._evaluate(split, batch, batch_idx)
        image, text = (out[name].detach().float() for name in ("image_embed", "text_embed"))
        answer = out["caption"] if self.share_equal_captions else batch["index"]
        self.whole_loss.update(image, text, answer, batch["index"], out["scale"])
        if self.retrieval is not None:
            self.retrieval.update(image, text, out["caption"])
        return out

    def on_validation_epoch_end(self) -> None:
        self._log_whole("val")

    def on_test_epoch_end(self) -> None:
        self._log_whole("test")

    def _log_whole(self, split: str) -> None:
        """What is not a mean over batches."""
        self.log(f"{split}/loss", self.whole_loss.compute(), prog_bar=True, sync_dist=True)
        self.whole_loss.reset()
        if self.retrieval is not None:
            recalls = self.retrieval.compute()
            self.log_dict({f"{split}/{name}": value for name, value in recalls.items()}, sync_dist=True)
            self.retrieval.reset()
