"""Captioned pictures of any format as a `Source`: what is left once it is known where they are.

A format is a `Collection`: it finds names of pictures and their captions, and gives the bytes of each. All
else is here and the same for all of them. Splits are the format's own where it has any, else come from a hash
of each picture's name, so it stays in its split when others are added. What cannot be used is left out; what
was read is said once, in one line, and what is odd in another.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tqdm import tqdm

from dalle.data.filters import Filters
from dalle.data.image_files import BadPicture, Fit, Look, inspect
from dalle.data.picture_index import PictureIndex, Stamp
from dalle.data.picture_reader import NAMED, PictureReader
from dalle.data.splits import FEWEST, Split, divide, split_folder
from dalle.data.text import encoded, shown
from dalle.errors import UserError

PATIENCE = 2  # seconds after which a progress bar is shown
MUCH = 1 / 3  # of a picture, lost to a square crop


@dataclass
class Catalogue:
    """What a format says is there, before any picture has been looked at. Names are POSIX paths."""

    pictures: dict[str, Stamp]  # in order; what tells versions of a picture apart
    captions: Mapping[str, list[str]]
    origin: str  # of the captions
    splits: Mapping[str, str] = field(default_factory=dict)  # given ones; pictures without are left out
    left_out: Mapping[str, list[str]] = field(default_factory=dict)  # why -> what
    notes: Mapping[str, list[str]] = field(default_factory=dict)  # of pictures that are used
    unread: Sequence[str] = ()  # files that may hold captions, and why they were not read
    wanted: str = ""  # what was looked for, where nothing is found
    among: str = ""  # and among what
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of pictures, for filters
    columns: Sequence[str] = ()  # all that are there


@runtime_checkable
class Collection(Protocol):
    """Pictures in a format. Frozen: equal ones hold the same, and share one scan."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        ...

    @property
    def setting(self) -> str:
        """How that was given: `data.root`."""
        ...

    def find(self) -> Catalogue: ...

    def content(self, name: str) -> Path | bytes:
        """A picture's file, or its bytes.

        Raises:
            BadPicture: it cannot be had.
        """
        ...


@dataclass(frozen=True)
class Scan:
    """What can be used of a collection: captions and content digests of names, in order."""

    captions: dict[str, list[str]]
    digests: dict[str, str]
    given: dict[str, str]  # splits by folders or tables
    origin: str  # of the captions
    cropped: int  # pictures of which a square crop loses much
    looks: dict[str, Look]
    out: dict[str, list[str]]  # why -> what is left out
    notes: dict[str, list[str]]
    unread: Sequence[str]
    _divided: dict[tuple[float, float, int], dict[str, list[str]]] = field(default_factory=dict)

    def divided(self, val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[str]]:
        """Names by split; worked out once for all of them."""
        key = (val_fraction, test_fraction, seed)
        if key not in self._divided:
            self._divided[key] = divide(list(self.captions), *key, self.given, self.digests)
        return self._divided[key]


class NothingUsable(UserError):
    """`unread`: files that may hold captions, and why they were not read."""

    def __init__(self, line: str, unread: Sequence[str]) -> None:
        super().__init__(line)
        self.unread = unread


