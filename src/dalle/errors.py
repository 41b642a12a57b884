"""The one exception that means "the user can fix this": entry points print it as one line and exit with 1."""

import argparse
import difflib
import unicodedata
from collections.abc import Collection
from typing import NoReturn


class UserError(Exception):
    """Says in one line what is wrong and what to do about it."""


class Words(argparse.ArgumentParser):
    """A parser to which a mistake is one line as well."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says more")


def printable(text: str) -> str:
    """The text without anything that would steer a terminal: names of files may hold escape sequences, marks
    that turn the direction of writing, or bytes that are no text. New lines and joined letters stay.
    """
    return "".join(letter if _shows(letter) else ascii(letter)[1:-1] for letter in text)


def _shows(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\u200c\u200d" or unicodedata.category(letter) == "Zs"


def instead(wrong: str, choices: Collection[str], prefix: str, meant: Collection[str] = ()) -> str:
    """The rest of a sentence that says what is not there: what was `meant`, or might have been."""
    if near := meant or nearest(wrong, choices):
        return f"; did you mean {' or '.join(prefix + name for name in near)}?"
    return f"; there are {', '.join(sorted(choices))}" if choices else ""


def reason(error: Exception) -> str:
    """What a library says went wrong, in one short line; a bare number or name has the error's kind before
    it, and PyTorch's advice to load without safety is left out.
    """
    said = " ".join(str(error).split())
    if said.startswith("Weights only load failed"):
        return "it is no file of tensors"
    if isinstance(error, LookupError) or not said:
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= 160 else f"{said[:150]} ..."


def nearest(wrong: str, choices: Collection[str]) -> list[str]:
    """The right spelling of a wrong one, or several where they are equally near."""
    likeness = {name: difflib.SequenceMatcher(None, name, wrong).ratio() for name in choices}
    best = max(likeness.values(), default=0.0)
    return sorted(name for name in choices if likeness[name] == best) if best >= 0.6 else []
