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

import numpy as np

from dalle.data.image_files import Look
from dalle.data.text import encoded
from dalle.errors import UserError
from dalle.files import atomic_path

FORMAT = 1  # raise it when the file or `inspect` changes
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
        self._worth, self._new = items >= WORTH, 0
        self._known: dict[str, tuple[Stamp, Look]] = {}
        self._seen: dict[str, tuple[Stamp, Look]] = {}

    def __enter__(self) -> "PictureIndex":
        if self._worth:
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                self._known = _load(self.path)
        return self

    def __exit__(self, *failed: object) -> None:
        """Also where looking was broken off: what has been seen stays known."""
        if self._worth and (self._new or len(self._seen) < len(self._known)):
            kept = self._known | self._seen if any(failed) else self._seen
            with contextlib.suppress(OSError, UserError):
                _save(self.path, kept)

    def get(self, name: str, stamp: Stamp) -> Look | None:
        known = self._known.get(name)
        if known is None or known[0] != stamp:
            return None
        self._seen[name] = known
        return known[1]

    def put(self, name: str, stamp: Stamp, look: Look) -> None:
        self._seen[name] = stamp, look
        self._new += 1


def _save(path: Path, seen: dict[str, tuple[Stamp, Look]]) -> None:
    names = b"\0".join(map(encoded, seen))
    looks = [look for _, look in seen.values()]
    with atomic_path(path, sync=False) as hidden, hidden.open("wb") as file:
        np.savez(
            file,
            names=np.frombuffer(names, np.uint8),
            stamps=np.array([stamp for stamp, _ in seen.values()], np.int64).reshape(-1, 2),
            digests=np.frombuffer(bytes.fromhex("".join(look.digest for look in looks)), np.uint8),
            sides=np.array([(look.width, look.height) for look in looks], np.int64).reshape(-1, 2),
            odd=np.array([look.odd_profile for look in looks], bool),
        )


def _load(path: Path) -> dict[str, tuple[Stamp, Look]]:
    with np.load(path, allow_pickle=False) as held:
        names = held["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
        digests = held["digests"].tobytes().hex()
        stamps, sides, odd = (held[key].tolist() for key in ("stamps", "sides", "odd"))
    step = 2 * DIGEST
    if not len(names) == len(stamps) == len(sides) == len(odd) == len(digests) // step:
        raise ValueError
    return {
        name: ((stamp[0], stamp[1]), Look(digests[k * step : (k + 1) * step], width, height, bad))
        for k, (name, stamp, (width, height), bad) in enumerate(zip(names, stamps, sides, odd, strict=True))
    }
