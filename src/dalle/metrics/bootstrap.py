"""How sure a figure is: 95 % intervals from resampled pictures (Efron & Tibshirani 1993, ch. 13).

Of a mean, the percentiles of resampled means. Of a statistic of the whole set (FID, KID, inception score),
the figure plus or minus 1.96 standard deviations of the resampled ones: drawing with repetition makes a set
poorer, so the resampled figures themselves lie to one side.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

RESAMPLES = 200
SEED = 20220413
SIGMAS = 1.96


class Figure(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def exact(value: float | int) -> Figure:
    """What was counted, not estimated."""
    return Figure(float(value), float(value), float(value))


def counts(n: int, resamples: int = RESAMPLES) -> Float[Tensor, "R n"]:
    """How often each of n pictures is drawn in each resample of n; the same on every machine."""
    picks = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(SEED))
    ones = torch.ones(1, 1, dtype=torch.float64).expand(resamples, n)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, picks, ones)


def of_mean(values: Shaped[Tensor, "n"]) -> Figure:
    """The mean of what was measured on each picture; nan counts as not measured, and gives nan where all is.

    Verdicts (0 or 1) that are all the same have no spread to resample; the rule of three (3 / n) bounds them.
    """
    known = values.double()
    known = known[~known.isnan()]
    if not len(known):
        return Figure(*[float("nan")] * 3)
    means = counts(len(known)) @ known / len(known)
    value, low, high = known.mean().item(), *means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    if value in (0.0, 1.0) and bool((known == value).all()):
        low, high = (0.0, min(1.0, 3 / len(known))) if value == 0 else (max(0.0, 1 - 3 / len(known)), 1.0)
    return Figure(value, low, high)


def around(value: float, resampled: Float[Tensor, "R"]) -> Figure:
    """A statistic of the whole set, and how much it varies over resamples."""
    spread = SIGMAS * resampled.std().item()
    return Figure(value, value - spread, value + spread)
