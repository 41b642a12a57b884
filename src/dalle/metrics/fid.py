"""Statistics of two sets of features, each with its interval: FID, KID, inception score, precision, recall.

What torch-fidelity 0.4 computes on the same features, in float64: differences of features far from zero would
drown in float32. Its functions are used as they are where they give all that is needed. Intervals are over
the generated pictures (recall's: over the real ones); the other set is taken as given. That of FID is of the
estimate at this many pictures, which is biased upwards; FID at infinity and its interval are of the
distributions.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from dalle.errors import UserError
from dalle.metrics.features import FeatureNet
from dalle.metrics.intervals import (
    GROUPS,
    RESAMPLES,
    SEED,
    UNKNOWN,
    Figure,
    around,
    counts,
    jackknife,
    of_share,
)
from dalle.metrics.metric import BIASED, EvaluationMetric, Rows

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID; with fewer pictures one subset is all of them
SPLITS = 10  # of the inception score
DISTANCES = ("fid", "kid", "fid_infinity", "inception", "precision_recall")
NEIGHBOURS = 3  # of precision and recall
LARGE, FEWER = 512, 50  # with more dimensions than this, FID is resampled less often: it takes a second each
KID_PICTURES = 5000  # on so many at most the interval of KID is estimated
PARTS = 4  # of FID at infinity: the set is cut into 1, 2, ... so many parts
ROWS = 2048  # of a matrix of pairs at a time


def frechet(real: Float[Tensor, "m d"], generated: Float[Tensor, "n d"], interval: bool = True) -> Figure:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, eq. 6), unbiased covariances; nan with
    fewer than two pictures of either kind, which have none.

    With C1 = R R', the trace of the root of C1 C2 is that of the symmetric R' C2 R; R is computed once.
    Without the `interval`, which takes most of the time, its ends are nan.
    """
    if min(len(real), len(generated)) < 2:
        return UNKNOWN
    distance, n = _distance(real, generated), len(generated)
    value = distance(torch.ones(n, dtype=torch.float64)).item()
    if not interval:
        return UNKNOWN._replace(value=value)
    resamples = RESAMPLES if real.shape[1] <= LARGE else FEWER
    return around(value, torch.stack([distance(count) for count in counts(n, resamples)]))


def _distance(
    real: Float[Tensor, "m d"], generated: Float[Tensor, "n d"]
) -> Callable[[Float[Tensor, "n"]], Float[Tensor, ""]]:
    """The distance, with each generated picture counted as often as is asked."""
    real, generated = real.double(), generated.double()
    mean, root = real.mean(0), _root(real)
    trace, projected = root.square().sum(), generated @ root

    def distance(count: Float[Tensor, "n"]) -> Float[Tensor, ""]:
        n = count.sum()
        weight, m = count / (n - 1), count @ generated / n
        part = (projected - m @ root) * weight.sqrt()[:, None]
        gram = part.mT @ part if len(part) > part.shape[1] else part @ part.mT
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        return (m - mean).square().sum() + trace + weight @ (generated - m).square().sum(1) - 2 * cross

    return distance


def frechet_infinity(real: Float[Tensor, "m d"], generated: Float[Tensor, "n d"]) -> Figure:
    """The Frechet distance of endless pictures (Chong & Forsyth 2020, sec. 3.2): a line in 1/N through the
    distances of fewer pictures, at 1/N = 0.

    Theirs lets only the generated pictures grow, to 15 random sizes; here both sets do, since both are
    finite, and the sizes are a whole, halves, thirds and quarters, with the mean over all parts. Parts must
    hold more pictures than there are dimensions, see `enough_for_infinity`.
    """
    generator = torch.Generator().manual_seed(SEED)
    sets, seed = [], generator.get_state()
    for features in (real.double(), generated.double()):
        generator.set_state(seed)  # sets of one size stay pairs
        sets.append(features[torch.randperm(len(features), generator=generator)])

    def without(group: int | None) -> list[Tensor]:
        return [x if group is None else x[torch.arange(len(x)) % GROUPS != group] for x in sets]

    value, *others = (_at_infinity(*without(group)) for group in (None, *range(GROUPS)))
    return jackknife(value, torch.tensor(others))


def enough_for_infinity(dimension: int) -> int:
    """How many pictures of either kind FID at infinity needs: more than dimensions in every part."""
    return (PARTS * (dimension + 2) * GROUPS) // (GROUPS - 1) + 1


def _at_infinity(real: Float[Tensor, "m d"], generated: Float[Tensor, "n d"]) -> float:
    found = []
    for parts in range(1, PARTS + 1):
        pairs = zip(real.tensor_split(parts), generated.tensor_split(parts), strict=True)
        each = [_distance(a, b)(torch.ones(len(b), dtype=torch.float64)) for a, b in pairs]
        found.append(torch.stack(each).mean())
    line = torch.stack([torch.ones(PARTS), torch.arange(1.0, PARTS + 1)], 1).double()
    return torch.linalg.lstsq(line, torch.stack(found)[:, None]).solution[0, 0].item()


