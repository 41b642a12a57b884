"""The embedded data set `shapes`: endless captioned scenes, no download, drawn as they are needed.

Item i of a split is a pure function of (seed, split, i): every draw is a hash of these three and of its own
number, so items need no order, no state and no files. Eight colour-shape pairs (HELD_OUT) never occur in
train, so that composition of the known into the unseen can be measured: half of the scenes of val hold one of
four of them, half of those of test one of the other four. Choose on val, report on test.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dalle.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    THIRDS,
    Claim,
    Scenes,
    Thing,
    draw,
    parse,
    say,
    tell,
)
from dalle.errors import UserError
from dalle.ranges import Fraction, PositiveInt, Seed, Side

# Part of the fingerprint: raise it whenever the same item may look or read differently than before.
FORMAT = 1

# Colour k is never seen with shape 5k+2 (mod 6): each colour misses one shape, each shape one or two colours.
HELD_OUT = frozenset((colour, (5 * colour + 2) % len(SHAPES)) for colour in range(len(COLOURS)))
_PAIRS = [(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES))]
_SEEN = torch.tensor([pair for pair in _PAIRS if pair not in HELD_OUT])
# By colour, so that either split has four colours and four shapes.
UNSEEN = {"train": [], "val": sorted(HELD_OUT)[:4], "test": sorted(HELD_OUT)[4:]}

_SPLIT_SIZES = {"train": 1_000_000, "val": 2_000, "test": 10_000}
_EDGE, _GAP = 0.02, 0.07  # free space around objects, and between two of them; 1 = the picture's side
_STEEP = 0.4  # most offset of two objects across their relation's axis, as a share of their distance along it
_CLEAR = 0.035  # a single object keeps this far away from the lines between thirds


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; that of int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _uniforms(stream: str, items: Tensor, n: int) -> Float64[Tensor, "B n"]:
    """n numbers in [0, 1) for each item: splitmix64 (Steele et al. 2014) of a counter, keyed by the
    stream's name.
    """
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little", signed=True)
    z = items[:, None] * n + torch.arange(1, n + 1)
    z = z * -0x61C8864680B583EB + key  # 0x9E3779B97F4A7C15, as a signed number
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return _shifted(z ^ _shifted(z, 31), 11).double() * 2.0**-53


def _between(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return low + u * (high - low)


def _pairs(u: Tensor, count: Tensor, unseen: Tensor, held_out: Sequence[tuple[int, int]]) -> Tensor:
    """(B, 2, 2): (colour, shape) of two objects that differ in at least one of the two, one of them held out
    where `unseen`; u (B, 4).
    """
    first = (u[:, 0] * len(_SEEN)).long()
    second = (first + 1 + (u[:, 1] * (len(_SEEN) - 1)).long()) % len(_SEEN)
    pairs = torch.stack((_SEEN[first], _SEEN[second]), 1)
    if not held_out:
        return pairs
    novel = torch.tensor(held_out)[(u[:, 2] * len(held_out)).long()]
    slot = (u[:, 3] * count).long()[:, None] == torch.arange(2)  # which of the objects is the unseen one
    return torch.where((slot & unseen[:, None])[:, :, None], novel[:, None], pairs)


def _alone(u: Tensor, radius: Tensor) -> Tensor:
    """One coordinate of a single object: clearly in one third, each as likely; u (B, 2)."""
    third = (u[:, 0] * 3).long()
    low = torch.where(third == 0, radius + _EDGE, torch.tensor([0.0, *THIRDS])[third] + _CLEAR)
    high = torch.where(third == 2, 1 - radius - _EDGE, torch.tensor([*THIRDS, 1.0])[third] - _CLEAR)
    return _between(u[:, 1], low, high)


def _together(u: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (B, 2) of two objects along the axis of their relation, the first one first, and across."""
    low, high = radius + _EDGE, 1 - radius - _EDGE
    apart = _between(u[:, 0], radius.sum(1) + _GAP, high[:, 1] - low[:, 0])
    start = _between(u[:, 1], low[:, 0], high[:, 1] - apart)
    across = _between(u[:, 2], low[:, 0], high[:, 0])
    other = _between(
        u[:, 3],
        torch.maximum(low[:, 1], across - _STEEP * apart),
        torch.minimum(high[:, 1], across + _STEEP * apart),
    )
    return torch.stack((start, start + apart), 1), torch.stack((across, other), 1)


