"""From a plain nested dict (a resolved config) to objects.

The same grammar as Hydra's ``_target_`` and ``_partial_``, without Hydra: a run directory is loaded by code
that has never heard of config groups. All names in it (`dalle.trust`), and type and range of every argument
(`dalle.ranges`), are checked before anything is built, and mistakes are named by their place in the config.
"""

import inspect
import math
import typing
from collections.abc import Callable
from functools import partial
from typing import Any

from dalle.errors import UserError
from dalle.ranges import Made, check_value
from dalle.trust import Trust, composed


def instantiate(node: Any, where: str = "", trust: Trust = composed, **extra: Any) -> Any:
    """Instantiates `node` and everything inside it; `extra` arguments go to the outermost target only.

    Args:
        node: a dict with ``_target_`` (and ``_partial_: true`` for a partial), or any nesting of dicts and
            lists.
        where: the node's name in the config, for messages.
        trust: which names may stand in it: `trust.composed`, or `trust.listed` for what comes from a file.
    """
    _walk(node, where, trust, extra, dry=True)  # an inner object must not be made for an outer one's mistake
    return _walk(node, where, trust, extra, dry=False)


def check(node: Any, where: str = "", kind: Any = Any, trust: Trust = composed) -> None:
    """Raises what `instantiate` would raise for names and types, but makes nothing.

    ``auto`` may stand anywhere.

    Args:
        kind: what it must be, a class or another type.
    """
    made = _walk(node, where, trust, {}, dry=True)
    check_value(made, kind, where)


def _walk(node: Any, where: str, trust: Trust, extra: dict[str, Any], dry: bool) -> Any:
    if isinstance(node, list):
        return [_walk(item, f"{where}[{i}]", trust, {}, dry) for i, item in enumerate(node)]
    if isinstance(node, float) and not math.isfinite(node):
        raise UserError(f"{where} must be a number, got {node}")
    if not isinstance(node, dict):
        return object() if dry and node == "auto" else node  # an object passes for anything: see `misfit`
    place = f"{where}." if where else ""
    arguments = {
        key: _walk(value, f"{place}{key}", trust, {}, dry)
        for key, value in node.items()
        if key not in ("_target_", "_partial_") and key not in extra
    }
    if "_target_" not in node:
        return arguments
    for key in node:
        if not isinstance(key, str) or (key.startswith("_") and key not in ("_target_", "_partial_")):
            raise UserError(f"{place}{key} is not known here; beside arguments there are _target_, _partial_")
    partly = node.get("_partial_", False)
    if not isinstance(partly, bool):
        raise UserError(f"{place}_partial_ must be true or false, got {partly!r}")
    try:
        target = trust(node["_target_"])
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None
    arguments |= extra
    check_arguments(target, arguments, where, partial_call=partly)
    if dry:
        return Made(partial if partly else _result(target))
    return partial(target, **arguments) if partly else target(**arguments)


def _result(target: Any) -> Any:
    """The class of what a class or a function makes."""
    return target if inspect.isclass(target) else typing.get_type_hints(target).get("return")


def check_arguments(
    target: Callable[..., Any], arguments: dict[str, Any], where: str, partial_call: bool
) -> None:
    """Raises a `UserError` for unknown, missing and wrongly typed arguments, and those out of range."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a function written in C says nothing of its arguments
        return
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function, include_extras=True)
    others = next((name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD), None)
    if others and typing.get_origin(hints.get(others)) is typing.Unpack:  # **options: Unpack[Options]
        hints |= typing.get_type_hints(typing.get_args(hints[others])[0], include_extras=True)
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    place = f"{where}." if where else ""
    for name in arguments:
        if name not in named and not others:
            raise UserError(f"{place}{name} is not an option of {_name(target)}; it takes {', '.join(named)}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    if missing and not partial_call:
        raise UserError(f"{where or _name(target)} needs {', '.join(missing)}")
    for name, value in arguments.items():
        if name in hints:
            check_value(value, hints[name], f"{place}{name}")


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", str(target))
