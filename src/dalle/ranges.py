"""Which values an argument may have: said where it is declared, as its type; read before anything is built.

    def __init__(self, steps: PositiveInt, dropout: Fraction = 0.0): ...

To Python and to type checkers these are plain ``int`` and ``float``; bounds are those of `annotated_types`.
No number of a configuration is nan or infinite, and whole numbers have 64 bits.
"""

import collections.abc
import inspect
import operator
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Le, Len, Lt, MaxLen, MinLen

from dalle.errors import UserError, instead

Number = float | int

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[Number, Gt(0)]
NonNegative = Annotated[Number, Ge(0)]
Fraction = Annotated[Number, Ge(0), Le(1)]
Share = Annotated[Number, Gt(0), Le(1)]  # as Fraction, but not nothing
Dropout = Annotated[Number, Ge(0), Lt(1)]  # as Fraction, but not all
Decay = Dropout  # of a moving average: 1 would never move
Betas = Annotated[Sequence[Decay], Len(2, 2)]
Seed = Annotated[int, Ge(0), Lt(2**32)]  # what numpy takes
Text = Annotated[str, MinLen(1)]
Place = Text | Path
Places = Annotated[Sequence[Text], MinLen(1)]

# Far beyond what anybody needs, but nothing that would fill a machine or never end
Side = Annotated[int, Ge(1), Le(8192)]  # of a picture, in pixels
Width = Annotated[int, Ge(1), Le(2**20)]  # of a layer
Vocabulary = Annotated[int, Ge(2), Le(2**20)]
Length = Annotated[int, Ge(1), Le(2**16)]  # of a sequence of tokens
Depth = Annotated[int, Ge(1), Le(1000)]  # layers, blocks, levels: what is made one by one
Layers = Annotated[int, Ge(0), Le(1000)]  # those that may be left out
Multipliers = Annotated[Sequence[Depth], Len(1, 16)]  # of widths, one for each feature map
Levels = Sequence[PositiveInt] | Sequence[Sequence[PositiveInt]]  # of finite scalars
Steps = Annotated[int, Ge(1), Le(100_000)]  # of a sampler or a noise schedule
Workers = Annotated[int, Ge(0), Le(1024)]
AutoWorkers = Workers | Literal["auto"]
Rate = Annotated[Number, Gt(0), Le(1000)]  # of learning
Weight = Annotated[Number, Ge(0), Le(1e6)]  # of a term in a loss
Exponent = Annotated[Number, Ge(-50), Le(50)]  # what e is raised to
Guidance = Annotated[Number, Ge(0), Le(1000)]


@dataclass(frozen=True)
class Exists(BaseMetadata):
    """A path at which there is a file."""


File = Annotated[str, Exists()]

LISTS = (list, tuple, Sequence, collections.abc.Iterable)
COMPARE = {Gt: operator.gt, Ge: operator.ge, Lt: operator.lt, Le: operator.le}
LARGEST, WHOLE = sys.float_info.max, 2**63
WORDS: dict[Any, str] = {
    float: "a number", int: "a whole number", bool: "true or false", str: "text", types.NoneType: "null",
    dict: "a group of settings", Mapping: "a group of settings",
}  # fmt: skip


class Misfit(NamedTuple):
    """Where in a value something else was wanted: ``""``, ``[1]``; what; and what is there."""

    place: str
    wanted: str
    got: Any


class Made(NamedTuple):
    """Stands for an object that a configuration describes and that has not been built."""

    kind: Any  # its class; None: not known


def misfit(value: Any, hint: Any) -> Misfit | None:
    """What is wrong with a value where `hint` is asked for; only plain data and `Made` are looked at."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    plain = value is None or isinstance(value, bool | int | float | str | list | dict | Made)
    if not plain or hint in (Any, object):
        return None
    if origin in (typing.Union, types.UnionType):
        found = [misfit(value, option) for option in options]
        deeper = [wrong for wrong in found if wrong and wrong.place]
        if None in found:
            return None
        return deeper[0] if len(deeper) == 1 else Misfit("", describe(hint), value)
    if origin is Annotated:
        if wrong := misfit(value, options[0]):
            return wrong if wrong.place else Misfit("", _said(hint, value), value)
        held = isinstance(value, Made) or all(_holds(bound, value) for bound in _flat(options[1:]))
        return None if held else Misfit("", describe(hint), value)
    if hint in LISTS or origin in LISTS:
        return _list_misfit(value, hint, origin, [option for option in options if option is not ...])
    if origin in (dict, Mapping) and isinstance(value, dict):
        return _group_misfit(value, *options)
    return None if _is(value, hint) else Misfit("", _said(hint, value), value)


def fits(value: Any, hint: Any) -> bool:
    """Whether a config value may stand where `hint` is asked for."""
    return misfit(value, hint) is None


def check_value(value: Any, hint: Any, place: str) -> None:
    """Raises UserError, which names the place, where a config value may not stand for `hint`."""
    if wrong := misfit(value, hint):
        raise UserError(f"{place}{wrong.place} must be {wrong.wanted}, got {shown(wrong.got)}")


def check_values(values: Mapping[str, Any], declared: Any, place: str = "", complete: bool = True) -> None:
    """As `check_value`, of what a TypedDict declares; where it is `complete`, there is nothing else."""
    hints = typing.get_type_hints(declared, include_extras=True)
    for name, value in values.items():
        if name in hints:
            check_value(value, hints[name], f"{place}{name}")
        elif complete:
            raise UserError(f"there is no setting {place}{name}{instead(name, hints, place)}")


def describe(hint: Any) -> str:
    """A type in a user's words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        said = [option for option in options if option is not int or float not in options]
        return " or ".join(dict.fromkeys(map(describe, said)))
    if origin is Annotated:
        bounds = _flat(options[1:])
        return "a file that exists" if Exists() in bounds else f"{describe(options[0])}{_bounds(bounds)}"
    if origin is Literal:
        return "one of " * (len(options) > 1) + ", ".join(map(str, options))
    if origin is tuple and options and ... not in options:
        return f"a list of {len(options)}"
    if hint in LISTS or origin in LISTS:
        return "a list"
    return WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))


