"""Text as it lies in people's files: byte order marks, odd line ends, broken letters, unprintable names."""

import re
import unicodedata
from pathlib import Path
from typing import Protocol, runtime_checkable

from dalle.reading import check_file

UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of what Windows calls Unicode
NO_TEXT = "with a caption that is not UTF-8 text, as it has to be saved"
UNSEEN = "\u200b\u2060\ufeff"  # white space that Python does not take for such


@runtime_checkable
class Readable(Protocol):
    """A path, or what is read like one."""

    def read_bytes(self) -> bytes: ...


def read_text(path: str | Readable) -> str:
    """UTF-8, or UTF-16 that says so or is plainly such; without its byte order mark.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no such text.
    """
    if isinstance(path, str | Path):
        check_file(path)
        content = Path(path).read_bytes()
    else:
        content = path.read_bytes()
    return decoded(content)


def decoded(content: bytes) -> str:
    """The same of the bytes of a file. Raises UnicodeDecodeError."""
    return content.decode("utf-16" if content.startswith(UTF16) else _unmarked(content))


def _unmarked(content: bytes) -> str:
    """Western text in UTF-16 has a NUL in every second byte."""
    if b"\0" not in content[:200]:
        return "utf-8-sig"
    first, second = (content[k:200:2] for k in (0, 1))
    if len(first) > 1 and 2 * second.count(0) > len(second) > 2 * first.count(0):
        return "utf-16-le"
    return (
        "utf-16-be"
        if len(first) > 1 and 2 * first.count(0) > len(first) > 2 * second.count(0)
        else "utf-8-sig"
    )


def lines(text: str) -> list[str]:
    r"""The lines of a text that ends them by \n, \r\n or, everywhere, \r; no other character ends a line."""
    return re.split(r"\r?\n", text) if "\n" in text else text.split("\r")


def tidy(text: str) -> str:
    """Without white space around it and without NULs; halves of a pair of surrogates, which no UTF-8 can
    hold, are U+FFFD.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "").strip()
    while text and (text[0] in UNSEEN or text[-1] in UNSEEN):
        text = text.strip(UNSEEN).strip()
    return text


def encoded(name: str) -> bytes:
    """The bytes of a file's name, whatever they are."""
    return name.encode("utf-8", "surrogateescape")


def shown(name: str) -> str:
    r"""A file's name for a message: what cannot be printed, or would steer a terminal, as \x1b."""
    return "".join(
        letter if unicodedata.category(letter)[0] != "C" else ascii(letter)[1:-1] for letter in name
    )
