"""The judge of the data set `shapes`: does a picture show what its caption says? No trained network is involved.

Analysis by synthesis. Objects are the connected regions that are not background; each is fitted by all six shapes of
the renderer itself, with free colour, place and size (Gauss-Newton), and is what fits best. A picture counts as well
drawn only where the fit explains nearly all of it, so that a shape between two shapes, half a shape, a blur, a third
object or a colour of its own is wrong whatever the caption says.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Claim, Scenes, coverage, parse, tell
from dalle.errors import UserError

ATTRIBUTES = ("colour", "shape", "size", "position", "relation", "background")

_SIDE = 32  # larger pictures are judged at this size: everything that captions speak of is still there
_STEPS = 6  # of Gauss-Newton
_COLOUR_ERROR = 0.4  # a colour further than this from all of the palette (Euclidean, in [-1, 1]) is none of it
_SIZE_ERROR = 0.17  # relative
_MISFIT = 0.12  # see `_misfit`
_NOISE = 0.15  # more than this standard deviation of noise is not excused
_AREA = torch.tensor([torch.pi, 4, 2, 2, 20 / 9, torch.pi * 3 / 4])  # of each shape of radius 1
_DROP = torch.tensor([0, 0, 1 / 3, 0, 0, 0])  # of each shape's centroid below its centre, at radius 1


class Reading(NamedTuple):
    """What pictures show. `sound`: the picture is well drawn, that is, fully explained by its scene."""

    scenes: Scenes
    sound: Bool[Tensor, "B"]


def _components(mask: Bool[Tensor, "B S S"]) -> Int[Tensor, "B S S"]:
    """Labels (from 1; 0 elsewhere) of the 8-connected regions: the highest pixel number in each."""
    size = mask.shape[-1]
    labels = torch.arange(1.0, size * size + 1).view(1, size, size) * mask
    while True:
        grown = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        # A label names a pixel of the same region, whose own label may already be better: paths halve at each step.
        flat = F.pad(grown.flatten(1), (1, 0))
        grown = flat.gather(1, flat.long())[:, 1:].view_as(grown)
        if torch.equal(grown, labels):
            return labels.long()
        labels = grown


class _Objects(NamedTuple):
    """The N objects found in B pictures, at most two in each."""

    image: Int[Tensor, "N"]  # the picture it is in
    slot: Int[Tensor, "N"]  # its number there
    mask: Bool[Tensor, "N S S"]
    free: Float[Tensor, "N S S"]  # 0 where another object is, 1 elsewhere
    crowded: Bool[Tensor, "B"]  # there are more than two


def _find(difference: Float[Tensor, "B 3 S S"], background: Float[Tensor, "B 3"]) -> _Objects:
    """Regions nearer to some colour of the palette than to the background, down to a third of the least shape."""
    size = difference.shape[-1]
    palette = torch.tensor(list(COLOURS.values())) - background[:, None]  # (B, 8, 3)
    # |d - p|² < |d|²  <=>  2 d.p > |p|²
    nearer = torch.einsum("bchw,bkc->bkhw", difference, palette) * 2 > palette.square().sum(2)[:, :, None, None]
    foreground = nearer.any(1)
    labels = _components(foreground)
    areas = torch.zeros(len(labels), size * size + 1).scatter_add_(1, labels.flatten(1), foreground.float().flatten(1))
    areas, regions = areas.topk(3, dim=1)
    found = areas >= float(_AREA.min()) / 3 * (min(SIZES.values()) * size) ** 2
    image, slot = found[:, :2].nonzero(as_tuple=True)
    mask = labels[image] == regions[image, slot][:, None, None]
    around = F.max_pool2d(((labels[image] > 0) & ~mask).float()[:, None], 3, 1, 1)[:, 0]
    return _Objects(image, slot, mask, ((around == 0) | mask).float(), found[:, 2])


class _Fit(NamedTuple):
    shape: Int[Tensor, "N"]
    x: Float[Tensor, "N"]  # pixels, as is all below
    y: Float[Tensor, "N"]
    radius: Float[Tensor, "N"]
    paint: Float[Tensor, "N 3"]  # colour, as difference from the background
    covered: Float[Tensor, "N S S"]


def _fit(difference: Float[Tensor, "N 3 S S"], mask: Tensor, free: Tensor) -> _Fit:
    """The shape, place and size that draw each object best; each shape starts from the region's area and centroid."""
    n, size, kinds = len(mask), mask.shape[-1], len(SHAPES)
    pixels = torch.arange(size) + 0.5
    area = mask.sum((1, 2)).float()
    paint = (difference * mask[:, None]).sum((2, 3)) / area[:, None]
    # What the object covers, as far as can be seen along its mean colour.
    seen = torch.einsum("nchw,nc->nhw", difference, paint / paint.square().sum(1, keepdim=True)) * free
    seen = seen.repeat_interleave(kinds, 0)
    shape = torch.arange(kinds).repeat(n)
    radius = (area[:, None] / _AREA).sqrt().flatten()
    x = ((mask.sum(1) * pixels).sum(1) / area).repeat_interleave(kinds)
    y = ((mask.sum(2) * pixels).sum(1) / area).repeat_interleave(kinds) - _DROP.repeat(n) * radius
    weight = free.repeat_interleave(kinds, 0)
    for _ in range(_STEPS):
        covered = coverage(shape, x / size, y / size, radius / size, size)
        down, across = torch.gradient(covered, dim=(1, 2))
        right, below = pixels - x[:, None], pixels - y[:, None]
        grow = (across * right[:, None, :] + down * below[:, :, None]) / radius[:, None, None]
        # seen ~ gain * (covered - across dx - down dy - grow dr): least squares for gain and gain * (dx, dy, dr).
        basis = (torch.stack((covered, -across, -down, -grow), 1) * weight[:, None]).flatten(2)
        normal = basis @ basis.mT + 1e-3 * torch.eye(4)
        gain, *steps = torch.linalg.solve(normal, basis @ seen.flatten(1)[:, :, None]).squeeze(2).unbind(1)
        x, y, radius = (p + (step / gain.clamp(0.2)).clamp(-1, 1) for p, step in zip((x, y, radius), steps, strict=True))
        radius = radius.clamp(1, size / 2)

    covered = coverage(shape, x / size, y / size, radius / size, size).view(n, kinds, size, size)
    mine = covered * free[:, None]
    paint = torch.einsum("nkhw,nchw->nkc", mine, difference) / mine.square().sum((2, 3)).clamp(1e-3)[:, :, None]
    best = (paint.square().sum(2) * mine.square().sum((2, 3))).argmax(1)  # explains most of the squared difference
    pick = torch.arange(n) * kinds + best
    return _Fit(best, x[pick], y[pick], radius[pick], paint.flatten(0, 1)[pick], covered.flatten(0, 1)[pick])