def _root(features: Float[Tensor, "m d"]) -> Float[Tensor, "d r"]:
    """R with R R' = covariance, without the directions in which nothing varies."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    if len(centred) <= centred.shape[1]:  # few pictures: few directions
        _, spread, vectors = torch.linalg.svd(centred, full_matrices=False)
    else:
        values, columns = torch.linalg.eigh(centred.mT @ centred)
        spread, vectors = values.clamp(min=0).sqrt(), columns.mT
    kept = spread > 1e-6 * spread.max()
    return (spread[kept, None] * vectors[kept]).mT


def kid(real: Float[Tensor, "m d"], generated: Float[Tensor, "n d"]) -> Figure:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, eq. 4): the mean over
    subsets; may be below 0.
    """
    size = min(SUBSET_SIZE, len(real), len(generated))
    whole = size == len(real) == len(generated)
    found = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subset_size=size,
        kid_subsets=1 if whole else SUBSETS,
        verbose=False,
    )
    x, y = generated[:KID_PICTURES].double(), real[:KID_PICTURES].double()
    drawn = counts(len(x))  # a picture drawn twice is not a pair of pictures
    pairs, crossed = drawn.new_zeros(len(drawn)), drawn.new_zeros(len(drawn))
    for rows in torch.arange(len(x)).split(ROWS):
        kernel = (x[rows] @ x.mT / x.shape[1] + 1) ** 3
        kernel[torch.arange(len(rows)), rows] = 0
        pairs += ((drawn @ kernel.mT) * drawn[:, rows]).sum(1)
        crossed += drawn[:, rows] @ ((x[rows] @ y.mT / x.shape[1] + 1) ** 3).mean(1)
    n = drawn.sum(1)
    resampled = pairs / (n.square() - drawn.square().sum(1)) - 2 * crossed / n
    return around(found[KEY_METRIC_KID_MEAN], resampled)


def inception_score(logits: Float[Tensor, "n c"]) -> Figure:
    """exp of the mean KL of p(y|x) and p(y) (Salimans et al. 2016, sec. 4), the mean over ten splits."""
    value = isc_features_to_metric(logits, SPLITS)[KEY_METRIC_ISC_MEAN]
    rows = [torch.arange(len(logits)).repeat_interleave(count.long()) for count in counts(len(logits))]
    resampled = [isc_features_to_metric(logits[row], SPLITS)[KEY_METRIC_ISC_MEAN] for row in rows]
    return around(value, torch.tensor(resampled))


def precision_recall(
    real: Float[Tensor, "m d"], generated: Float[Tensor, "n d"], neighbours: int = NEIGHBOURS
) -> tuple[Figure, Figure]:
    """Shares of generated pictures among the real ones, and of real ones among the generated (Kynkaanniemi et
    al. 2019, eq. 2): within the distance of some picture's k-th nearest neighbour of its own kind.
    """
    real, generated = real.double(), generated.double()
    centre = real.mean(0)
    real, generated = real - centre, generated - centre  # cdist expands squares
    return (
        of_share(_within(generated, real, neighbours)),
        of_share(_within(real, generated, neighbours)),
    )


def _within(points: Float[Tensor, "p d"], others: Float[Tensor, "o d"], neighbours: int) -> Tensor:
    """Which points lie in some other's ball."""
    parts = others.split(ROWS)  # the nearest of all to a point is itself
    radius = torch.cat([torch.cdist(p, others).kthvalue(neighbours + 1).values for p in parts])
    return torch.cat([(torch.cdist(part, others) <= radius).any(1) for part in points.split(ROWS)])


class FrechetDistance(EvaluationMetric):
    """FID, and by name of `which` whatever else comes of the same features: FID at infinity, KID, inception
    score, precision and recall.

    Args:
        prefix: of the figures' names: `rfid`.
        intervals: whether FID has one, which takes most of the time.
    """

    columns = ("features",)

    def __init__(
        self, network: FeatureNet, which: Sequence[str] = ("fid",), prefix: str = "", intervals: bool = True
    ) -> None:
        super().__init__()
        self.network, self.which, self.prefix, self.intervals = network, which, prefix, intervals

    @property
    def reference(self) -> dict:
        return self.network.facts

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str]) -> Rows:
        return {"features": self.network(image)}

    def called(self, figure: str) -> str:
        return self.prefix + self.network.called(figure)

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        """The name of a distance that is mostly bias says so: `fid_biased`."""
        sets = real["features"], made["features"]
        for features, whose in zip(sets, ("real", "evaluated"), strict=True):
            if bad := int((~features.isfinite().all(1)).sum()):
                raise UserError(
                    f"the features of {bad} of {len(features)} {whose} pictures are not finite; "
                    "are the feature network's weights whole?"
                )
        found = {}
        if "fid" in self.which:
            fewest, dimension = min(map(len, sets)), sets[0].shape[1]
            name = self.called("fid")
            if fewest <= dimension:
                self.notes.append(
                    f"{name}{BIASED}: {fewest} pictures are too few for {dimension} features; the figure is "
                    "mostly bias, compare it only with figures of as many pictures"
                )
                name += BIASED
            elif self.intervals:
                self.notes.append(
                    f"{name}: the interval is of the estimate at n={fewest}, not of the distance of endless "
                    f"pictures, which is lower ({self.called('fid_infinity')})"
                )
            found[name] = frechet(*sets, self.intervals)
        if "fid_infinity" in self.which:
            found[self.called("fid_infinity")] = frechet_infinity(*sets)
        if "kid" in self.which:
            found[self.called("kid")] = kid(*sets)
        if "inception" in self.which and self.network.head is not None:
            found["inception_score"] = inception_score(sets[1] @ self.network.head.cpu().T)
        if "precision_recall" in self.which:
            found[self.called("precision")], found[self.called("recall")] = precision_recall(*sets)
        return found