class Pictures(PictureReader):
    """One split of a collection.

    Args:
        split: train, val or test.
        collection: the pictures.
        image_size: S; the short side is resized to it, then the middle square is taken (`crop="center"`) or,
            in training, one drawn per epoch (`crop="random"`).
        val_fraction, test_fraction: of the pictures, where no split is given. From three different ones on,
            no split with a fraction above 0 is empty; fewer are in every split. Equal ones are in one.
        seed: of the splits and crops.
        max_pixels: larger pictures are left out, as their size may be a lie that eats the memory.
        fit: how a picture becomes a square: `crop`, or `pad` with white, or `squash`.
        filters: which pictures are used; None: all.
        buckets: decoders and upsamplers see pictures in their own shapes, see `buckets`.

    Raises:
        UserError: nothing usable; says what was looked for and what was found.
    """

    has_classes = False  # captions are names of classes in sentences

    def __init__(
        self,
        split: Split,
        collection: Collection,
        image_size: int,
        crop: Literal["center", "random"],
        val_fraction: float,
        test_fraction: float,
        seed: int,
        max_pixels: int,
        fit: Fit,
        filters: Filters | None = None,
        buckets: bool = False,
    ):
        check_options(image_size, crop, val_fraction, test_fraction, fit)
        super().__init__(split, image_size, crop, seed, max_pixels, fit, buckets)
        self.collection = collection
        self.scan = scanned = scan(collection, max_pixels, filters or None)
        splits = scanned.divided(val_fraction, test_fraction, seed)
        sizes = {split: len(names) for split, names in splits.items()}
        introduce(collection, scanned, sizes, "buckets" if buckets else fit, crop)
        self.names = splits[split]
        self.remember(len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, item: int) -> list[str]:
        return self.scan.captions[self.names[self._readable(item)]]

    @cached_property
    def aspects(self) -> np.ndarray:
        looks = [self.scan.looks[name] for name in self.names]
        return np.array([look.width / look.height for look in looks])

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.image_size} {self.random_crop and self.seed} {self.fit}\n".encode())
        for name in self.names:
            digest.update(encoded(name))
            digest.update(f"\n{self.scan.digests[name]}\n{self.scan.captions[name]}\n".encode())
        return digest.hexdigest()[:16]

    def picture_of(self, item: int) -> Path | bytes:
        return self.collection.content(self.names[item])

    def called(self, item: int) -> str:
        return str(Path(self.collection.place, self.names[item]))

    @property
    def place(self) -> str:
        return self.collection.place


def check_options(image_size: int, crop: str, val_fraction: float, test_fraction: float, fit: str) -> None:
    """Refuses what contradicts itself, and a size of which not one picture fits the machine."""
    if not (min(val_fraction, test_fraction) >= 0 and val_fraction + test_fraction < 1):  # nan is neither
        raise UserError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing to train on"
        )
    if crop == "random" and fit != "crop":
        raise UserError(f"data.crop=random crops, and data.fit={fit} keeps the whole picture; choose one")
    needed = 12 * image_size**2  # float32 RGB
    if image_size < 1 or needed > _memory_bytes():
        takes = f"; one picture would take {needed / 2**30:.0f} GB" if image_size > 0 else ""
        raise UserError(f"data.image_size={image_size}: give the pixels of a side, usually 16 to 256{takes}")


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 2**34


