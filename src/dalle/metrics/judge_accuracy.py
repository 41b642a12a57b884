"""How often pictures show what captions of `shapes` say: the judge's verdicts as figures."""

from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor

from dalle.data.shapes import names_unseen
from dalle.images import from_uint8
from dalle.metrics.chance import chance
from dalle.metrics.intervals import Figure, of_mean, of_share
from dalle.metrics.judge import ATTRIBUTES, Judge
from dalle.metrics.metric import EvaluationMetric, Rows

RESIDUAL = "residual"


class JudgeAccuracy(EvaluationMetric):
    """`judge/all`: the share of pictures that show all their caption says; `judge/colour` ...: one attribute,
    over the captions that mention it; `chance/...`: what chance has right; `judge_residual`: how far pictures
    are from clean drawings of what they show, see `Judge.residual`.

    Groups: `judge/unseen/...` captions name a colour-shape pair that training never shows, all others are
    `seen`; `seen_new` are those of them that the training never read word for word, where `read` knows.

    Args:
        read: gives the captions of the training.
        chance: whether what chance has right stands beside.
    """

    columns = (*ATTRIBUTES, "count", "sound", "all", RESIDUAL)
    higher_is_better = True

    def __init__(self, read: Callable[[], set[str]] | None = None, chance: bool = True) -> None:
        super().__init__()
        self.judge, self.read, self.chance = Judge(), read, chance

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str]) -> Rows:
        images = from_uint8(image)
        reading = self.judge.read(images)
        return self.judge.score(reading, captions) | {RESIDUAL: self.judge.residual(images, reading)}

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        groups = self.groups(captions)
        by_chance = chance(captions) if self.chance else {}
        verdicts, found = {key: rows for key, rows in made.items() if key != RESIDUAL}, {}
        for of, name, table in ((of_share, "judge", verdicts), (of_mean, "chance", by_chance)):
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
