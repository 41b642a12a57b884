"""A folder of one's own pictures with captions, as a `Source`.

Splits come from folders `train`, `val`, `test` (or tables that say so) where they exist, else from a hash of
each picture's name, so it stays in its split when others are added. What cannot be used is left out; what was
read is said once, in one line, and what is odd in another.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from dalle.data.caption_files import CaptionFiles, Found
from dalle.data.caption_tables import Columns
from dalle.data.file_listing import ELSEWHERE, Listing, list_files
from dalle.data.image_files import (
    BROKEN,
    MAX_PIXELS,
    SUFFIXES,
    UNREADABLE,
    BadPicture,
    Fit,
    Memory,
    inspect,
    read,
)
from dalle.data.sources import mix
from dalle.data.splits import FEWEST, Split, divide, folder_splits, split_folder
from dalle.data.text import encoded, shown
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, PositiveInt, Seed, Side, Text

MEMORY = 2**30  # bytes of decoded pictures kept
LONGEST = 2  # random crops are taken from the middle part of a picture, at most so many times as long as wide
NAMED = 3  # pictures named in a report
LONG_SCAN = 20_000  # pictures from which a progress bar is shown
MUCH = 1 / 3  # of a picture, lost to a square crop

Captioner = Callable[[Path, Sequence[str], Mapping[str, int]], Found]


@dataclass(frozen=True)
class Scan:
    """What can be used of a folder: captions and content digests of POSIX names below the root, in order."""

    captions: dict[str, list[str]]
    digests: dict[str, str]
    given: dict[str, str]  # splits by folders or tables
    origin: str  # of the captions
    cropped: int  # pictures of which a square crop loses much


class Folder:
    """Pictures of the usual formats anywhere below `root`, with captions.

    Args:
        split: train, val or test.
        root: the folder. Captions: see `CaptionFiles`.
        image_size: S; the short side is resized to it, then the middle square is taken (`crop="center"`) or,
            in training, one drawn per epoch (`crop="random"`).
        val_fraction, test_fraction: of the pictures, where there are no folders `val` and `test`. From three
            different pictures on, no split with a fraction above 0 is empty; fewer are in every split. Equal
            pictures are in one.
        seed: of the splits and crops.
        max_pixels: larger pictures are left out, as their size may be a lie that eats the memory.
        captions: a table, relative to the root; None = what is found.
        image_column, caption_column: of tables, those that hold pictures' names and captions (one or more);
            None: those of the usual names.
        lines: of a .txt beside a picture, `first` or `all` are its captions.
        fit: how a picture becomes a square: `crop`, or `pad` with white, or `squash`.

    Raises:
        UserError: nothing usable; says what was looked for and what was found.
    """

    def __init__(
        self,
        split: Split,
        root: Place,
        image_size: Side,
        crop: Literal["center", "random"] = "center",
        val_fraction: Fraction = 0.05,
        test_fraction: Fraction = 0.05,
        seed: Seed = 0,
        max_pixels: PositiveInt = MAX_PIXELS,
        captions: Place | None = None,
        image_column: Text | None = None,
        caption_column: Text | Sequence[Text] | None = None,
        lines: Literal["first", "all"] = "all",
        fit: Fit = "crop",
    ):
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"data.root={root} {what}; give a folder of pictures with captions")
        if not (min(val_fraction, test_fraction) >= 0 and val_fraction + test_fraction < 1):  # nan is neither
            raise UserError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing to train on"
            )
        if crop == "random" and fit != "crop":
            raise UserError(f"data.crop=random crops, and data.fit={fit} keeps the whole picture; choose one")
        check_memory(image_size)
        several = (caption_column,) if isinstance(caption_column, str) else tuple(caption_column or ())
        captioner = self.captioner(captions, Columns(image_column, several), lines == "first")
        self.split, self.image_size, self.seed, self.max_pixels = split, image_size, seed, max_pixels
        self.fit: Fit = fit
        self.random_crop = crop == "random" and split == "train"
        self.fixed = not self.random_crop
        self._scan = scan(self.root, captioner, max_pixels)
        names, scanned = list(self._scan.captions), self._scan
        splits = divide(names, val_fraction, test_fraction, seed, scanned.given, scanned.digests)
        introduce(self.root, scanned, {split: len(names) for split, names in splits.items()}, fit, crop)
        self.names = splits[split]
        slot = 3 * image_size**2 * (LONGEST if self.random_crop else 1)
        self._memory = Memory(len(self.names), slot if slot * len(self.names) <= MEMORY else 0)

    def captioner(self, captions: str | Path | None, columns: Columns, first_line: bool) -> Captioner:
        """Where captions come from: the one thing in which kinds of folders differ."""
        if captions is None:
            return CaptionFiles(columns=columns, first_line=first_line)
        table = self.root / Path(captions).expanduser()
        if not table.is_file():
            raise UserError(f"captions={captions}: there is no file {table}")
        return CaptionFiles(str(table), table.stat().st_mtime_ns, columns, first_line)

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, item: int) -> list[str]:
        return self._scan.captions[self.names[self._readable(item)]]

    def images(self, items: Sequence[int], epoch: int = 0) -> Float[Tensor, "b 3 s s"]:
        """(B, 3, S, S) float32 in [-1, 1]. A picture that turns out broken is replaced by the next one."""
        size = self.image_size
        batch = np.empty((len(items), size, size, 3), np.uint8)
        for row, item in zip(batch, items, strict=True):
            picture = self._picture(item)
            top, left = self._corner(picture.shape, item, epoch)
            row[:] = picture[top : top + size, left : left + size]
        return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.image_size} {self.random_crop and self.seed} {self.fit}\n".encode())
        for name in self.names:
            digest.update(encoded(name))
            digest.update(f"\n{self._scan.digests[name]}\n{self._scan.captions[name]}\n".encode())
        return digest.hexdigest()[:16]

    def _picture(self, item: int) -> np.ndarray:
        """(H, W, 3) uint8, H or W = S; read from disk once where memory allows."""
        while True:
            item = self._readable(item)
            if (picture := self._memory.get(item)) is not None:
                return picture
            aspect = LONGEST if self.random_crop else 1
            path = self.root / self.names[item]
            try:
                picture = read(path, self.image_size, aspect, self.max_pixels, self.fit)
            except BadPicture as error:
                if 0 < (broken := self._memory.give_up(item)) <= NAMED:
                    more = "; more of the kind are not named" if broken == NAMED else ""
                    rank_zero_warn(f"{shown(str(path))}: {error}; another picture takes its place{more}")
            else:
                self._memory.put(item, picture)
                return picture

    def _readable(self, item: int) -> int:
        """The item itself, or the next after it that has not turned out to be broken."""
        state = self._memory.state
        if state[item] != BROKEN:
            return item
        n = len(self)
        for other in range(item + 1, item + n):
            if state[other % n] != BROKEN:
                return other % n
        raise UserError(f"none of the {n} {self.split} pictures in {self.root} can be read any more")

    def _corner(self, shape: tuple[int, ...], item: int, epoch: int) -> tuple[int, int]:
        free = [side - self.image_size for side in shape[:2]]
        if not self.random_crop:
            return free[0] // 2, free[1] // 2
        draw = mix(self.seed, epoch, item, 1)  # 1: another draw than that of the caption
        return draw % (free[0] + 1), draw % (free[1] + 1)  # one of the two is always 0


def check_memory(image_size: int) -> None:
    """Refuses a size of which not one picture fits the machine."""
    needed = 12 * image_size**2  # float32 RGB
    if image_size < 1 or needed > _memory_bytes():
        takes = f"; one picture would take {needed / 2**30:.0f} GB" if image_size > 0 else ""
        raise UserError(f"data.image_size={image_size}: give the pixels of a side, usually 16 to 256{takes}")


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 2**34


def scan(root: Path, captioner: Captioner, max_pixels: int) -> Scan:
    """Looks through a folder, once as long as nothing in it changes; warns once about what is odd."""
    return _scan(root, list_files(root), captioner, max_pixels)


@lru_cache(maxsize=4)
def _scan(root: Path, listing: Listing, captioner: Captioner, max_pixels: int) -> Scan:
    sizes = {name: size for name, size, _ in listing.files}
    pictures = [name for name in sizes if name.lower().endswith(SUFFIXES)]
    found = captioner(root, pictures, sizes)
    given = folder_splits(pictures) or found.splits
    out: dict[str, list[str]] = defaultdict(list, {why: list(some) for why, some in found.left_out.items()})
    named = set(chain(*found.left_out.values()))
    digests: dict[str, str] = {}
    notes: dict[str, list[str]] = defaultdict(list)
    cropped = 0
    for name in tqdm(pictures, desc="Looking at pictures", disable=len(pictures) < LONG_SCAN, unit=""):
        if given and name not in given:
            out["outside the folders of the splits"].append(name)
        elif not found.captions.get(name):
            if name not in named:
                out["without a readable caption"].append(name)
        else:
            try:
                look = inspect(root / name, max_pixels)
            except BadPicture as error:
                out[str(error)].append(name)
                continue
            digests[name] = look.digest
            cropped += 1 - min(look.width, look.height) / max(look.width, look.height) > MUCH
            if look.odd_profile:
                notes["with a broken colour profile, read without it"].append(name)
    for name in sizes:
        if name.lower().endswith(UNREADABLE) and not name.lower().endswith(SUFFIXES):
            out["in a format that is not read (save them as PNG or JPEG)"].append(name)
    for name, why in listing.odd:
        (notes if why == ELSEWHERE else out)[why].append(name)
    notes |= _equal(digests, given)
    if not digests:
        raise UserError(_nothing(root, captioner, found, out, len(pictures), len(sizes)))
    _warn(root, len(digests), out, notes, found.unread)
    return Scan(
        {name: found.captions[name] for name in digests},
        digests,
        {name: split for name, split in given.items() if name in digests},
        found.origin,
        cropped,
    )


def _equal(digests: Mapping[str, str], given: Mapping[str, str]) -> dict[str, list[str]]:
    """Pictures that are there several times, bit for bit; and those of them that lie in several splits."""
    count = Counter(digests.values())
    equal = [name for name, digest in digests.items() if count[digest] > 1]
    places: dict[str, set[str]] = defaultdict(set)
    for name in equal if given else ():
        places[digests[name]].add(given[name])
    apart = [name for name in equal if len(places[digests[name]]) > 1]
    different = len({digests[name] for name in equal})
    where = ", kept in one split" if len(set(digests.values())) >= FEWEST else ""
    found = {f"equal to another ({different} different ones){where}": equal} if equal else {}
    return {"equal to one in another split: take them out of the one or the other": apart} if apart else found


def _listed(reasons: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(
        f"{len(some)} {why} ({', '.join(map(shown, some[:NAMED]))}{', ...' if len(some) > NAMED else ''})"
        for why, some in reasons.items()
    )


def _warn(
    root: Path, used: int, out: Mapping[str, list[str]], notes: Mapping[str, list[str]], unread: list[str]
) -> None:
    parts = [f"Left out: {_listed(out)}" if out else "", f"Of these, {_listed(notes)}" if notes else ""]
    parts += [f"Not read: {'; '.join(unread)}" if unread else ""]
    if said := [part for part in parts if part]:
        rank_zero_warn(f"{shown(str(root))}: {used} pictures are used. {'. '.join(said)}")


def _nothing(
    root: Path, captioner: Captioner, found: Found, out: Mapping[str, list[str]], pictures: int, files: int
) -> str:
    unread = f". {'; '.join(found.unread)}" if found.unread else ""
    return (
        f"data.root={shown(str(root))} has no usable picture. Looked for {', '.join(SUFFIXES)} with "
        f"{getattr(captioner, 'wanted', 'captions')}; found {pictures} pictures"
        + (f": {_listed(out)}" if out else f" among {files} files")
        + unread
    )


@lru_cache(maxsize=64)
def _say(line: str) -> None:
    rank_zero_only(print)(line, flush=True)


def introduce(root: Path, scanned: Scan, sizes: Mapping[str, int], fit: str, crop: str) -> None:
    """Says in one line what was read and how it is divided, and in another what a square crop loses."""
    n, captions = len(scanned.captions), sum(map(len, scanned.captions.values()))
    folders = sorted({word for name in scanned.given if (word := split_folder(name))})
    how = "by a hash of their names"
    if len(set(scanned.digests.values())) < FEWEST:
        how = f"fewer than {FEWEST} different ones are in every split"
    if scanned.given:
        how = f"by the folders {', '.join(map(shown, folders))}" if folders else "as the tables say"
    divided = ", ".join(f"{size} {split}" for split, size in sizes.items())
    _say(
        f"{shown(str(root))}: {n} pictures with {captions} captions from {scanned.origin}; {divided} ({how})"
    )
    if fit == "crop" and crop == "center" and scanned.cropped:
        _say(
            f"{scanned.cropped} of {n} pictures ({scanned.cropped / n:.0%}) lose more than a third to the "
            "square crop; data.fit=pad or data.fit=squash keeps the whole of them"
        )
