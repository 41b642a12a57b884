"""What a CLIP says of pictures and captions: scores, retrieval, hard negatives, and the classes it knows.

CLIP score is the per-pair 100-form: mean over pairs of 100 * max(cos(image, caption), 0). What most papers
print. It equals torchmetrics' CLIPScore only while no pair is negative (that one clamps the mean), is not
Hessel et al.'s 2.5-form with its "A photo depicts" prefix, and depends on the CLIP: compare figures of one
CLIP only.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from dalle.data.scenes import swaps
from dalle.images import from_uint8
from dalle.metrics.features import ImageEmbedder
from dalle.metrics.intervals import Figure, of_mean, of_share
from dalle.metrics.metric import EvaluationMetric, Rows
from dalle.metrics.retrieval import retrieve

KS = (1, 5, 10)
TEXTS = 512  # captions embedded at once

Classes = tuple[list[tuple[str, ...]], Tensor]  # sentences of each class; the class of each picture, -1: none


@runtime_checkable
class ImageTextEmbedder(Protocol):
    """What is used of a `FrozenCLIP`."""

    def embed_image(self, image: Tensor, /) -> Tensor: ...

    def embed_captions(self, captions: list[str], /) -> Any: ...


@runtime_checkable
class Embedder(ImageEmbedder, ImageTextEmbedder, Protocol):
    """Both."""


def clip_score(image: Float[Tensor, "n e"], text: Float[Tensor, "n e"]) -> Figure:
    """Of unit embeddings of pairs: 0 to 100, higher is better."""
    return of_mean(100 * (image * text).sum(1).clamp(min=0))


class CLIPScore(EvaluationMetric):
    """How well pictures fit their captions in the eyes of `clip`, beside how well the real ones do.

    By name of `which` also retrieval of captions by pictures and, of the grammar of `shapes`, how often a
    picture's own caption is nearer than those that say one thing otherwise.

    A CLIP score hardly falls with one wrong word; which of two captions is nearer does (Thrush et al. 2022,
    "Winoground", image to text; Yuksekgonul et al. 2023, sec. 2). The CLIP stays where its owner has it.
    """

    columns = ("image_embed", "text_embed")
    higher_is_better = True

    def __init__(self, clip: ImageTextEmbedder, which: Sequence[str] = ("clip_score",)) -> None:
        super().__init__()
        self.clip, self.which = clip, which

    @property
    def reference(self) -> Any:
        return {"clip": getattr(self.clip, "weights_hash", None)}

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str]) -> Rows:
        if len(image) != len(captions):
            raise ValueError(f"{len(image)} pictures, but {len(captions)} captions")
        text = self.clip.embed_captions(captions)["text_embed"].float()
        embed = self.clip.embed_image(from_uint8(image)).float()
        return {"image_embed": F.normalize(embed, dim=1), "text_embed": F.normalize(text, dim=1)}

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        found = {}
        if "clip_score" in self.which:
            for name, rows in {"clip_score": made, "clip_score_real": real}.items():
                if rows:
                    found[name] = clip_score(rows["image_embed"], rows["text_embed"])
        if "retrieval" in self.which:
            found |= recalls(made, captions)
        if "hard_negatives" in self.which:
            found |= self.hard_negatives(made, real, captions)
        return found

    def hard_negatives(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        """Shares by attribute, and over all swaps; those of real pictures are what this CLIP can tell."""
        swapped = [swaps(caption) for caption in captions]
        texts = list(dict.fromkeys(text for other in swapped for some in other.values() for text in some))
        if not texts:
            return {}
        batches = (texts[i : i + TEXTS] for i in range(0, len(texts), TEXTS))
        parts = [self.clip.embed_captions(batch)["text_embed"] for batch in batches]
        embed = F.normalize(torch.cat(parts), dim=1).cpu()
        number = {text: k for k, text in enumerate(texts)}
        found = {}
        for name, rows in {"hard_negatives": made, "hard_negatives_real": real}.items():
            columns: dict[str, list[float]] = defaultdict(lambda: [math.nan] * len(captions))
            for i, other in enumerate(swapped):
                image = rows["image_embed"][i]
                own = image @ rows["text_embed"][i]
                for key, some in other.items():
                    # no numbers are no success
                    columns[key][i] = float((embed[[number[t] for t in some]] @ image < own).all())
                said = [columns[key][i] for key in other]
                columns["all"][i] = min(said, default=math.nan)
            found |= {f"{name}/{key}": of_share(torch.tensor(column)) for key, column in columns.items()}
        return found


class ZeroShotAccuracy(CLIPScore):
    """A CLIP itself: retrieval among real pictures, and the class of each among all classes."""

    def __init__(self, clip: ImageTextEmbedder, which: Sequence[str], classes: Classes | None) -> None:
        super().__init__(clip, which)
        self.classes = classes

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        found = recalls(real, captions) if "retrieval" in self.which else {}
        if "zero_shot" in self.which and self.classes:
            sentences, labels = self.classes
            texts = [self.clip.embed_captions(list(some))["text_embed"].cpu() for some in sentences]
            # Radford et al. 2021, sec. 3.1.4: the mean over sentences of unit embeddings
            means = torch.stack([F.normalize(F.normalize(text, dim=1).mean(0), dim=0) for text in texts])
            labelled = labels >= 0
            similarity = real["image_embed"][labelled] @ means.T
            order = similarity.sort(dim=1, descending=True, stable=True).indices
            right = order == labels[labelled][:, None]
            for k in (1, 5):
                if k < len(means):
                    found[f"zero_shot/top{k}"] = of_share(right[:, :k].any(1))
            self.notes.append(f"zero_shot: {int(labelled.sum())} pictures of {len(means)} classes")
        return found


def recalls(rows: Rows, captions: list[str]) -> dict[str, Figure]:
    """Recall at k of captions by pictures and pictures by captions; equal captions are one."""
    numbers = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
    caption = torch.tensor([numbers[text] for text in captions])
    found = retrieve(rows["image_embed"], rows["text_embed"], caption)
    return {
        f"retrieval/{way}_r{k}": of_share(rank < k)
        for way, rank in found.items()
        for k in KS
        if k < len(numbers)
    }
