"""Scenes of the embedded data set: what a picture shows, how it is drawn, how it is said in words and read.

A scene is one or two objects on a plain background. `draw` renders scenes from signed distance functions,
so at any resolution; `say` and `parse` are the two directions of one small caption grammar. Everything else
about the data set (which scenes occur, and how often) is in `shapes.py`; deciding what a given picture
shows is `metrics/judge.py`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle.errors import UserError

# RGB in [-1, 1]. Any two colours, and any colour and background, are at least 0.95 apart (Euclidean).
COLOURS = {
    "red": (0.8, -1.0, -0.9),
    "green": (-0.8, 0.3, -0.8),
    "blue": (-0.9, -0.5, 0.9),
    "yellow": (1.0, 0.9, -0.9),
    "orange": (1.0, -0.05, -1.0),
    "purple": (0.1, -1.0, 0.6),
    "pink": (1.0, 0.0, 0.5),
    "cyan": (-0.9, 0.7, 0.9),
}
BACKGROUNDS = {"black": (-1.0, -1.0, -1.0), "gray": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 0.14, "large": 0.21}  # half the side of the box that the shape fills, of the picture's
# Object centres of neighbouring columns (rows) are told apart here; `shapes.py` keeps well away from these
# lines.
THIRDS = (0.415, 0.585)

_PIXELS_AT_ONCE = 2**18  # drawn in one go: small enough for the cache, one picture at a time from 512 px on


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes. Absent second objects have -1 in `colour`, `shape` and `size`, and a centre
    of 0.

    `background`, `colour`, `shape`, `size` index BACKGROUNDS, COLOURS, SHAPES, SIZES. `x` runs right and
    `y` runs down, in fractions of the side.
    """

    background: Int[Tensor, "B"]
    colour: Int[Tensor, "B 2"]
    shape: Int[Tensor, "B 2"]
    size: Int[Tensor, "B 2"]
    x: Float[Tensor, "B 2"]
    y: Float[Tensor, "B 2"]

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, items: slice | list[int] | Tensor) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[items] for field in fields(self)))

    @property
    def count(self) -> Int[Tensor, "B"]:
        return (self.shape >= 0).sum(1)

    @property
    def relation(self) -> Int[Tensor, "B"]:
        """Where the first object is, seen from the second: left, right, above or below; -1 where it is alone.

        Along the axis in which the two are further apart.
        """
        dx, dy = self.x[:, 0] - self.x[:, 1], self.y[:, 0] - self.y[:, 1]
        relation = torch.where(dx.abs() >= dy.abs(), (dx > 0).long(), 2 + (dy > 0).long())
        return relation.where(self.count == 2, -1)

    @property
    def column(self) -> Int[Tensor, "B"]:
        """Third of the picture that the first object is in: left, middle or right."""
        return (self.x[:, 0] > THIRDS[0]).long() + (self.x[:, 0] > THIRDS[1]).long()

    @property
    def row(self) -> Int[Tensor, "B"]:
        """Third of the picture that the first object is in: top, middle or bottom."""
        return (self.y[:, 0] > THIRDS[0]).long() + (self.y[:, 0] > THIRDS[1]).long()


# Drawing --------------------


def distance(
    shape: int, x: Float[Tensor, "N 1 W"], y: Float[Tensor, "N H 1"], radius: Float[Tensor, "N 1 1"]
) -> Float[Tensor, "N H W"]:
    """Signed distance from a shape that fills the box of half-side `radius` around 0; negative inside."""
    ax, ay = x.abs(), y.abs()
    match SHAPES[shape]:
        case "circle":
            return (x * x + y * y).sqrt_() - radius
        case "square":
            return torch.maximum(ax, ay) - radius
        case "triangle":  # apex up; the sides have slope 2
            return torch.maximum((2 * ax - y - radius) / 5**0.5, y - radius)
        case "diamond":
            return (ax + ay - radius) / 2**0.5
        case "cross":  # two bars, each a third as wide as it is long
            return torch.maximum(torch.maximum(ax, ay) - radius, torch.minimum(ax, ay) - radius / 3)
        case _:  # ring: half as thick as its radius
            return ((x * x + y * y).sqrt_() - 0.75 * radius).abs_() - 0.25 * radius


def coverage(
    shape: Int[Tensor, "N"],
    x: Float[Tensor, "N"],
    y: Float[Tensor, "N"],
    radius: Float[Tensor, "N"],
    image_size: int,
) -> Float[Tensor, "N S S"]:
    """Share of each pixel that the shape covers, edges one pixel soft; x, y, radius in fractions of the side.

    A negative `shape` covers nothing.
    """
    pixels = torch.arange(image_size, dtype=x.dtype, device=x.device) + 0.5
    across = (pixels - (x * image_size)[:, None])[:, None, :]
    down = (pixels - (y * image_size)[:, None])[:, :, None]
    radius = (radius * image_size)[:, None, None]
    covered = x.new_zeros(len(x), image_size, image_size)
    for kind in range(len(SHAPES)):
        rows = (shape == kind).nonzero().squeeze(1)
        if len(rows):
            inside = distance(kind, across[rows], down[rows], radius[rows])
            covered[rows] = inside.neg_().add_(0.5).clamp_(0, 1)
    return covered