def _misfit(difference: Float[Tensor, "B 3 S S"], found: _Objects, fit: _Fit) -> Float[Tensor, "B"]:
    """Worst unexplained share over a picture's objects.

    Of each object: the squared difference from the fit over the pixels nearest to the object, less what white noise
    explains, in units of its contrast and of its squared radius.
    """
    batch, size = len(difference), difference.shape[-1]
    parts = fit.covered[:, None] * fit.paint[:, :, None, None]
    rest = difference.index_add(0, found.image, -parts)
    # Neighbouring pixels of a plain region differ by noise alone; the median does not see the edges.
    steps = torch.cat((rest.diff(dim=3).flatten(1), rest.diff(dim=2).flatten(1)), 1)
    noise = (steps.abs().median(1).values / 0.6745 / 2**0.5).clamp(max=_NOISE)
    excess = rest.square().sum(1) - 3 * noise.square()[:, None, None]

    pixels = torch.arange(size) + 0.5
    away = (pixels - fit.x[:, None])[:, None, :].square() + (pixels - fit.y[:, None])[:, :, None].square()
    reach = torch.full((batch, 2, size, size), torch.inf)
    reach[found.image, found.slot] = away / fit.radius.square()[:, None, None]
    nearest = reach.argmin(1)[found.image] == found.slot[:, None, None]
    share = (excess[found.image] * nearest).sum((1, 2)) / fit.paint.square().sum(1) / fit.radius.square()
    return torch.full((batch,), -torch.inf).scatter_reduce_(0, found.image, share, "amax")