def _compose(
    stream: str, items: Tensor, two: float, unseen: float, held_out: Sequence[tuple[int, int]]
) -> Scenes:
    """Scenes of the items: two objects with probability `two`, one of the pairs `held_out` with probability
    `unseen`.
    """
    u = _uniforms(stream, items, 20)
    both = u[:, 0] < two
    pairs = _pairs(u[:, 1:5], 1 + both, u[:, 5] < unseen, held_out)
    size = (u[:, 6:8] * len(SIZES)).long()
    radius = torch.tensor(list(SIZES.values()), dtype=u.dtype)[size]

    along, across = _together(u[:, 8:12], radius)
    flip, turn = u[:, 12, None] < 0.5, u[:, 13, None] < 0.5
    along = torch.where(flip, 1 - along, along)
    x, y = torch.where(turn, across, along), torch.where(turn, along, across)
    alone = torch.stack((_alone(u[:, 14:16], radius[:, 0]), _alone(u[:, 16:18], radius[:, 0])), 1)
    there = torch.stack((torch.ones_like(both), both), 1)
    return Scenes(
        background=(u[:, 18] * len(BACKGROUNDS)).long(),
        colour=pairs[:, :, 0].where(there, -1),
        shape=pairs[:, :, 1].where(there, -1),
        size=size.where(there, -1),
        x=torch.where(both[:, None], x, alone[:, :1]).where(there, 0).float(),
        y=torch.where(both[:, None], y, alone[:, 1:]).where(there, 0).float(),
    )


class _Chance:
    """Hands out the draws of one item, in order."""

    def __init__(self, draws: list[float]):
        self.draws = iter(draws)

    def __call__(self, probability: float) -> bool:
        return next(self.draws) < probability

    def choose(self, words: Sequence[str]) -> str:
        """The usual word, the first, half of the time; else any."""
        u = next(self.draws)
        return words[0] if u < 0.5 else words[int((2 * u - 1) * len(words))]


def _less(claim: Claim, chance: _Chance, complete: bool) -> Claim:
    """The claim with some of it left unsaid; `complete`: neither colours, shapes nor the relation."""
    first, second = claim.things[0], claim.things[-1]
    two = len(claim.things) == 2
    # What is left unsaid must not make the two objects of a scene sound the same.
    same_shape, same_colour = two and first.shape == second.shape, two and first.colour == second.colour
    hush_colour = chance(0.1) and not (complete or same_shape)
    hush_shape = chance(0.05) and not (complete or same_colour or hush_colour)
    hush_size, hush_place, hush_background = chance(0.4), chance(0.5), chance(0.5)
    hush_relation = chance(0.15) and not complete
    around = chance(0.5)  # the same, seen from the other object: left <-> right, above <-> below

    things = [
        Thing(
            None if hush_colour else thing.colour,
            None if hush_shape else thing.shape,
            None if hush_size else thing.size,
        )
        for thing in claim.things
    ]
    relation = None if claim.relation is None or hush_relation else claim.relation ^ (around and two)
    row, column = claim.row, claim.column
    if hush_place:
        row, column = None, None
    elif not row == column == 1:  # nobody says "in the middle left"
        row, column = None if row == 1 else row, None if column == 1 else column
    background = None if hush_background else claim.background
    return Claim(tuple(things[::-1] if around else things), relation, row, column, background)


def _captions(stream: str, items: Tensor, scenes: Scenes, complete: bool) -> list[str]:
    """A true caption for each scene."""
    chances = [_Chance(draws) for draws in _uniforms(stream, items, 20).tolist()]
    pairs = zip(tell(scenes), chances, strict=True)
    return [say(_less(claim, chance, complete), chance.choose) for claim, chance in pairs]


def names_unseen(captions: Sequence[str]) -> Bool[Tensor, "B"]:
    """Which captions name both the colour and the shape of a pair that training never shows.

    A scene may hold one and its caption leave the colour or the shape unsaid: a picture can then be right
    without it, so that caption is counted as seen.

    Raises UserError for captions that are not of the grammar of `scenes`.
    """
    named = [{(thing.colour, thing.shape) for thing in parse(caption).things} for caption in captions]
    return torch.tensor([not HELD_OUT.isdisjoint(pairs) for pairs in named], dtype=torch.bool)