def draw(scenes: Scenes, image_size: int) -> Float[Tensor, "B 3 S S"]:
    """The scenes' pictures, float32 in [-1, 1]. Only exact operations, so a picture never depends on its
    batch.
    """
    palette = torch.tensor(list(COLOURS.values()))
    backgrounds = torch.tensor(list(BACKGROUNDS.values()))
    radii = torch.tensor(list(SIZES.values()))
    images = torch.empty(len(scenes), 3, image_size, image_size)
    step = max(1, _PIXELS_AT_ONCE // image_size**2)
    for start in range(0, len(scenes), step):
        part = scenes[start : start + step]
        background = backgrounds[part.background]
        image = images[start : start + step]
        image[:] = background[:, :, None, None]
        for k in range(2):  # objects never touch: each only adds its difference from the background
            rows = (part.shape[:, k] >= 0).nonzero().squeeze(1)
            one = part[rows]
            place = one.x[:, k].float(), one.y[:, k].float(), radii[one.size[:, k]]
            covered = coverage(one.shape[:, k], *place, image_size)
            paint = palette[one.colour[:, k]] - background[rows]
            image[rows] += covered[:, None] * paint[:, :, None, None]
    return images


# Words --------------------

# The first word of each list is the usual one; `say` lets its caller choose.
NOUNS = (
    ("circle", "disc"),
    ("square",),
    ("triangle",),
    ("diamond", "rhombus"),
    ("cross", "plus"),
    ("ring", "hoop"),
)
COLOUR_WORDS = (
    ("red",),
    ("green",),
    ("blue",),
    ("yellow",),
    ("orange",),
    ("purple", "violet"),
    ("pink",),
    ("cyan", "turquoise"),
)
ANY_NOUN = ("shape", "object")
SIZE_WORDS = (("small", "little"), ("large", "big"))
RELATION_WORDS = (
    ("to the left of", "left of"),
    ("to the right of", "right of"),
    ("above", "over"),
    ("below", "under"),
)
BACKGROUND_WORDS = (("black",), ("gray", "grey"), ("white",))
OPENINGS = ("", "a picture of", "a drawing of", "an image of")
# (row, column) of a single object, None where unsaid.
PLACES: dict[tuple[int | None, int | None], tuple[str, ...]] = {
    (0, None): ("at the top",),
    (2, None): ("at the bottom",),
    (None, 0): ("on the left",),
    (None, 2): ("on the right",),
    (1, 1): ("in the middle", "in the center"),
    (0, 0): ("in the top left", "in the top left corner"),
    (0, 2): ("in the top right", "in the top right corner"),
    (2, 0): ("in the bottom left", "in the bottom left corner"),
    (2, 2): ("in the bottom right", "in the bottom right corner"),
}
GRAMMAR = (
    "[a picture of] a [small|large] [colour] <shape> [at the top|in the top left|...] "
    "[on a <black|gray|white> background], or two objects joined by 'and', 'to the left of', "
    "'to the right of', 'above' or 'below'"
)


class Thing(NamedTuple):
    """What a caption says about one object; None where it says nothing."""

    colour: int | None = None
    shape: int | None = None
    size: int | None = None


class Claim(NamedTuple):
    """What a caption says: one or two things, the relation of the first to the second, place of a single
    thing.
    """

    things: tuple[Thing, ...]
    relation: int | None = None
    row: int | None = None
    column: int | None = None
    background: int | None = None


def tell(scenes: Scenes) -> list[Claim]:
    """Everything there is to say about each scene."""
    scene = scenes.background, scenes.relation, scenes.row, scenes.column
    of_scene = zip(*(t.tolist() for t in scene), strict=True)
    of_things = zip(*(t.tolist() for t in (scenes.colour, scenes.shape, scenes.size)), strict=True)
    claims = []
    for (background, relation, row, column), things in zip(of_scene, of_things, strict=True):
        said = tuple(Thing(*thing) for thing in zip(*things, strict=True) if thing[1] >= 0)
        if len(said) == 2:
            claims.append(Claim(said, relation=relation, background=background))
        else:
            claims.append(Claim(said, row=row, column=column, background=background))
    return claims


def _name(thing: Thing, choose: Callable[[Sequence[str]], str]) -> str:
    words = [] if thing.size is None else [choose(SIZE_WORDS[thing.size])]
    words += [] if thing.colour is None else [choose(COLOUR_WORDS[thing.colour])]
    words += [choose(ANY_NOUN if thing.shape is None else NOUNS[thing.shape])]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def say(claim: Claim, choose: Callable[[Sequence[str]], str]) -> str:
    """The claim as a caption of at most 20 words; `choose` picks among synonyms, the usual one first."""
    parts = [choose(OPENINGS), _name(claim.things[0], choose)]
    if len(claim.things) == 2:
        parts += ["and" if claim.relation is None else choose(RELATION_WORDS[claim.relation])]
        parts += [_name(claim.things[1], choose)]
    if (claim.row, claim.column) != (None, None):
        parts += [choose(PLACES[claim.row, claim.column])]
    if claim.background is not None:
        parts += [f"{choose(('on', 'against'))} a {list(BACKGROUNDS)[claim.background]} background"]
    return " ".join(part for part in parts if part)


def _lookup(*lists: Sequence[str]) -> dict[str, int]:
    return {word: i for i, words in enumerate(lists) for word in words}


def _either(words: Sequence[str] | dict) -> str:
    return "|".join(sorted(words, key=len, reverse=True))  # "in the top left corner" before "in the top left"


_SIZE, _COLOUR, _NOUN = _lookup(*SIZE_WORDS), _lookup(*COLOUR_WORDS), _lookup(*NOUNS)
_RELATION = _lookup(*RELATION_WORDS)
_PLACE = {word: place for place, words in PLACES.items() for word in words}
_BACKGROUND = _lookup(*BACKGROUND_WORDS)
_THING = f"an? (?:({_either(_SIZE)}) )?(?:({_either(_COLOUR)}) )?({_either([*_NOUN, *ANY_NOUN])})"
_CAPTION = re.compile(
    rf"(?:(?:{_either(OPENINGS[1:])}) )?{_THING}"
    rf"(?: ({_either(_PLACE)})| ({_either(_RELATION)}|and) {_THING})?"
    rf"(?: (?:on|against) an? ({_either(_BACKGROUND)}) background)?"
)


def _thing(size: str | None, colour: str | None, noun: str | None) -> Thing:
    return Thing(_COLOUR.get(colour or ""), _NOUN.get(noun or ""), _SIZE.get(size or ""))


def _plain(caption: str) -> str:
    return " ".join(caption.lower().replace(".", " ").split())


def parse(caption: str) -> Claim:
    """What a caption says. Case, full stops and repeated blanks do not matter.

    Raises UserError for a caption that is not of the grammar.
    """
    match = _CAPTION.fullmatch(_plain(caption))
    if match is None:
        raise UserError(f"cannot tell what this caption says about a scene: {caption!r}; expected {GRAMMAR}")
    size, colour, noun, place, relation, size2, colour2, noun2, background = match.groups()
    row, column = _PLACE[place] if place else (None, None)
    things = (_thing(size, colour, noun), _thing(size2, colour2, noun2))
    return Claim(
        things=things if noun2 else things[:1],
        relation=_RELATION.get(relation or ""),
        row=row,
        column=column,
        background=_BACKGROUND.get(background or ""),
    )


# Of the groups of _CAPTION: what they say, and the words for it; places are apart.
_WORDS = (
    (1, "size", SIZE_WORDS), (2, "colour", COLOUR_WORDS), (3, "shape", NOUNS),
    (5, "relation", RELATION_WORDS), (6, "size", SIZE_WORDS), (7, "colour", COLOUR_WORDS),
    (8, "shape", NOUNS),
    (9, "background", BACKGROUND_WORDS),
)  # fmt: skip


def swaps(caption: str) -> dict[str, list[str]]:
    """All captions that say one thing otherwise, which makes them false, by attribute: another colour of one
    object, another place ... Attributes that are not said are left out, and so are shapes called "object".

    Raises UserError for a caption that is not of the grammar.
    """
    parse(caption)
    text = _plain(caption)
    match = _CAPTION.fullmatch(text)
    assert match is not None
    found: dict[str, list[str]] = {}

    def put(group: int, word: str, attribute: str) -> None:
        start, end = match.span(group)
        other = text[:start] + word + text[end:]
        found.setdefault(attribute, []).append(_ARTICLE.sub(_article, other))

    for group, attribute, lists in _WORDS:
        if match[group] in _lookup(*lists):
            for words in lists:
                if match[group] not in words:
                    put(group, words[0], attribute)
    if match[4]:
        own = _PLACE[match[4]]
        for place, words in PLACES.items():
            # false only where both say a row, or a column, and not the same one
            if any(a is not None and b is not None and a != b for a, b in zip(own, place, strict=True)):
                put(4, words[0], "position")
    return found


_ARTICLE = re.compile(r"\ban? (?=(\w))")


def _article(match: re.Match[str]) -> str:
    return "an " if match[1] in "aeiou" else "a "