class Judge:
    """Reads pictures of the data set `shapes`, and scores what captions say about them."""

    def read(self, images: Float[Tensor, "B 3 S S"]) -> Reading:
        """What the pictures (B, 3, S, S) in [-1, 1] show, S >= 16."""
        if images.shape[-1] < 16:
            raise UserError(f"the judge needs pictures of at least 16 pixels, not {images.shape[-1]}")
        parts = [self._read(part) for part in images.detach().float().cpu().split(64)]
        scenes = Scenes(*(torch.cat(column) for column in zip(*(vars(p.scenes).values() for p in parts), strict=True)))
        return Reading(scenes, torch.cat([part.sound for part in parts]))

    def _read(self, images: Float[Tensor, "B 3 S S"]) -> Reading:
        if images.shape[-1] > _SIDE:
            images = F.interpolate(images, (_SIDE, _SIDE), mode="area")
        size = images.shape[-1]
        border = torch.cat((images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]), 2)
        background = border.median(2).values
        difference = images - background[:, :, None, None]
        found = _find(difference, background)
        fit = _fit(difference[found.image], found.mask, found.free)

        grounds, palette = torch.tensor(list(BACKGROUNDS.values())), torch.tensor(list(COLOURS.values()))
        sizes = torch.tensor(list(SIZES.values())) * size
        ground_error, ground = torch.cdist(background, grounds).min(1)
        colour_error, colour = torch.cdist(background[found.image] + fit.paint, palette).min(1)
        size_error, kind = (fit.radius[:, None] / sizes).log().abs().min(1)

        def spread(values: Tensor, empty: float) -> Tensor:
            table = torch.full((len(images), 2), empty, dtype=values.dtype)
            table[found.image, found.slot] = values
            return table

        bad = spread(((colour_error > _COLOUR_ERROR) | (size_error > _SIZE_ERROR)).float(), 0).any(1)
        misfit = _misfit(difference, found, fit)
        scenes = Scenes(
            background=ground,
            colour=spread(colour, -1),
            shape=spread(fit.shape, -1),
            size=spread(kind, -1),
            x=spread(fit.x / size, 0),
            y=spread(fit.y / size, 0),
        )
        sound = (misfit < _MISFIT) & ~bad & ~found.crowded & (ground_error < _COLOUR_ERROR) & (scenes.count > 0)
        self.debug = misfit
        return Reading(scenes, sound)

    def __call__(self, images: Float[Tensor, "B 3 S S"], captions: Sequence[str]) -> dict[str, Float[Tensor, "B"]]:
        """Scores 1 (right) or 0 (wrong), each (B,), nan where a caption says nothing about an attribute.

        Keys: ATTRIBUTES; `count`, the number of objects; `sound`, see `Reading`; `all`: everything above is right.
        Where the number of objects is wrong, so is whatever the caption says about them. Where two objects are spoken
        of, they are the picture's two in the order that fits best.

        Raises UserError for captions that are not of the grammar of `scenes`.
        """
        if len(captions) != len(images):
            raise UserError(f"{len(images)} pictures cannot be judged by {len(captions)} captions: give one for each")
        claims = [parse(caption) for caption in captions]
        reading = self.read(images)
        marks = [_mark(claim, shown) for claim, shown in zip(claims, tell(reading.scenes), strict=True)]
        scores = {
            key: torch.tensor([torch.nan if mark[key] is None else float(mark[key]) for mark in marks])
            for key in (*ATTRIBUTES, "count")
        }
        scores["sound"] = reading.sound.float()
        scores["all"] = torch.stack([score.nan_to_num(1.0) for score in scores.values()]).amin(0)
        return scores


def _mark(claim: Claim, shown: Claim) -> dict[str, bool | None]:
    """Which of the things a caption claims are shown; None where it claims nothing."""
    marks = [_compare(claim, order) for order in _orders(shown)]
    return max(marks, key=lambda mark: sum(value is True for value in mark.values()))


def _orders(claim: Claim) -> list[Claim]:
    """The same, seen from either object."""
    if len(claim.things) < 2:
        return [claim]
    relation = None if claim.relation is None else claim.relation ^ 1
    return [claim, Claim(claim.things[::-1], relation, background=claim.background)]


def _compare(claim: Claim, shown: Claim) -> dict[str, bool | None]:
    same = len(claim.things) == len(shown.things)

    def agree(said: list, seen: list) -> bool | None:
        """None where nothing is said; else whether all that is said is seen."""
        if all(value is None for value in said):
            return None
        return same and all(a is None or a == b for a, b in zip(said, seen, strict=True))

    marks = {
        key: agree([getattr(thing, key) for thing in claim.things], [getattr(thing, key) for thing in shown.things])
        for key in ("colour", "shape", "size")
    }
    marks["position"] = agree([claim.row, claim.column], [shown.row, shown.column])
    marks["relation"] = agree([claim.relation], [shown.relation])
    marks["background"] = None if claim.background is None else claim.background == shown.background
    return {**marks, "count": same}
