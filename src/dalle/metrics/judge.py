"""The judge of the data set `shapes`: does a picture show what its caption says? No trained network is
involved.

Analysis by synthesis. Objects are the connected regions that are not background; each is fitted by all six
shapes of the renderer itself, with free colour, place and size (Gauss-Newton), and is what fits best. A
picture counts as well drawn only where the fit explains nearly all of it, so that a shape between two
shapes, half a shape, a blur, a third object or a colour of its own is wrong whatever the caption says.

It speaks of coarse content: pictures are judged at 32 px, and a colour is the nearest of the palette, so
colours a quarter grayer and patterns finer than a pixel of 32 pass. `residual` sees these: how far the
picture is, pixel by pixel and at its own size, from the drawing of the scene that was read in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dalle.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Claim, Scenes, coverage, draw, parse, tell
from dalle.errors import UserError

ATTRIBUTES = ("colour", "shape", "size", "position", "relation", "background")

_SIDE = 32  # larger pictures are judged at this size: everything that captions speak of is still there
_STEPS = 6  # of Gauss-Newton
# What is still well drawn, see `_sound`. Chosen between what noise (sigma 0.1), soft edges and small colour
# errors do to drawings of the data set, and what halving, blurring or mixing them does;
# `tests/metrics/test_judge.py` has both.
_COLOUR_ERROR = 0.45  # Euclidean, in [-1, 1]: further than this from all of a palette is none of it
_SIZE_ERROR = 0.17  # relative
_NEGLIGIBLE = 0.25  # smaller differences of a pixel's colour (Euclidean) are no flaw of the drawing
_MISFIT = 0.02
_LEAD, _LEAD_PER_MISFIT = 0.02, 0.7
_PATCH = 0.3

# Of each shape at radius 1: area, length of the outline, how far its centroid lies below its centre.
_AREA = torch.tensor([torch.pi, 4, 2, 2, 20 / 9, torch.pi * 3 / 4])
_OUTLINE = torch.tensor([2 * torch.pi, 8, 2 + 20**0.5, 32**0.5, 8, 3 * torch.pi])
_DROP = torch.tensor([0, 0, 1 / 3, 0, 0, 0])


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
        # A label names a pixel of the same region, whose own label may already be better: paths halve at
        # each step.
        flat = F.pad(grown.flatten(1), (1, 0))
        grown = flat.gather(1, flat.long())[:, 1:].view_as(grown)
        if torch.equal(grown, labels):
            return labels.long()
        labels = grown


def _shrink(size: int, side: int) -> Float[Tensor, "side size"]:
    """Rows are the weights of the mean over each of `side` equal intervals, of pixels that are `size` of
    them.
    """
    edges = torch.linspace(0, size, side + 1)[:, None]
    below = (edges - torch.arange(size)).clamp(0, 1)  # share of each pixel that lies before each edge
    return below.diff(dim=0) * side / size


class _Objects(NamedTuple):
    """The N objects found in B pictures, at most two in each."""

    image: Int[Tensor, "N"]  # the picture it is in
    slot: Int[Tensor, "N"]  # its number there
    mask: Bool[Tensor, "N S S"]
    other: Bool[Tensor, "N S S"]  # where another object is, one pixel wider
    crowded: Bool[Tensor, "B"]  # there are more than two


def _find(difference: Float[Tensor, "B 3 S S"], background: Float[Tensor, "B 3"]) -> _Objects:
    """Regions nearer to some colour of the palette than to the background, down to a third of the least
    shape.
    """
    size = difference.shape[-1]
    palette = torch.tensor(list(COLOURS.values())) - background[:, None]  # (B, 8, 3)
    # |d - p|² < |d|²  <=>  2 d.p > |p|²
    along = torch.einsum("bchw,bkc->bkhw", difference, palette)
    foreground = (2 * along > palette.square().sum(2)[:, :, None, None]).any(1)
    labels = _components(foreground)
    areas = torch.zeros(len(labels), size * size + 1)
    areas, regions = areas.scatter_add_(1, labels.flatten(1), foreground.float().flatten(1)).topk(3, dim=1)
    found = areas >= float(_AREA.min()) / 3 * (min(SIZES.values()) * size) ** 2
    image, slot = found[:, :2].nonzero(as_tuple=True)
    mask = labels[image] == regions[image, slot][:, None, None]
    around = F.max_pool2d(((labels[image] > 0) & ~mask).float()[:, None], 3, 1, 1)[:, 0]
    return _Objects(image, slot, mask, (around > 0) & ~mask, found[:, 2])


class _Fit(NamedTuple):
    """The best drawing of each object; x, y and radius in pixels."""

    shape: Int[Tensor, "N"]
    x: Float[Tensor, "N"]
    y: Float[Tensor, "N"]
    radius: Float[Tensor, "N"]
    paint: Float[Tensor, "N 3"]  # colour, as difference from the background
    lead: Float[Tensor, "N"]  # how much more than the second best shape it explains, see `_sound`


def _fit(difference: Float[Tensor, "B 3 S S"], found: _Objects) -> _Fit:
    """Fits each object in a window around it. Beyond the picture's edges there is only more background."""
    size, n = difference.shape[-1], len(found.image)
    half = int(1.25 * max(SIZES.values()) * size) + 3
    pixels, area = torch.arange(size) + 0.5, found.mask.sum((1, 2))
    top, left = (((found.mask.sum(axis) * pixels).sum(1) / area).long() for axis in (2, 1))
    across = torch.arange(2 * half)
    rows, columns = top[:, None, None] + across[:, None], left[:, None, None] + across
    padded = F.pad(difference, (half,) * 4).permute(0, 2, 3, 1)
    seen = padded[found.image[:, None, None], rows, columns].permute(0, 3, 1, 2)
    mask, other = (F.pad(m, (half,) * 4)[torch.arange(n)[:, None, None], rows, columns] for m in found[2:4])
    fit = _search(seen, mask.float(), (~other).float())
    return fit._replace(x=fit.x + left - half, y=fit.y + top - half)


