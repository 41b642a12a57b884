"""Disks to be tried: file systems of a few hundred kilobytes that fill up, turn read-only, or go away.

Mounting needs root; without it these trials are left out and said to be.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@contextmanager
def tiny(place: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of its own at `place`; False where none can be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    there = mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place))
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def resize(place: Path, kilobytes: int) -> None:
    mount("-o", f"remount,rw,size={kilobytes}k", str(place))


def read_only(place: Path) -> None:
    mount("-o", "remount,ro", str(place))