@lru_cache(maxsize=4)
def scan(collection: Collection, max_pixels: int, filters: Filters | None = None) -> Scan:
    """Looks through a collection, once as long as nothing in it changes; warns once about what is odd."""
    found = collection.find()
    keep = filters or Filters()
    keep.check(chain.from_iterable(found.values.values()), found.columns, collection.place)
    captions: dict[str, list[str]] = {}
    given = dict(found.splits)
    out: dict[str, list[str]] = defaultdict(list, {why: list(some) for why, some in found.left_out.items()})
    named = set(chain(*found.left_out.values()))
    looks: dict[str, Look] = {}
    notes: dict[str, list[str]] = defaultdict(list, {why: list(some) for why, some in found.notes.items()})
    wanted: list[str] = []
    for name in found.pictures:
        if given and name not in given:
            out["outside the folders of the splits"].append(name)
        elif not found.captions.get(name):
            if name not in named:
                out["without a readable caption"].append(name)
        else:
            captions[name], why = keep.captions(found.captions[name])
            if why := why or keep.values(found.values.get(name, {})):
                out[why].append(name)
            else:
                wanted.append(name)
    with PictureIndex(f"{type(collection).__name__} {collection.place} {max_pixels}", len(wanted)) as index:
        for name in tqdm(wanted, desc="Looking at pictures", delay=PATIENCE, unit=""):
            look = index.get(name, found.pictures[name])
            if look is None:
                try:
                    look = inspect(collection.content(name), max_pixels)
                except BadPicture as error:
                    out[str(error)].append(name)
                    continue
                index.put(name, found.pictures[name], look)
            if why := keep.size(look.width, look.height):
                out[why].append(name)
                continue
            looks[name] = look
            if look.odd_profile:
                notes["with a broken colour profile, read without it"].append(name)
    digests = {name: look.digest for name, look in looks.items()}
    given = {name: split for name, split in given.items() if name in digests}
    if "train" not in given.values():  # none of them can be used: the others are divided
        given = {}
    cropped = sum(
        1 - min(look.width, look.height) / max(look.width, look.height) > MUCH for look in looks.values()
    )
    notes |= _equal(digests, given)
    if not digests:
        raise NothingUsable(_nothing(collection, found, out), found.unread)
    _warn(collection.place, len(digests), out, notes, found.unread)
    return Scan(
        {name: captions[name] for name in digests},
        digests,
        given,
        found.origin,
        cropped,
        looks,
        dict(out),
        dict(notes),
        found.unread,
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


def listed(reasons: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(
        f"{len(some)} {why} ({', '.join(map(shown, some[:NAMED]))}{', ...' if len(some) > NAMED else ''})"
        for why, some in reasons.items()
    )


def _warn(
    place: str,
    used: int,
    out: Mapping[str, list[str]],
    notes: Mapping[str, list[str]],
    unread: Sequence[str],
) -> None:
    parts = [f"Left out: {listed(out)}" if out else "", f"Of these, {listed(notes)}" if notes else ""]
    parts += [f"Not read: {_some(unread)}" if unread else ""]
    if said := [part for part in parts if part]:
        rank_zero_warn(f"{shown(place)}: {used} pictures are used. {'. '.join(said)}")


def _some(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - 2 * NAMED} others" if len(lines) > 2 * NAMED else ""
    return "; ".join(lines[: 2 * NAMED]) + more


def _nothing(collection: Collection, found: Catalogue, out: Mapping[str, list[str]]) -> str:
    unread = f". {_some(found.unread)}" if found.unread else ""
    return (
        f"{collection.setting}={shown(collection.place)} has no usable picture. Looked for {found.wanted}; "
        f"found {len(found.pictures)} pictures" + (f": {listed(out)}" if out else found.among) + unread
    )


@lru_cache(maxsize=64)
def say(line: str) -> None:
    """Prints a line once, on one rank."""
    rank_zero_only(print)(line, flush=True)


def introduce(collection: Collection, scanned: Scan, sizes: Mapping[str, int], fit: str, crop: str) -> None:
    """Says in one line what was read and how it is divided, and in another what a square crop loses."""
    n, captions = len(scanned.captions), sum(map(len, scanned.captions.values()))
    places = {(name.rpartition("/")[0], split) for name, split in scanned.given.items()}
    meant = {(word, split) for parent, split in places if (word := split_folder(f"{parent}/x"))}
    folders = sorted(dict(meant)) if len(dict(meant)) == len(meant) else []  # else tables say otherwise
    how = "by a hash of their names"
    if len(set(scanned.digests.values())) < FEWEST:
        how = f"fewer than {FEWEST} different ones are in every split"
    if scanned.given:
        how = f"by the folders {', '.join(map(shown, folders))}" if folders else "as the tables say"
    divided = ", ".join(f"{size} {split}" for split, size in sizes.items())
    say(
        f"{shown(collection.place)}: {n} pictures with {captions} captions from {scanned.origin}; "
        f"{divided} ({how})"
    )
    if fit == "crop" and crop == "center" and scanned.cropped:
        say(
            f"{scanned.cropped} of {n} pictures ({scanned.cropped / n:.0%}) lose more than a third to the "
            "square crop; data.fit=pad or data.fit=squash keeps the whole of them"
        )
