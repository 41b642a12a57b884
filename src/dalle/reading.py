"""Reading files that anybody may have written: what comes out is plain data of the shape that was asked for.

Whatever else is there (nothing, half of it, something else, no text, a bomb) is one line with its name, and
nothing in it is run. Shapes are those of `dalle.schemas`, checked by pydantic without any conversion.
"""

import errno
import functools
import json
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from dalle.errors import UserError
from dalle.ranges import shown

Shape = TypeVar("Shape")
Facts = dict[str, Any]

LARGEST = 2**26  # bytes
LARGEST_YAML = 2**23  # which is read a hundred times as slowly
DEEPEST = 64
MOST = 2_000_000  # values; a few bytes of YAML can stand for billions
WORDS = {
    "dict_type": "a mapping",
    "list_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}


class PlainLoader(yaml.SafeLoader):
    """Of what `yaml.safe_dump` writes: no merge keys (``<<``), of which a few lines can stand for billions
    before anything that was read could be counted.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise ValueError("merge keys (<<) are not read")


def read_text(path: str | Path, advice: str, largest: int = LARGEST) -> str:
    """A text in UTF-8, with or without a byte order mark.

    Args:
        advice: what to do about a file that cannot be read, as the end of a sentence.
        largest: bytes of such a file at most.
    """
    try:
        check_file(path, largest)
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); {advice}") from None


def check_file(path: str | Path, largest: int | None = None) -> None:
    """Refuses what is no file, before it is opened: a pipe or a device may never end.

    Args:
        largest: bytes of such a file at most.

    Raises:
        OSError: it is none, not there, or too large.
    """
    found = os.stat(path)
    why = ""
    if not stat.S_ISREG(found.st_mode):
        why = "it is a folder" if stat.S_ISDIR(found.st_mode) else "it is no file"
    elif largest is not None and found.st_size > largest:
        why = f"{found.st_size / 2**20:,.0f} MB are more than any such file has"
    if why:
        raise OSError(errno.EINVAL, why, str(path))


def read_json(path: str | Path, shape: type[Shape], advice: str) -> Shape:
    """JSON of a shape; numbers that are none (NaN, infinities: not JSON, but written at times) are null."""
    text = read_text(path, advice)
    try:
        if not text.strip():
            raise ValueError("it is empty")
        content = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); {advice}") from None
    return shaped(content, shape, path, advice)


def read_yaml(path: str | Path, shape: type[Shape], advice: str) -> Shape:
    """YAML of a shape; tags that make objects are refused."""
    text = read_text(path, advice, LARGEST_YAML)
    try:
        content = yaml.load(text, PlainLoader)
    except (ValueError, TypeError, RecursionError, MemoryError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); {advice}") from None
    return shaped(content, shape, path, advice)


def shaped(content: Any, shape: type[Shape], path: str | Path, advice: str) -> Shape:
    """What was read from `path`, if it is plain data of this shape."""
    try:
        _check_plain(content)
        return _adapter(shape).validate_python(content)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({_said(error)}); {advice}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({_reason(error)}); {advice}") from None


def migrated(content: Facts, steps: Sequence[Callable[[Facts], Facts]]) -> Facts | None:
    """What a file of an earlier schema would say today; None where its schema is none that is known.

    Args:
        content: with a `schema`, counted from 1.
        steps: the first makes schema 2 of 1, the next 3 of 2 ...
    """
    found, schema = dict(content), content["schema"]
    if type(schema) is not int or not 1 <= schema <= len(steps) + 1:
        return None
    for step in steps[schema - 1 :]:
        found = step(found)
    return {**found, "schema": len(steps) + 1}


@functools.cache
def _adapter(shape: Any) -> Any:  # beartype knows no TypeAdapter
    return TypeAdapter(shape)


def _check_plain(content: Any) -> None:
    """Text, numbers, lists and dicts with names, and not more of them than there can be."""
    waiting, count = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > DEEPEST or count > MOST:
            raise ValueError("it is nested deeper, or stands for more, than any such file")
        if isinstance(value, dict):
            if odd := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{shown(odd[0])} is no name")
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            value.encode()  # not every text that JSON can write is one
        elif value is not None and not isinstance(value, bool | int | float):
            raise ValueError(f"{shown(value)} is neither text nor a number")


def _finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:190]} ..."


def _said(error: ValidationError) -> str:
    """The first mistake in our words: where, and what."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] in ("missing", "missing_argument"):
        return f"{place} is missing"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place} is not known"
    wanted = WORDS.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return f"{place or 'it'} must be {wanted}, got {shown(first['input'])}"
