"""What is looked at in pictures, and what figures come of it.

A meter turns a batch into rows, one for each picture; rows of all ranks are pooled before any figure is made
of them. Rows of real pictures are the same in every evaluation, and kept.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from dalle.data.frozen import FrozenCLIP
from dalle.data.scenes import swaps
from dalle.data.shapes import names_unseen
from dalle.errors import UserError
from dalle.images import from_uint8
from dalle.metrics.chance import chance
from dalle.metrics.distances import (
    frechet,
    frechet_infinity,
    inception_score,
    kid,
    precision_recall,
)
from dalle.metrics.features import FeatureNet
from dalle.metrics.intervals import Figure, of_mean, of_share
from dalle.metrics.judge import Judge
from dalle.metrics.retrieval import retrieve

Rows = dict[str, Tensor]
NEEDS = {  # metric -> the fewest pictures it can be made of
    "fid": 2,
    "kid": 2,
    "fid_infinity": 2,  # and more the more dimensions features have
    "inception": 10,
    "precision_recall": 4,
    "clip_score": 1,
    "retrieval": 2,
    "hard_negatives": 1,
    "judge": 1,
    "reconstruction": 1,
    "zero_shot": 2,
    "speed": 1,
    "flops": 1,
}
KS = (1, 5, 10)
TEXTS = 512  # captions embedded at once
RESIDUAL = "residual"


class Meter:
    """Figures of one kind. `key` tells the rows of real pictures apart; None: they are not needed."""

    key: Any = None

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics, self.notes = metrics, list[str]()

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str], items: list[int]) -> Rows:
        """Rows of a batch; `captions` is empty where pictures have none."""
        raise NotImplementedError

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        """Figures of all pictures, in the order of their items."""
        raise NotImplementedError


class Distances(Meter):
    """FID, at so many pictures and at infinity, KID, inception score, precision and recall."""

    def __init__(self, metrics: Sequence[str], network: FeatureNet, prefix: str = "") -> None:
        super().__init__(metrics)
        self.network, self.key, self.prefix = network, network.facts, prefix

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str], items: list[int]) -> Rows:
        return {"features": self.network(image)}

    def called(self, figure: str) -> str:
        return self.prefix + self.network.called(figure)

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        sets = real["features"], made["features"]
        for features, whose in zip(sets, ("real", "evaluated"), strict=True):
            if bad := int((~features.isfinite().all(1)).sum()):
                raise UserError(
                    f"the features of {bad} of {len(features)} {whose} pictures are not finite; "
                    "are the feature network's weights whole?"
                )
        found = {}
        if "fid" in self.metrics:
            fewest, dimension = min(map(len, sets)), sets[0].shape[1]
            name = self.called("fid")
            if fewest <= dimension:
                self.notes.append(
                    f"{name}_biased: {fewest} pictures are too few for {dimension} features; the figure is "
                    "mostly bias, compare it only with figures of as many pictures"
                )
                name = f"{name}_biased"
            else:
                self.notes.append(
                    f"{name}: the interval is of the estimate at n={fewest}, not of the distance of endless "
                    f"pictures, which is lower ({self.called('fid_infinity')})"
                )
            found[name] = frechet(*sets)
        if "fid_infinity" in self.metrics:
            found[self.called("fid_infinity")] = frechet_infinity(*sets)
        if "kid" in self.metrics:
            found[self.called("kid")] = kid(*sets)
        if "inception" in self.metrics and self.network.head is not None:
            found["inception_score"] = inception_score(sets[1] @ self.network.head.cpu().T)
        if "precision_recall" in self.metrics:
            found[self.called("precision")], found[self.called("recall")] = precision_recall(*sets)
        return found


class Scores(Meter):
    """CLIP score (100 max(cos, 0), see `metrics.clip_score`), retrieval of captions by pictures, and, of the
    grammar of `shapes`, how often a picture's own caption is nearer than those that say one thing otherwise.

    A CLIP score hardly falls with one wrong word; which of two captions is nearer does (Thrush et al. 2022,
    "Winoground", image to text; Yuksekgonul et al. 2023, sec. 2).
    """

    def __init__(self, metrics: Sequence[str], clip: FrozenCLIP) -> None:
        super().__init__(metrics)
        self.clip, self.key = clip, {"clip": clip.weights_hash}

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str], items: list[int]) -> Rows:
        text = self.clip.embed_captions(captions)["text_embed"]
        embed = self.clip.embed_image(from_uint8(image))
        return {"image_embed": F.normalize(embed, dim=1), "text_embed": F.normalize(text, dim=1)}

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        found = {}
        if "clip_score" in self.metrics:
            for name, rows in {"clip_score": made, "clip_score_real": real}.items():
                cosine = (rows["image_embed"] * rows["text_embed"]).sum(1)
                found[name] = of_mean(100 * cosine.clamp(min=0))
        if "retrieval" in self.metrics:
            found |= recalls(made, captions)
        if "hard_negatives" in self.metrics:
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


class ZeroShot(Scores):
    """A CLIP itself: retrieval among real pictures, and the class of each among all classes."""

    def __init__(self, metrics: Sequence[str], clip: FrozenCLIP, classes: "Classes | None") -> None:
        super().__init__(metrics, clip)
        self.classes = classes

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        found = recalls(real, captions) if "retrieval" in self.metrics else {}
        if "zero_shot" in self.metrics and self.classes:
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


Classes = tuple[list[tuple[str, ...]], Tensor]  # sentences of each class; the class of each picture, -1: none


class Verdicts(Meter):
    """The judge of `shapes`, attribute by attribute, beside what chance has right.

    Groups: `unseen` captions name a colour-shape pair that training never shows, all others are `seen`;
    `seen_new` are those of them that the training never read word for word, where `read` knows.
    """

    def __init__(self, metrics: Sequence[str], read: Callable[[], set[str]] | None = None) -> None:
        super().__init__(metrics)
        self.judge, self.read = Judge(), read

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str], items: list[int]) -> Rows:
        images = from_uint8(image)
        reading = self.judge.read(images)
        return self.judge.score(reading, captions) | {RESIDUAL: self.judge.residual(images, reading)}

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        groups = self.groups(captions)
        verdicts, found = {key: rows for key, rows in made.items() if key != RESIDUAL}, {}
        for of, name, table in ((of_share, "judge", verdicts), (of_mean, "chance", chance(captions))):
            for group, member in groups.items():
                found |= {f"{name}/{group}{key}": of(rows[member]) for key, rows in table.items()}
        found = {name: figure for name, figure in found.items() if figure.value == figure.value}
        if "seen_new/" in groups:
            old = ~groups["seen_new/"][groups["seen/"]]
            found["seen_captions_read_in_training"] = of_share(old)
        return found | {f"judge_{RESIDUAL}": of_mean(made[RESIDUAL])}

    def groups(self, captions: list[str]) -> dict[str, Tensor]:
        unseen = names_unseen(captions)
        groups = {"": torch.ones_like(unseen), "seen/": ~unseen, "unseen/": unseen}
        if self.read and (~unseen).any():
            known = self.read()
            groups["seen_new/"] = ~unseen & torch.tensor([caption not in known for caption in captions])
        return groups


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
