"""The one exception that means "the user can fix this": entry points print it as one line and exit with 1."""

import unicodedata


class UserError(Exception):
    """Says in one line what is wrong and what to do about it."""


def printable(text: str) -> str:
    """The text without anything that would steer a terminal: names of files may hold escape sequences, marks
    that turn the direction of writing, or bytes that are no text. New lines and joined letters stay.
    """
    return "".join(letter if _shows(letter) else ascii(letter)[1:-1] for letter in text)


def _shows(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\u200c\u200d" or unicodedata.category(letter) == "Zs"
