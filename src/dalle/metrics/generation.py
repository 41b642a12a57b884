"""The table of a text-to-image stage: how real its pictures look, and how well they show what the captions
say.

    fid or fid_clip     distance to real pictures; the name says whose features (see `frechet.py`)
    clip_score          0 to 100; `clip_score_real` is that of the real pictures: about what can be reached.
                        Without a CLIP there are none of these, nor `fid_clip`
    judge/all           share of pictures that show all their caption says; judge/colour, judge/shape ...:
    one attribute,
                        over the captions that mention it; judge/<group>/...: the same within a group of
                        captions
    judge_residual      how far pictures are from clean drawings of what they show, see `Judge.residual`
    pictures            how many were generated; compare distances of equal numbers only
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torchmetrics import Metric

from dalle.images import from_uint8, to_uint8
from dalle.metrics.clip_score import CLIPScore, ImageTextEmbedder
from dalle.metrics.frechet import ImageEmbedder, frechet_distance
from dalle.metrics.judge import Judge


@runtime_checkable
class Embedder(ImageEmbedder, ImageTextEmbedder, Protocol):
    """What is used of a `FrozenCLIP`."""


Verdicts = Callable[[Tensor, list[str]], dict[str, Tensor]]


class GenerationMetrics:
    """Fed with batches of generated pictures, real ones and captions; gives the table as a flat dict.

    A plain object, not a Module: what it holds (a CLIP, an Inception) never gets into a stage's checkpoint.
    Sums over all ranks; every rank must call `compute`.

    Args:
        clip: a `FrozenCLIP`, for the CLIP score and, without Inception, for `fid_clip`; None goes without.
        judge: a `Judge`, where captions are of the grammar of `shapes`.
        inception: path of the FID Inception's weights; None looks into torch.hub's cache.
        download: whether those weights may be downloaded where they are missing.
    """

    def __init__(
        self,
        clip: Embedder | None,
        judge: Verdicts | None = None,
        inception: str | Path | None = None,
        download: bool = False,
    ) -> None:
        self.judge = judge
        self.frechet = frechet_distance(clip, inception, download)
        self.clip_scores = {"clip_score": CLIPScore(clip), "clip_score_real": CLIPScore(clip)} if clip else {}
        self.tally: defaultdict[str, Tensor] = defaultdict(_nothing)

    def to(self, device: torch.device | str) -> "GenerationMetrics":
        """Moves sums and Inception to a device; the CLIP stays where its owner put it."""
        for metric in self._metrics():
            metric.to(device)
        return self

    def _metrics(self) -> list[Metric]:
        return [*([self.frechet] if self.frechet is not None else []), *self.clip_scores.values()]

    @torch.no_grad()
    def update(
        self,
        generated: Float[Tensor, "B 3 H W"],
        real: Float[Tensor, "B 3 h w"],
        captions: Sequence[str],
        groups: Sequence[str] | None = None,
    ) -> None:
        """Adds pictures in [-1, 1], taken as the 8 bits they are saved with.

        `real` pictures belong to the captions too. `groups` names the group of each caption ("seen",
        "unseen").
        """
        generated, real = from_uint8(to_uint8(generated)), from_uint8(to_uint8(real))
        if self.frechet is not None:
            self.frechet.update(real, real=True)
            self.frechet.update(generated, real=False)
        for name, images in {"clip_score": generated, "clip_score_real": real}.items():
            if name in self.clip_scores:
                self.clip_scores[name].update(images, captions)
        self.tally["pictures"] += torch.tensor([len(generated)] * 2)
        if self.judge is not None:
            for attribute, right in self.judge(generated, list(captions)).items():
                self._count(f"judge/{{}}{attribute}", right.double().cpu(), groups)
        if isinstance(self.judge, Judge):
            self._count("judge_residual{}", self.judge.residual(generated).double(), None)

    def _count(self, name: str, right: Float[Tensor, "B"], groups: Sequence[str] | None) -> None:
        """Adds verdicts of 1, 0 or nan (the caption does not say) to the shares of all and of each group,
        whose name goes into the braces of `name`.
        """
        members = {name.format(""): torch.ones_like(right, dtype=torch.bool)}
        for group in sorted(set(groups or ())):
            members[name.format(f"{group}/")] = torch.tensor([own == group for own in groups or ()])
        for key, member in members.items():
            said = right[member & ~right.isnan()]
            self.tally[key] += torch.stack([said.sum(), torch.tensor(len(said))])

    def compute(self) -> dict[str, float]:
        """The table over everything seen by all ranks. Attributes that no caption mentioned are left out."""
        tally = _over_ranks(self.tally)
        table = {self.frechet.name: self.frechet.compute().item()} if self.frechet is not None else {}
        table |= {name: score.compute().item() for name, score in self.clip_scores.items()}
        table["pictures"] = tally.pop("pictures", _nothing())[0].item()
        return table | {name: (right / said).item() for name, (right, said) in tally.items() if said > 0}

    def reset(self) -> None:
        for metric in self._metrics():
            metric.reset()
        self.tally.clear()


def _nothing() -> Float[Tensor, "2"]:
    return torch.zeros(2, dtype=torch.float64)


def _over_ranks(tally: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums by name; ranks may know different names, since captions differ in what they mention."""
    ranks: list[dict[str, Tensor] | None] = [dict(tally)]
    if distributed.is_available() and distributed.is_initialized():
        ranks = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, dict(tally))
    total: defaultdict[str, Tensor] = defaultdict(_nothing)
    for rank in ranks:
        for name, counts in (rank or {}).items():
            total[name] = total[name] + counts
    return dict(sorted(total.items()))