class Shapes:
    """The source `shapes`: captioned scenes of one or two objects, made on demand (a `Source`).

    Args:
        split: "train", "val" or "test"; half of the scenes of "val" and of "test" hold a colour-shape pair
            that "train" never has, see UNSEEN.
        image_size: side of the pictures in pixels, 16 to 1024.
        size: number of items; None: 1,000,000 for train, 2,000 for val, 10,000 for test.
        seed: another seed, other scenes.
        two_objects: share of scenes with two objects.
    """

    fixed = True

    def __init__(
        self,
        split: str,
        image_size: Side = 32,
        size: PositiveInt | None = None,
        seed: Seed = 0,
        two_objects: Fraction = 0.5,
    ):
        if split not in _SPLIT_SIZES:
            raise UserError(f"shapes has no split {split!r}; it has {', '.join(_SPLIT_SIZES)}")
        if not 16 <= image_size <= 1024:
            raise UserError(f"shapes are drawn at 16 to 1024 pixels, not {image_size}; change image_size")
        if size is not None and size < 1:
            raise UserError(f"shapes needs a size of at least 1 item, not {size}")
        if not 0 <= two_objects <= 1:
            raise UserError(f"two_objects is a share from 0 to 1, not {two_objects}")
        self.split, self.image_size, self.seed, self.two_objects = split, image_size, seed, two_objects
        self.size = _SPLIT_SIZES[split] if size is None else size
        self._stream = f"shapes {seed} {split}"

    def __len__(self) -> int:
        return self.size

    def scenes(self, items: Sequence[int]) -> Scenes:
        """What is in the pictures of these items."""
        indices, held_out = self._indices(items), UNSEEN[self.split]
        return _compose(self._stream, indices, self.two_objects, 0.5, held_out)

    def images(self, items: Sequence[int], epoch: int = 0) -> Float[Tensor, "B 3 S S"]:
        """Pictures (B, 3, S, S), float32 in [-1, 1]; the same in every epoch."""
        return draw(self.scenes(items), self.image_size)

    def captions(self, item: int) -> list[str]:
        """The one caption of an item."""
        return self.captions_of([item])

    def captions_of(self, items: Sequence[int]) -> list[str]:
        """One caption for each item; for a whole batch far quicker than `captions` one by one."""
        return _captions(f"{self._stream} words", self._indices(items), self.scenes(items), complete=False)

    def unseen(self, items: Sequence[int]) -> Bool[Tensor, "B"]:
        """Whether an item's caption names a colour-shape pair that never occurs in train."""
        return names_unseen(self.captions_of(items))

    def fingerprint(self) -> str:
        """Hash of everything that pictures and captions depend on."""
        facts = (FORMAT, self._stream, self.image_size, self.size, self.two_objects, *UNSEEN[self.split])
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _indices(self, items: Sequence[int]) -> Tensor:
        indices = torch.as_tensor(items, dtype=torch.int64).reshape(-1)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.size:
            raise IndexError(f"items of this split are 0 to {self.size - 1}")
        return indices


def prompts(kind: str, seen: bool, n: int, seed: int = 0, split: str = "test") -> tuple[list[str], Scenes]:
    """n captions for evaluation, and the scenes they were made for (`scenes.draw` gives reference pictures).

    Args:
        kind: "one" for scenes of one object, "two" for scenes of two.
        seen: whether all colour-shape pairs occur in train; else each scene has one that never does.
        split: "test", or "val" to choose by: it has other prompts and other unseen pairs.

    Colours, shapes and the relation are always said; size, place and background now and then.
    """
    if kind not in ("one", "two"):
        raise UserError(f"there are prompts of one or two objects, not {kind!r}")
    if split not in ("val", "test"):
        raise UserError(f"there are prompts of val and test, not of {split!r}")
    stream, items = f"prompts {seed} {kind} {seen}" + " val" * (split == "val"), torch.arange(n)
    scenes = _compose(stream, items, float(kind == "two"), float(not seen), UNSEEN[split])
    return _captions(f"{stream} words", items, scenes, complete=True), scenes


def unrelated(n: int, seed: int = 0) -> Scenes:
    """n scenes of one or two objects, all 48 pairs as likely: what somebody draws who reads no caption."""
    stream, items = f"unrelated {seed}", torch.arange(n)
    return _compose(stream, items, 0.5, len(HELD_OUT) / len(_PAIRS), sorted(HELD_OUT))