def _search(
    difference: Float[Tensor, "N 3 W W"], mask: Float[Tensor, "N W W"], free: Float[Tensor, "N W W"]
) -> _Fit:
    """Fits all shapes to each object, starting from its area and centroid, and takes what explains most
    of it.
    """
    n, size, kinds = len(mask), mask.shape[-1], len(SHAPES)
    pixels = torch.arange(size) + 0.5
    area = mask.sum((1, 2))
    paint = (difference * mask[:, None]).sum((2, 3)) / area[:, None]
    # The object's coverage of each pixel, as far as it can be seen along its mean colour.
    seen = torch.einsum("nchw,nc->nhw", difference, paint / paint.square().sum(1, keepdim=True))
    seen, weight = seen.repeat_interleave(kinds, 0), free.repeat_interleave(kinds, 0)
    shape = torch.arange(kinds).repeat(n)
    radius = (area[:, None] / _AREA).sqrt().flatten()
    x = ((mask.sum(1) * pixels).sum(1) / area).repeat_interleave(kinds)
    y = ((mask.sum(2) * pixels).sum(1) / area).repeat_interleave(kinds) - _DROP.repeat(n) * radius
    for _ in range(_STEPS):
        x, y, radius = _improve(seen, weight, shape, x, y, radius)

    covered = coverage(shape, x / size, y / size, radius / size, size)
    covered = covered.view(n, kinds, size, size) * free[:, None]
    energy = covered.square().sum((2, 3))
    paint = torch.einsum("nkhw,nchw->nkc", covered, difference) / energy.clamp(1e-3)[:, :, None]
    # What each shape explains of the squared difference from the background.
    explained, order = (paint.square().sum(2) * energy).topk(2)
    pick = torch.arange(n) * kinds + order[:, 0]
    paint, radius = paint.flatten(0, 1)[pick], radius[pick]
    lead = (explained[:, 0] - explained[:, 1]) / paint.square().sum(1) / radius.square()
    return _Fit(order[:, 0], x[pick], y[pick], radius, paint, lead)


def _improve(
    seen: Float[Tensor, "M W W"],
    weight: Float[Tensor, "M W W"],
    shape: Int[Tensor, "M"],
    x: Float[Tensor, "M"],
    y: Float[Tensor, "M"],
    radius: Float[Tensor, "M"],
) -> tuple[Tensor, ...]:
    """One step of Gauss-Newton in x, y and radius, for seen ~ gain * coverage by a shape at (x, y)."""
    size = seen.shape[-1]
    pixels = torch.arange(size) + 0.5
    covered = coverage(shape, x / size, y / size, radius / size, size)
    down, across = torch.gradient(covered, dim=(1, 2))
    right, below = (pixels - x[:, None])[:, None, :], (pixels - y[:, None])[:, :, None]
    grow = (across * right + down * below) / radius[:, None, None]
    # seen ~ gain * (covered - across dx - down dy - grow dr), linear in gain and gain * (dx, dy, dr)
    basis = (torch.stack((covered, -across, -down, -grow), 1) * weight[:, None]).flatten(2)
    normal = basis @ basis.mT + 1e-3 * torch.eye(4)
    gain, *steps = torch.linalg.solve(normal, basis @ seen.flatten(1)[:, :, None])[:, :, 0].unbind(1)
    dx, dy, dr = ((step / gain.clamp(0.2)).clamp(-1, 1) for step in steps)
    return (x + dx).clamp(0, size), (y + dy).clamp(0, size), (radius + dr).clamp(1, size / 2)


