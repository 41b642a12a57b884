"""What is known of the pictures of a large collection, kept between processes: opening it again reads none.

One file for each collection in the user's cache (`XDG_CACHE_HOME`, or ~/.cache). A picture counts as seen
while its stamp (size and time of modification, mostly) is the same. What cannot be read or written is as if
it were not there: the pictures are then looked at once more.
"""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle.data.image_files import Look
from dalle.data.text import encoded
from dalle.errors import UserError
from dalle.files import atomic_path

FORMAT = 2  # raise it when the file or `inspect` changes
WORTH = 2_000  # pictures from which a file is kept
DIGEST = 16  # bytes

Stamp = tuple[int, int]


class PictureIndex:
    """Looks at pictures by name and stamp; a context, at whose end what is new is written.

    Args:
        key: of the collection, with everything that a look depends on beside the picture's stamp.
        items: pictures that are asked for.
    """

    def __init__(self, key: str, items: int) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(f"{FORMAT} {key}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
        self.path = home / "dalle" / "pictures" / f"{name}.npz"
        self._worth = items >= WORTH
        self._known, self._new = _none(), _none()
        self._rows: dict[str, int] = {}  # of what is known
        self._asked: list[int] = []

    def __enter__(self) -> "PictureIndex":
        if self._worth:
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                self._known = _load(self.path)
                self._rows = {name: row for row, name in enumerate(self._known.names)}
        return self

    def __exit__(self, *failed: object) -> None:
        """Also where looking was broken off: what has been seen stays known."""
        rows = range(len(self._known.names)) if any(failed) else self._asked
        if self._worth and (self._new.names or len(rows) < len(self._known.names)):
            with contextlib.suppress(OSError, UserError):
                kept = zip(self._known, self._new, strict=True)
                _save(self.path, _Columns(*([*(old[row] for row in rows), *new] for old, new in kept)))

    def get(self, name: str, stamp: Stamp) -> Look | None:
        row, known = self._rows.get(name), self._known
        if row is None or known.first[row] != stamp[0] or known.second[row] != stamp[1]:
            return None
        self._asked.append(row)
        return Look(known.digests[row], known.widths[row], known.heights[row], known.odd[row])

    def put(self, name: str, stamp: Stamp, look: Look) -> None:
        new = self._new
        for column, value in zip(new, (name, *stamp, *look), strict=True):
            column.append(value)


class _Columns(NamedTuple):
    """Names, stamps and looks, as lists of plain values: a tuple each would keep Python's collector busy."""

    names: list[Any]
    first: list[Any]
    second: list[Any]
    digests: list[Any]
    widths: list[Any]
    heights: list[Any]
    odd: list[Any]


def _none() -> _Columns:
    return _Columns([], [], [], [], [], [], [])


def _save(path: Path, seen: _Columns) -> None:
    with atomic_path(path, sync=False) as hidden, hidden.open("wb") as file:
        np.savez(
            file,
            names=np.frombuffer(b"\0".join(map(encoded, seen.names)), np.uint8),
            digests=np.frombuffer(bytes.fromhex("".join(seen.digests)), np.uint8),
            numbers=np.array([seen.first, seen.second, seen.widths, seen.heights, seen.odd], np.int64),
        )


def _load(path: Path) -> _Columns:
    with np.load(path, allow_pickle=False) as held:
        names = held["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
        digests, numbers = held["digests"].tobytes().hex(), held["numbers"]
    step = 2 * DIGEST
    if numbers.shape != (5, len(names)) or len(digests) != step * len(names):
        raise ValueError
    first, second, widths, heights, odd = numbers.tolist()
    each = [digests[at : at + step] for at in range(0, len(digests), step)]
    return _Columns(names, first, second, each, widths, heights, list(map(bool, odd)))
