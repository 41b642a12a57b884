"""Where the samples of a tar file are: an index, so that each can be read alone and in any order.

The layout is WebDataset's (what img2dataset and `webdataset` write): members `KEY.jpg`, `KEY.txt`, `KEY.json`
with one key, which ends at the first dot of a file's name, are one sample. Only headers are read here, one
small block each, and nothing is ever unpacked: a name that leads out of a folder leads nowhere. Of kinds of
members only plain files count. Files of Python objects are never opened.
"""

import hashlib
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dalle.data.image_files import SUFFIXES
from dalle.data.text import encoded

BLOCK = tarfile.BLOCKSIZE
LONGEST_NAME = 2**16  # bytes of what a tar says of a name beside its header
LARGEST_TEXT = 2**20  # bytes of a caption's file
NAMED = 3  # members named of each kind that is left out
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt", "ten", "joblib")
TEXTS, METADATA = ("txt", "caption", "text"), ("json",)
ROW = np.dtype(
    [("picture", "<i8"), ("bytes", "<i8"), ("caption", "<i8"), ("caption_bytes", "<i4"), ("json", "?"),
     ("place", "<f8")]
)  # fmt: skip
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class BadShard(Exception):
    """A shard that cannot be used at all; the message ends the sentence "2 shards are ..."."""


@dataclass
class TarIndex:
    """The samples of one tar file, in order, and what of it is left out."""

    rows: np.ndarray  # (n,) of ROW: offsets and lengths in bytes; `place` in [0, 1) by the key alone
    digest: str  # of all headers: names, sizes, times
    out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)  # why -> how many, some of them
    beside: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(n, 2) offset and length of each sample's json; 0 and 0 where it has none."""
    columns: list[str] = field(default_factory=list)  # in these, where filters have looked at them


def index_tar(path: Path, max_bytes: int, texts: bool = True) -> TarIndex:
    """Reads the headers of a tar file. One that is cut short or damaged counts as far as it is whole.

    Args:
        max_bytes: larger pictures are left out.
        texts: a txt is the caption where there is one; else only a json is.

    Raises:
        BadShard: it is no tar file, or a compressed one.
        OSError: it cannot be read.
    """
    out: dict[str, list[str]] = defaultdict(list)
    members: dict[str, dict[str, tuple[int, int]]] = {}
    digest = hashlib.sha256()
    odd: dict[str, list[str]] = defaultdict(list)  # key -> members that KEY.jpg and the like do not say
    with path.open("rb", buffering=0) as file:
        for name, offset, size, header in _members(file.fileno(), out):
            digest.update(header)
            folder, _, base = name.rpartition("/")
            stem, _, kind = base.partition(".")
            kind = kind.lower()
            if not stem or not kind:
                continue
            last = kind.rpartition(".")[2]
            if last in PICKLES:
                out["files that may hold Python objects, which are not opened"].append(name)
            elif f".{kind}" in SUFFIXES or kind in (*TEXTS, *METADATA):
                parts = members.setdefault(f"{folder}/{stem}", {})
                if kind in parts:
                    out["there twice, of which the first is read"].append(name)
                else:
                    parts[kind] = offset, size
            elif f".{last}" in SUFFIXES or last in TEXTS:
                odd[f"{folder}/{stem}"].append(name)
    kinds = (*TEXTS, *METADATA) if texts else METADATA
    made = [(_row(key, parts, kinds, max_bytes, out), _beside(parts)) for key, parts in members.items()]
    for key, names in odd.items():
        parts = members.get(key, {})
        if not any(f".{kind}" in SUFFIXES for kind in parts) or not parts.keys() & {*kinds}:
            out["not named KEY.jpg or KEY.txt, where KEY has no dot"] += names
    rows = [row for row, _ in made if row]
    beside = np.array([place for row, place in made if row], np.int64).reshape(-1, 2)
    return TarIndex(np.array(rows, ROW), digest.hexdigest()[:32], counted(out), beside)


def counted(out: Mapping[str, list[str]]) -> dict[str, tuple[int, list[str]]]:
    """How many there are of each kind that is left out, and some of them."""
    return {why: (len(some), some[:NAMED]) for why, some in out.items()}


def _beside(parts: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    offset, size = parts.get(METADATA[0], (0, 0))
    return (offset, size) if size <= LARGEST_TEXT else (0, 0)


def _row(
    key: str,
    parts: dict[str, tuple[int, int]],
    kinds: tuple[str, ...],
    max_bytes: int,
    out: dict[str, list[str]],
) -> tuple[Any, ...] | None:
    """The row of a sample that can be used."""
    picture = next((parts[kind] for kind in parts if f".{kind}" in SUFFIXES), None)
    text = next((kind for kind in kinds if kind in parts), None)
    if picture is None:
        return None  # a caption alone: img2dataset leaves them where a download has failed
    if text is None:
        out["without a caption"].append(key.lstrip("/"))
    elif not 0 < picture[1] <= max_bytes:
        out["empty" if picture[1] == 0 else f"larger than {max_bytes:,} bytes"].append(key.lstrip("/"))
    elif not 0 < parts[text][1] <= LARGEST_TEXT:
        out["with a caption of no or too many bytes"].append(key.lstrip("/"))
    else:
        place = int.from_bytes(hashlib.sha256(encoded(key)).digest()[:6]) / 2**48
        return (*picture, *parts[text], text in METADATA, place)
    return None


def _members(file: int, out: dict[str, list[str]]) -> Iterator[tuple[str, int, int, bytes]]:
    """Name, offset, bytes and header of each plain file."""
    end = os.fstat(file).st_size
    at, name = 0, None
    while at + BLOCK <= end:
        header = _read(file, BLOCK, at)
        if header.count(0) == BLOCK:
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            if at == 0:
                packed = next((kind for start, kind in COMPRESSED.items() if header.startswith(start)), None)
                raise BadShard(f"compressed ({packed}): unpack it" if packed else "no tar file") from None
            out["damaged from there on"].append(f"byte {at:,}")
            return
        at += BLOCK
        size = info.size
        if size < 0 or at + size > end:
            out["cut short"].append(name or info.name)
            return
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if size > LONGEST_NAME:
                out["damaged from there on"].append(f"byte {at:,}")
                return
            said = _read(file, size, at)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = said.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                name = _pax_path(said) or name
        elif info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            pass
        elif info.type == tarfile.GNUTYPE_SPARSE:
            out["sparse files"].append(name or info.name)
            return
        else:
            if info.isreg():
                yield name or info.name, at, size, header
            elif not info.isdir():
                out["links or devices"].append(name or info.name)
                size = 0 if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE) else size
            name = None
        at += -(-size // BLOCK) * BLOCK
    if at < end or end == 0:
        if at == 0:
            raise BadShard("empty" if end == 0 else "no tar file")
        out["cut short"].append(f"byte {at:,}")


def _pax_path(said: bytes) -> str | None:
    """The path in an extended header: lines `LENGTH path=NAME`."""
    found = re.search(rb"(?:^|\n)(\d{1,6}) path=", said)
    if not found:
        return None
    start = found.start(1)
    line = said[start : start + int(found[1])]
    return line.partition(b"=")[2].rstrip(b"\n").decode("utf-8", "surrogateescape")


def _read(file: int, size: int, at: int) -> bytes:
    os.lseek(file, at, os.SEEK_SET)
    return os.read(file, size)
