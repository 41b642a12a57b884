"""A folder of one's own pictures with captions, as a `Source`.

Splits come from folders `train`, `val`, `test` in the root where they exist, else from a hash of each
picture's name, so it stays in its split when others are added. What cannot be used is left out and reported
once.
"""

import hashlib
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from dalle.data.captions import SPLITS, CaptionFiles, given_split, uses_split_folders
from dalle.data.pictures import BROKEN, SUFFIXES, BadPicture, Memory, inspect, read
from dalle.data.sources import mix
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, PositiveInt, Seed, Side

FEWEST = 3  # pictures that can be divided into three splits
MEMORY = 2**30  # bytes of decoded pictures kept
LONGEST = 2  # random crops are taken from the middle part of a picture, at most so many times as long as wide
NAMED = 3  # pictures named in a report
LONG_SCAN = 20_000  # pictures from which a progress bar is shown

Captioner = Callable[[Path, Sequence[str], Sequence[str]], dict[str, list[str]]]


@dataclass(frozen=True)
class Scan:
    """What can be used of a folder: captions and content digests of POSIX names below the root, in order."""

    captions: dict[str, list[str]]
    digests: dict[str, str]


class Folder:
    """Pictures (png, jpg, webp, bmp, gif) anywhere below `root`, with captions.

    Args:
        split: train, val or test.
        root: the folder. Captions: see `CaptionFiles`.
        image_size: S; the short side is resized to it, then the middle square is taken (`crop="center"`) or,
            in training, one drawn per epoch (`crop="random"`).
        val_fraction, test_fraction: of the pictures, where there are no folders `val` and `test`. From three
            pictures on, no split with a fraction above 0 is empty; fewer than three are in every split.
        seed: of the splits and crops.
        max_pixels: larger pictures are left out, as their size may be a lie that eats the memory.
        captions: a .jsonl or .csv file, relative to the root; None = what is found.

    Raises:
        UserError: nothing usable; says what was looked for and what was found.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        root: Place,
        image_size: Side,
        crop: Literal["center", "random"] = "center",
        val_fraction: Fraction = 0.05,
        test_fraction: Fraction = 0.05,
        seed: Seed = 0,
        max_pixels: PositiveInt = 64_000_000,
        captions: Place | None = None,
    ):
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"data.root={root} {what}; give a folder of pictures with captions")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing to train on"
            )
        self.split, self.image_size, self.seed, self.max_pixels = split, image_size, seed, max_pixels
        self.random_crop = crop == "random" and split == "train"
        self.fixed = not self.random_crop
        self._scan = scan(self.root, self.captioner(captions), max_pixels)
        self.names = divide(list(self._scan.captions), val_fraction, test_fraction, seed)[split]
        slot = 3 * image_size**2 * (LONGEST if self.random_crop else 1)
        self._memory = Memory(len(self.names), slot if slot * len(self.names) <= MEMORY else 0)

    def captioner(self, captions: str | Path | None) -> Captioner:
        """Where captions come from: the one thing in which kinds of folders differ."""
        if captions is None:
            return CaptionFiles()
        table = self.root / Path(captions).expanduser()
        if not table.is_file():
            raise UserError(f"captions={captions}: there is no file {table}")
        return CaptionFiles(str(table), table.stat().st_mtime_ns)

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
        digest = hashlib.sha256(f"{self.image_size} {self.random_crop and self.seed}\n".encode())
        for name in self.names:
            digest.update(f"{name}\n{self._scan.digests[name]}\n{self._scan.captions[name]}\n".encode())
        return digest.hexdigest()[:16]

    def _picture(self, item: int) -> np.ndarray:
        """(H, W, 3) uint8, H or W = S; read from disk once where memory allows."""
        while True:
            item = self._readable(item)
            if (picture := self._memory.get(item)) is not None:
                return picture
            try:
                aspect = LONGEST if self.random_crop else 1
                picture = read(self.root / self.names[item], self.image_size, aspect, self.max_pixels)
            except (BadPicture, OSError) as error:
                self._memory.state[item] = BROKEN
                rank_zero_warn(f"{self.root / self.names[item]}: {error}; another picture takes its place")
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


def divide(
    names: Sequence[str], val_fraction: float, test_fraction: float, seed: int = 0
) -> dict[str, list[str]]:
    """Names -> {train, val, test}, each in the order of `names`.

    Given folders decide where they exist; a split without one is drawn from `train/`. A split that the hash
    leaves empty takes the name that came closest; with fewer than three names, every split has them all.
    """
    given = {split: [name for name in names if given_split(name) == split] for split in SPLITS}
    if not uses_split_folders(names):
        given = {split: [] for split in SPLITS}
    pool = given["train"] or list(names)
    fractions = {"val": val_fraction, "test": test_fraction}
    wanted = {split: fraction for split, fraction in fractions.items() if fraction > 0 and not given[split]}
    if len(pool) < FEWEST:
        return given | dict.fromkeys(("train", *wanted), pool)
    order = sorted((_place(name, seed), name) for name in pool)
    splits, start, edge = {}, 0, 0.0
    for k, (split, fraction) in enumerate(wanted.items()):
        edge += fraction
        end = max(bisect_left(order, (edge, "")), start + 1)
        end = min(end, len(order) - len(wanted) + k)  # leaves one for each split to come, and for training
        splits |= {name: split for _, name in order[start:end]}
        start = end
    return given | {
        split: [name for name in pool if splits.get(name, "train") == split] for split in ("train", *wanted)
    }


def _place(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the name and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6]) / 2**48


def scan(root: Path, captioner: Captioner, max_pixels: int) -> Scan:
    """Looks through a folder, once as long as nothing in it changes; warns once about what is left out."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                status = path.stat()
                files.append((path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns))
    return _scan(root, tuple(sorted(files)), captioner, max_pixels)


@lru_cache(maxsize=4)
def _scan(root: Path, files: tuple[tuple[str, int, int], ...], captioner: Captioner, max_pixels: int) -> Scan:
    names = [name for name, *_ in files]
    pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
    found = captioner(root, pictures, names)
    out: dict[str, list[str]] = defaultdict(list)
    digests = {}
    in_splits = uses_split_folders(pictures)
    for name in tqdm(pictures, desc="Looking at pictures", disable=len(pictures) < LONG_SCAN, unit=""):
        if in_splits and given_split(name) is None:
            out["outside the folders of the splits"].append(name)
            continue
        if not found.get(name):
            out["without a readable caption"].append(name)
            continue
        try:
            digests[name] = inspect(root / name, max_pixels)
        except (BadPicture, OSError) as error:
            out[str(error)].append(name)
    if missing := sorted(set(found) - set(pictures)):
        out["listed but not there"] = missing
    report = "; ".join(
        f"{len(bad)} {reason} ({', '.join(bad[:NAMED])}{', ...' if len(bad) > NAMED else ''})"
        for reason, bad in out.items()
    )
    if not digests:
        raise UserError(
            f"data.root={root} has no usable picture. Looked for {', '.join(SUFFIXES)} with "
            f"{getattr(captioner, 'wanted', 'captions')}; found {len(pictures)} pictures"
            + (f": {report}" if report else f" among {len(names)} files")
        )
    if report:
        rank_zero_warn(f"{root}: {len(digests)} pictures are used. Left out: {report}")
    return Scan({name: found[name] for name in digests}, digests)
