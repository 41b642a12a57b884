"""How sure a figure is: its 95 % interval, over the pictures it was measured on.

Of a share, Wilson's (1927): resampling is too narrow where few are right or wrong. Of another mean, the
percentiles of resampled means (Efron & Tibshirani 1993, ch. 13). Of a statistic of the whole set (FID, KID,
inception score), the figure plus or minus 1.96 standard deviations of the resampled ones: drawing with
repetition makes a set poorer, so the resampled figures themselves lie to one side.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

RESAMPLES = 200
SEED = 20220413
SIGMAS = 1.96  # of the normal law, to 95 %
GROUPS, STUDENT = 10, 2.262  # of the jackknife; Student's t with 9 degrees of freedom, to 95 %


class Figure(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


UNKNOWN = Figure(math.nan, math.nan, math.nan)


def exact(value: float) -> Figure:
    """What was counted, not estimated."""
    return Figure(float(value), float(value), float(value))


def counts(n: int, resamples: int = RESAMPLES) -> Float[Tensor, "R n"]:
    """How often each of n pictures is drawn in each resample of n; the same on every machine."""
    picks = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(SEED))
    ones = torch.ones(1, 1, dtype=torch.float64).expand(resamples, n)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, picks, ones)


def of_share(right: Shaped[Tensor, "n"]) -> Figure:
    """The share of verdicts (1, 0 or True, False) that are right, and Wilson's score interval: the shares p
    with |found - p| <= z sqrt(p (1 - p) / n) (Wilson 1927; Brown, Cai & DasGupta 2001, eq. 4).

    nan counts as not judged, and gives nan where all is.
    """
    known = right.double()
    known = known[~known.isnan()]
    n = len(known)
    if not n:
        return UNKNOWN
    if not ((known == 0) | (known == 1)).all():
        raise ValueError("verdicts are 0 or 1; of_mean is for other values")
    share, spread = known.mean().item(), SIGMAS**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    # what the ends are in exact numbers, where nothing or all is right
    return Figure(share, 0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half)


def of_mean(values: Shaped[Tensor, "n"]) -> Figure:
    """The mean of what was measured on each picture; nan counts as not measured, and gives nan where all is.

    Shares have an interval of their own, `of_share`.
    """
    known = values.double()
    known = known[~known.isnan()]
    if not len(known):
        return UNKNOWN
    means = counts(len(known)) @ known / len(known)
    return Figure(known.mean().item(), *means.quantile(means.new_tensor([0.025, 0.975])).tolist())


def around(value: float, resampled: Float[Tensor, "R"]) -> Figure:
    """A statistic of the whole set, and how much it varies over resamples."""
    spread = SIGMAS * resampled.std().item()
    return Figure(value, value - spread, value + spread)


def jackknife(value: float, without: Float[Tensor, "g"]) -> Figure:
    """A statistic of the whole set, and those without each of ten equal groups of the pictures in turn: the
    delete-a-group jackknife (Efron & Tibshirani 1993, eq. 11.5), for what repeated pictures would bias.
    """
    spread = STUDENT * ((GROUPS - 1) * without.double().var(correction=0)).sqrt().item()
    return Figure(value, value - spread, value + spread)