def shown(value: Any) -> str:
    """A wrong value, for a message."""
    if isinstance(value, Made):
        return f"an object of {getattr(value.kind, '__name__', value.kind)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-10:]}"


def _list_misfit(value: Any, hint: Any, origin: Any, options: list[Any]) -> Misfit | None:
    """Lists are written as such in a config, whatever sequence is asked for."""
    exact = origin is tuple and ... not in typing.get_args(hint)
    if not isinstance(value, list) or (exact and len(value) != len(options)):
        return Misfit("", describe(hint), value)
    wanted = options if exact else [options[0] if options else Any] * len(value)
    for i, (item, option) in enumerate(zip(value, wanted, strict=True)):
        if wrong := misfit(item, option):
            return wrong._replace(place=f"[{i}]{wrong.place}")
    return None


def _group_misfit(value: dict[Any, Any], name: Any, inner: Any) -> Misfit | None:
    """Settings by names, as ``dict[str, float]`` declares them."""
    for key, item in value.items():
        if wrong := misfit(key, name):
            return Misfit("", f"{WORDS[dict]} whose names are {wrong.wanted}", value)
        if wrong := misfit(item, inner):
            return wrong._replace(place=f".{key}{wrong.place}")
    return None


def _is(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    wanted = typing.get_origin(hint) or hint
    if isinstance(value, Made):
        known = inspect.isclass(value.kind) and inspect.isclass(wanted)
        known = (
            known and wanted is not collections.abc.Callable and not getattr(wanted, "_is_protocol", False)
        )
        return not known or issubclass(value.kind, wanted)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and -WHOLE <= value < WHOLE
    if wanted in (dict, Mapping):
        return isinstance(value, dict)
    return not inspect.isclass(wanted) or isinstance(value, wanted)


def _said(hint: Any, value: Any) -> str:
    huge = isinstance(value, int) and not -WHOLE <= value < WHOLE
    return describe(hint) + (" of 64 bits" if huge else "")


def _flat(constraints: Sequence[Any]) -> list[BaseMetadata]:
    """Single constraints; what is no constraint of ours (a shape of jaxtyping's) is left out."""
    found = []
    for constraint in constraints:
        if isinstance(constraint, GroupedMetadata):
            found += _flat(list(constraint))
        elif isinstance(constraint, BaseMetadata):
            found.append(constraint)
    return found


def _holds(constraint: BaseMetadata, value: Any) -> bool:
    match constraint:
        case Gt() | Ge() | Lt() | Le():
            return COMPARE[type(constraint)](value, _bound(constraint))
        case MinLen(bound):
            return len(value) >= bound
        case MaxLen(bound):
            return len(value) <= bound
        case Exists():
            return Path(value).is_file()
    raise TypeError(f"no such constraint: {constraint}")


def _bound(constraint: Any) -> Any:
    return getattr(constraint, constraint.__match_args__[0])


def _bounds(constraints: Sequence[BaseMetadata]) -> str:
    """`` above 0 and at most 1``."""
    bounds = {type(c): _bound(c) for c in constraints}
    if {Ge, Le} <= bounds.keys():
        return f" from {bounds[Ge]:.10g} to {bounds[Le]:.10g}"
    words = {Gt: "above", Ge: "of at least", Lt: "below", Le: "at most"}
    said = [f"{word} {bounds[kind]:.10g}" for kind, word in words.items() if kind in bounds]
    least, most = bounds.get(MinLen, 0), bounds.get(MaxLen)
    if least == most:
        said.append(f"of {least}")
    elif most is not None:
        said.append(f"of {least} to {most}")
    elif least:
        said.append("that is not empty" if least == 1 else f"of at least {least}")
    return "".join(f" {word}" for word in said[:1]) + "".join(f" and {word}" for word in said[1:])
