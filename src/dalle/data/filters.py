"""Which pictures of a set are used: by their size, their captions, and what columns beside them say.

img2dataset and LAION keep similarities of CLIP and scores of unwanted content beside each picture, as columns
of a table or in the json of a sample (`similarity`, `punsafe`, `pwatermark`, `original_width` ...). A picture
of which a column says nothing, or no number, is not used.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

from annotated_types import Ge

from dalle.data.caption_tables import plain
from dalle.data.text import shown
from dalle.errors import UserError
from dalle.ranges import Number, PositiveInt, Side, Text

SCRIPTS = (
    "latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "bengali", "tamil", "thai", "hangul",
    "hiragana", "katakana", "cjk", "georgian", "armenian", "ethiopic",
)  # fmt: skip
WORDS = {"unlikely": 0.0, "unsure": 0.5, "nsfw": 1.0, "false": 0.0, "true": 1.0}  # LAION-400M's column NSFW

Values = Mapping[str, Any]  # what columns say of one picture


@dataclass(frozen=True)
class Filters:
    """What a picture and its captions must be like; null: anything.

    Args:
        min_side: pixels of the shorter side.
        max_aspect: longest side over shortest, at most.
        min_caption, max_caption: letters of a caption; others are left out, and pictures without any left.
        script: of most letters of a caption, one or several (`latin`, `cyrillic`, `cjk` ...); where there are
            no letters it may be any.
        at_least, at_most: numbers by the name of their column, whatever its case: `{similarity: 0.28}`,
            `{punsafe: 0.1, pwatermark: 0.5}`.

    Raises:
        UserError: bounds that leave nothing, or a script that is not known.
    """

    min_side: Side | None = None
    max_aspect: Annotated[Number, Ge(1)] | None = None
    min_caption: PositiveInt | None = None
    max_caption: PositiveInt | None = None
    script: Text | Sequence[Text] | None = None
    at_least: Mapping[str, Number] | None = None
    at_most: Mapping[str, Number] | None = None

    def __post_init__(self) -> None:
        scripts = (self.script,) if isinstance(self.script, str) else tuple(self.script or ())
        if odd := [name for name in scripts if name.casefold() not in SCRIPTS]:
            raise UserError(
                f"data.filters.script={shown(odd[0])} is not known; there are {', '.join(SCRIPTS)}"
            )
        object.__setattr__(self, "script", tuple(name.casefold() for name in scripts))
        for name in ("at_least", "at_most"):
            bounds = getattr(self, name) or {}
            for column, bound in bounds.items():
                if isinstance(bound, bool | str) or number_of(bound) is None:
                    raise UserError(f"data.filters.{name}.{column} must be a number, got {bound}")
            object.__setattr__(self, name, Bounds(bounds))
        for column, low in self.lowest.items():
            if low > (high := self.highest.get(column, math.inf)):
                raise UserError(
                    f"data.filters.at_least.{column}={low} and at_most.{column}={high} leave nothing"
                )
        if (self.min_caption or 0) > (self.max_caption or math.inf):
            raise UserError(
                f"data.filters.min_caption={self.min_caption} and max_caption={self.max_caption} leave "
                "nothing"
            )

    def __bool__(self) -> bool:
        """Whether anything can be left out."""
        return any(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def lowest(self) -> Mapping[str, Number]:
        return self.at_least or {}

    @property
    def highest(self) -> Mapping[str, Number]:
        return self.at_most or {}

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are asked for."""
        return tuple(dict.fromkeys([*self.lowest, *self.highest]))

    @property
    def sizes(self) -> bool:
        """Whether the size of a picture is asked for."""
        return self.min_side is not None or self.max_aspect is not None

    def captions(self, some: Iterable[str]) -> tuple[list[str], str]:
        """Those of a picture's captions that can be used; where there are none, why."""
        left = list(some)
        for why, fits in self._of_captions():
            rest = [text for text in left if fits(text)]
            if left and not rest:
                return [], why
            left = rest
        return left, ""

    def _of_captions(self) -> Iterator[tuple[str, Callable[[str], bool]]]:
        low, high = self.min_caption, self.max_caption
        if low is not None:
            yield f"with a caption of fewer than {low} letters (min_caption)", lambda text: len(text) >= low
        if high is not None:
            yield f"with a caption of more than {high} letters (max_caption)", lambda text: len(text) <= high
        if scripts := self.script:
            why = f"with a caption in another script than {', '.join(scripts)} (script)"
            yield why, lambda text: script_of(text) in ("", *scripts)

    def size(self, width: int, height: int) -> str:
        """Why a picture of this size is not used; empty where it is."""
        short, long = sorted((width, height))
        if self.min_side is not None and short < self.min_side:
            return f"smaller than {self.min_side} px (min_side)"
        if self.max_aspect is not None and long > self.max_aspect * short:
            return f"longer than {self.max_aspect:g} times their short side (max_aspect)"
        return ""

    def values(self, found: Values) -> str:
        """Why a picture of which columns say this is not used; empty where it is."""
        for column in self.columns:
            value = number_of(found.get(column))
            if value is None:
                return f"without a number in the column {shown(column)}"
            if value < (low := self.lowest.get(column, -math.inf)):
                return f"with {shown(column)} below {low:g} (at_least)"
            if value > (high := self.highest.get(column, math.inf)):
                return f"with {shown(column)} above {high:g} (at_most)"
        return ""

    def check(self, known: Iterable[str], there: Iterable[str], place: str) -> None:
        """Raises UserError where a column that is asked for is none of the `known`; `there`: all names."""
        found = set(map(plain, known))
        if missing := [column for column in self.columns if plain(column) not in found]:
            kind = "at_least" if missing[0] in self.lowest else "at_most"
            names = ", ".join(map(shown, there))[:300]
            raise UserError(
                f"data.filters.{kind} asks for the column {shown(missing[0])}, but {shown(place)} has "
                f"{names or 'no columns of numbers'}"
            )


class Bounds(dict[str, Number]):
    """Numbers by the name of a column; as they never change they have a hash."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # a dict has none
        return hash(tuple(sorted(self.items())))


def number_of(value: Any) -> float | None:
    """A finite number in a cell; None where there is none."""
    if isinstance(value, str):
        text = value.strip()
        if text.casefold() in WORDS:
            return WORDS[text.casefold()]
        try:
            value = float(text)
        except ValueError:
            return None
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def script_of(text: str) -> str:
    """The script of most of a text's letters; empty where it has none."""
    counts: dict[str, int] = {}
    for letter in text:
        if letter.isalpha():
            name = _script(letter)
            counts[name] = counts.get(name, 0) + 1
    return max(counts, key=lambda name: counts[name]) if counts else ""


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    word = unicodedata.name(letter, "").partition(" ")[0].casefold()
    return {"fullwidth": "latin", "halfwidth": "katakana"}.get(word, word)