def _sound(difference: Float[Tensor, "B 3 S S"], found: _Objects, fit: _Fit) -> Bool[Tensor, "B"]:
    """Whether the fits explain the pictures: three bounds, each on what the others let pass.

    - Misfit: squared difference of an object and its surroundings from its fit; in units of the squared
      contrast, radius and outline, so that soft edges weigh alike in all shapes.
    - Lead: the second best shape must leave clearly more unexplained; in a mean of two shapes it does not.
    - Patch: mean difference over squares of a sixth of the side, away from the objects; faint or small
      further ones.
    """
    size, scale = difference.shape[-1], fit.paint.square().sum(1) * fit.radius.square()
    covered = coverage(fit.shape, fit.x / size, fit.y / size, fit.radius / size, size)
    rest = difference.index_add(0, found.image, -covered[:, None] * fit.paint[:, :, None, None])
    pixels = torch.arange(size) + 0.5
    away = (pixels - fit.x[:, None])[:, None, :].square() + (pixels - fit.y[:, None])[:, :, None].square()
    # A box's corners are 1.41 radii away.
    near = (away < (1.5 * fit.radius + 1).square()[:, None, None]) & ~found.other
    flaw = rest.square().sum(1)
    flaw = flaw * (flaw > _NEGLIGIBLE**2)
    misfit = (flaw[found.image] * near).sum((1, 2)) / scale
    good = (misfit < _MISFIT * _OUTLINE[fit.shape]) & (fit.lead > _LEAD + _LEAD_PER_MISFIT * misfit)

    taken = torch.zeros(len(rest), size, size).index_add(0, found.image, near.float())
    window = 2 * (size // 16) + 1
    patch = F.avg_pool2d(rest * (taken == 0)[:, None], window, 1).square().sum(1).amax((1, 2)).sqrt()
    return (patch < _PATCH).index_put((found.image[~good],), torch.tensor(False))


def _apart(a: Float[Tensor, "n 3"], b: Float[Tensor, "m 3"]) -> Float[Tensor, "n m"]:
    """Distances, each of its own pair alone: by squares and products they would depend on the batch."""
    return (a[:, None] - b).square().sum(2).sqrt()


def _table(found: _Objects, values: Shaped[Tensor, "N"], empty: int | float) -> Shaped[Tensor, "B 2"]:
    """Values of objects, sorted into the pictures that they are in."""
    table = torch.full((len(found.crowded), 2), empty, dtype=values.dtype)
    table[found.image, found.slot] = values
    return table


class Judge:
    """Reads pictures of the data set `shapes`, and scores what captions say about them."""

    def read(self, images: Float[Tensor, "B 3 H W"]) -> Reading:
        """What the pictures (B, 3, S, S) in [-1, 1] show, S >= 16; on the CPU."""
        height, width = images.shape[-2:]
        if height != width or width < 16:
            raise UserError(f"the judge needs square pictures of at least 16 pixels, not {height} by {width}")
        parts = [self._read(part) for part in images.detach().float().cpu().split(64)]
        columns = zip(*(vars(part.scenes).values() for part in parts), strict=True)
        return Reading(Scenes(*map(torch.cat, columns)), torch.cat([part.sound for part in parts]))

    def _read(self, images: Float[Tensor, "B 3 S S"]) -> Reading:
        if images.shape[-1] > _SIDE:
            shrink = _shrink(images.shape[-1], _SIDE)
            images = shrink @ images @ shrink.mT
        size = images.shape[-1]
        border = torch.cat((images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]), 2)
        background = border.median(2).values
        difference = images - background[:, :, None, None]
        found = _find(difference, background)
        fit = _fit(difference, found)

        grounds, palette = torch.tensor(list(BACKGROUNDS.values())), torch.tensor(list(COLOURS.values()))
        sizes = torch.tensor(list(SIZES.values())) * size
        ground_error, ground = _apart(background, grounds).min(1)
        colour_error, colour = _apart(background[found.image] + fit.paint, palette).min(1)
        size_error, kind = (fit.radius[:, None] / sizes).log().abs().min(1)

        bad = _table(found, (colour_error > _COLOUR_ERROR) | (size_error > _SIZE_ERROR), False).any(1)
        scenes = Scenes(
            background=ground,
            colour=_table(found, colour, -1),
            shape=_table(found, fit.shape, -1),
            size=_table(found, kind, -1),
            x=_table(found, fit.x / size, 0),
            y=_table(found, fit.y / size, 0),
        )
        sound = _sound(difference, found, fit) & ~bad & ~found.crowded
        return Reading(scenes, sound & (ground_error < _COLOUR_ERROR) & (scenes.count > 0))

    def __call__(
        self, images: Float[Tensor, "B 3 H W"], captions: Sequence[str]
    ) -> dict[str, Float[Tensor, "B"]]:
        """Scores 1 (right) or 0 (wrong), each (B,), nan where a caption says nothing about an attribute.

        Keys: ATTRIBUTES; `count`, the number of objects; `sound`, see `Reading`; `all`: everything above is
        right. Where the number of objects is wrong, so is whatever the caption says about them. Where two
        objects are spoken of, they are the picture's two in the order that fits best.

        Raises UserError for captions that are not of the grammar of `scenes`.
        """
        if len(captions) != len(images):
            raise UserError(
                f"the judge needs a caption for each of {len(images)} pictures, got {len(captions)}"
            )
        return self.score(self.read(images), captions)

    def score(self, reading: Reading, captions: Sequence[str]) -> dict[str, Float[Tensor, "B"]]:
        """As `__call__`, of pictures that were read before."""
        claims = [parse(caption) for caption in captions]
        marks = [compare(claim, shown) for claim, shown in zip(claims, tell(reading.scenes), strict=True)]
        worth = {None: torch.nan, False: 0.0, True: 1.0}
        scores = {key: torch.tensor([worth[mark[key]] for mark in marks]) for key in (*ATTRIBUTES, "count")}
        scores["sound"] = reading.sound.float()
        scores["all"] = torch.stack([score.nan_to_num(1.0) for score in scores.values()]).amin(0)
        return scores

    def residual(
        self, images: Float[Tensor, "B 3 H W"], reading: Reading | None = None
    ) -> Float[Tensor, "B"]:
        """Root mean square difference (0 to 2) of each picture from the data set's own drawing of what it
        shows: places are the picture's, colours, shapes and sizes the nearest there are. About 0.01 of real
        drawings; gray, blur, texture and ragged edges raise it.
        """
        scenes = (reading or self.read(images)).scenes
        parts = zip(images.detach().float().cpu().split(64), torch.arange(len(images)).split(64), strict=True)
        squares = [(part - draw(scenes[rows], part.shape[-1])).square() for part, rows in parts]
        return torch.cat([square.mean((1, 2, 3)).sqrt() for square in squares])


