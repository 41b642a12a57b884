"""From a plain nested dict (a resolved config) to objects.

The same grammar as Hydra's ``_target_`` and ``_partial_``, without Hydra: a run directory is loaded by code
that has never heard of config groups. Only names of the packages in `TRUSTED` are imported, every argument is
checked against the signature first, and mistakes are named by their place in the config.
"""

import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dalle.errors import UserError

TRUSTED = ("dalle.", "torch.", "lightning.")
LISTS = (list, tuple, Sequence)


def locate(target: str) -> Any:
    """The object called `target` (``package.module.name``)."""
    if not target.startswith(TRUSTED):
        raise UserError(
            f"_target_ {target!r} is not of {', '.join(p[:-1] for p in TRUSTED)}; refusing to import it"
        )
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):  # the longest prefix that is a module; the rest are attributes
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and not target.startswith(error.name):
                raise UserError(
                    f"{target} needs the package {error.name}: pip install {error.name}"
                ) from None
            continue
        try:
            return functools.reduce(getattr, parts[cut:], found)
        except AttributeError:
            break
    raise UserError(f"_target_ {target!r} does not exist")


def build(node: Any, where: str = "", **extra: Any) -> Any:
    """Instantiates `node` and everything inside it; `extra` arguments go to the outermost target only.

    Args:
        node: a dict with ``_target_`` (and ``_partial_: true`` for a partial), or any nesting of dicts and
            lists.
        where: the node's name in the config, for messages.
    """
    return _walk(node, where, extra, dry=False)


def check(node: Any, where: str = "") -> None:
    """Raises what `build` would raise for names and types, but makes nothing; ``auto`` may stand anywhere."""
    _walk(node, where, {}, dry=True)


def _walk(node: Any, where: str, extra: dict[str, Any], dry: bool) -> Any:
    if isinstance(node, list):
        return [_walk(item, f"{where}[{i}]", {}, dry) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return object() if dry and node == "auto" else node  # an object passes for anything: see `fits`
    arguments = {
        key: _walk(value, f"{where}.{key}" if where else key, {}, dry)
        for key, value in node.items()
        if key not in ("_target_", "_partial_") and key not in extra
    }
    if "_target_" not in node:
        return arguments
    target = locate(node["_target_"])
    arguments |= extra
    check_arguments(target, arguments, where, partial_call=bool(node.get("_partial_")))
    if dry:
        return object()
    return partial(target, **arguments) if node.get("_partial_") else target(**arguments)


def check_arguments(
    target: Callable[..., Any], arguments: dict[str, Any], where: str, partial_call: bool
) -> None:
    """Raises a `UserError` for unknown, missing and wrongly typed arguments."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a function written in C says nothing of its arguments
        return
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    place = f"{where}." if where else ""
    for name in arguments:
        if name not in named and not open_ended:
            raise UserError(f"{place}{name} is not an option of {_name(target)}; it takes {', '.join(named)}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    if missing and not partial_call:
        raise UserError(f"{where or _name(target)} needs {', '.join(missing)}")
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in arguments.items():
        if name in hints and not fits(value, hints[name]):
            raise UserError(f"{place}{name} must be {describe(hints[name])}, got {value!r}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a config value may stand where `hint` is asked for; only plain data is looked at."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    plain = value is None or isinstance(value, bool | int | float | str | list | dict)
    if not plain or hint in (Any, object):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in options)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in LISTS or origin in LISTS:  # written as a list in a config
        items = [option for option in options if option is not ...]
        return isinstance(value, list) and all(any(fits(v, i) for i in items or [Any]) for v in value)
    wanted = origin or hint
    return not inspect.isclass(wanted) or isinstance(value, wanted)


def describe(hint: Any) -> str:
    """A type in a user's words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        said = [option for option in options if option is not int or float not in options]
        return " or ".join(map(describe, said))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, options))
    words = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
    }
    if hint in LISTS or origin in LISTS:
        return "a list"
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", str(target))
