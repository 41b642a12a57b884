"""All files below a folder, links to folders followed, whatever is no file named and never opened."""

import heapq
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from dalle.data.splits import split_names

RESULTS = Path("logs")  # where commands write, below the folder in which they are started
ELSEWHERE = "links to folders that are read under another name"


@dataclass(frozen=True)
class Listing:
    """Names are POSIX paths below the root, in order."""

    files: tuple[tuple[str, int, int], ...]  # name, size, time of modification: what tells versions apart
    odd: tuple[tuple[str, str], ...]  # name, why it is no file


def list_files(root: Path) -> Listing:
    """Every folder is read once, so links cannot lead in circles or bring a picture twice.

    Of several names of one folder that of a split (a link `val`) comes first, then its own. Hidden files and
    folders are left out, and what was written by runs that were started in the root or above.
    """
    files: list[tuple[str, int, int]] = []
    odd: list[tuple[str, str]] = []
    status = root.stat()
    waiting = [(0, "", (status.st_dev, status.st_ino))]
    seen = _results() - {waiting[0][2]}
    while waiting:
        rank, folder, identity = heapq.heappop(waiting)
        if identity in seen:
            if rank != 1:
                odd.append((folder, ELSEWHERE))
            continue
        seen.add(identity)
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            odd.append((folder, f"that cannot be opened ({error.strerror})"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            link = entry.is_symlink()
            try:
                status = entry.stat()
            except OSError as error:
                odd.append((name, "links that lead nowhere" if link else f"that {error.strerror}"))
                continue
            if stat.S_ISREG(status.st_mode):
                files.append((name, status.st_size, status.st_mtime_ns))
            elif stat.S_ISDIR(status.st_mode):
                rank = 1 if not link else 0 if split_names([entry.name]) else 2
                heapq.heappush(waiting, (rank, name, (status.st_dev, status.st_ino)))
            else:
                odd.append((name, "no regular files"))
    return Listing(tuple(sorted(files)), tuple(sorted(odd)))


def _results() -> set[tuple[int, int]]:
    """The folders of runs and contact sheets; what else is in `logs` may be pictures of a class."""
    places = {RESULTS / "data_check", *(file.parents[1] for file in RESULTS.glob("*/*/manifest.json"))}
    found = [place.stat() for place in places if place.is_dir()]
    return {(status.st_dev, status.st_ino) for status in found}