def compare(claim: Claim, shown: Claim) -> dict[str, bool | None]:
    """Which of the things a caption claims are shown; None where it claims nothing."""
    marks = [_agreement(claim, order) for order in _orders(shown)]
    return max(marks, key=lambda mark: sum(value is True for value in mark.values()))


def _orders(claim: Claim) -> list[Claim]:
    """The same, seen from either object."""
    if len(claim.things) < 2:
        return [claim]
    relation = None if claim.relation is None else claim.relation ^ 1
    return [claim, Claim(claim.things[::-1], relation, background=claim.background)]


def _agree(said: Sequence, seen: Sequence) -> bool | None:
    """None where nothing is said; else whether all that is said is seen."""
    if all(value is None for value in said):
        return None
    return len(said) == len(seen) and all(a is None or a == b for a, b in zip(said, seen, strict=True))


def _agreement(claim: Claim, shown: Claim) -> dict[str, bool | None]:
    marks = {
        key: _agree([getattr(a, key) for a in claim.things], [getattr(b, key) for b in shown.things])
        for key in ("colour", "shape", "size")
    }
    marks["position"] = _agree((claim.row, claim.column), (shown.row, shown.column))
    marks["relation"] = _agree((claim.relation,), (shown.relation,))
    marks["background"] = _agree((claim.background,), (shown.background,))
    return {**marks, "count": len(claim.things) == len(shown.things)}
