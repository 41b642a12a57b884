"""WebDataset shards as a `Source`: tar files as img2dataset and `webdataset` write them.

Unlike a stream this knows where every sample is (`tar_index`), so what needs a number of items or a place
works as with folders: splits, caches of what frozen networks make, and a resume that sees each sample as an
uninterrupted run would. What is read when follows `shuffling`: shards one after another, mixed in windows.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from dalle.data.caption_tables import Columns, texts
from dalle.data.filters import Filters
from dalle.data.folder import columns
from dalle.data.image_files import BYTES_PER_PIXEL, MAX_PIXELS, BadPicture, Fit, size_of
from dalle.data.picture_reader import PictureReader
from dalle.data.pictures import check_options, say
from dalle.data.shards import Shard, addresses, index, kept_sizes, told
from dalle.data.shuffling import ShardOrder
from dalle.data.splits import FEWEST, Split, folder_splits, owners
from dalle.data.tar_index import ROW, TarIndex, counted
from dalle.data.text import NO_TEXT, decoded, shown, tidy
from dalle.data.text import lines as lines_of
from dalle.errors import UserError
from dalle.ranges import Fraction, NonNegative, Place, Places, PositiveInt, Seed, Side, Text

LOOKED_AT = 256  # samples that tell whether there is a column
HEAD = 2**16  # bytes of a picture that usually tell its size
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Lines = Literal["whole", "all", "first"]
Shards = Place | Places


class WebDataset(PictureReader):
    """One split of tar files in which a picture and its caption have the same key.

    Args:
        split: train, val or test.
        shards: `PATH/{00000..00099}.tar`, a pattern with `*`, a folder, a list of these; each a path or an
            address that fsspec knows (`https://`, `s3://`, `gs://`, `hf://` ...).
        image_size: S; see `Folder`.
        val_shards, test_shards: those of these splits. Else shards in folders `train`, `val`, `test` are
            those splits; else a share of the shards, where one is not more than asked for; else a share of
            the samples, by a hash of their keys.
        caption_column: of the json of each sample; where there is a txt it counts, unless this is given.
        lines: whether a txt is one caption or each of its lines is one, or the first.
        shuffle_window: places among which samples are mixed; null: a whole epoch.
        resample: draw shards with replacement; an epoch is as long as one pass.
        copies_gb: of shards from elsewhere, kept here.
        (all others): as in `Folder`.

    Raises:
        UserError: no usable sample; says what was found. Later, where a shard can no longer be copied.
    """

    has_classes = False

    def __init__(
        self,
        split: Split,
        shards: Shards,
        image_size: Side,
        val_shards: Shards | None = None,
        test_shards: Shards | None = None,
        caption_column: Text | Sequence[Text] | None = None,
        lines: Lines = "whole",
        shuffle_window: PositiveInt | None = 100_000,
        resample: bool = False,
        copies_gb: NonNegative = 50.0,
        crop: Literal["center", "random"] = "center",
        val_fraction: Fraction = 0.05,
        test_fraction: Fraction = 0.05,
        seed: Seed = 0,
        max_pixels: PositiveInt = MAX_PIXELS,
        fit: Fit = "crop",
        filters: Filters | None = None,
        buckets: bool = False,
    ):
        check_options(image_size, crop, val_fraction, test_fraction, fit)
        super().__init__(split, image_size, crop, seed, max_pixels, fit, buckets)
        if buckets and resample:
            raise UserError(
                "data.buckets=true needs each sample once in an epoch; leave data.resample=true out"
            )
        self.texts = Texts(columns(None, caption_column, None), lines, filters or None)
        self.columns, self.lines = self.texts.columns, lines
        self.shuffle_window, self.resample = shuffle_window, resample
        named = {"train": shards, "val": val_shards, "test": test_shards}
        lists = {
            name: tuple(addresses(some, "data.shards" if name == "train" else f"data.{name}_shards"))
            for name, some in named.items()
            if some is not None
        }
        largest = min(BYTES_PER_PIXEL * max_pixels + 2**20, 2**31)
        self._place = str(
            shards if isinstance(shards, str) or not isinstance(shards, Sequence) else shards[0]
        )
        options = (int(copies_gb * 2**30), largest, self.texts, max_pixels)
        found = opened(self._place, tuple(lists.items()), *options, val_fraction, test_fraction, seed)
        self.shards, self.rows, self.first, self._digest = found[split]
        self.remember(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self, item: int) -> list[str]:
        while True:
            item = self._readable(item)
            try:
                return self._captions(item)
            except BadPicture as error:
                self._give_up(item, error)

    def picture_of(self, item: int) -> bytes:
        """Of a sample whose caption can be read, too: they are used together or not at all."""
        self._captions(item)
        row = self.rows[item]
        return self._shard(item).read(int(row["picture"]), int(row["bytes"]))

    @property
    def order(self) -> Callable[[int, int, int], ShardOrder] | None:
        """Of an epoch, `order(seed, epoch, items)`; None: a permutation of all."""
        if self.shuffle_window is None and not self.resample:
            return None
        return lambda *which: ShardOrder(self.first, self.shuffle_window, self.resample, *which)

    @cached_property
    def aspects(self) -> np.ndarray:
        """Of a sample that is broken, 1."""
        sizes = measured(self.shards, [self.rows[a:b] for a, b in pairwise(self.first)], self.max_pixels)
        return sizes[:, 0] / sizes[:, 1]

    def fingerprint(self) -> str:
        facts = (
            f"{self.image_size} {self.random_crop and self.seed} {self.fit} {self.lines} {self.columns} "
            f"{self.shuffle_window} {self.resample}"
        )
        if self.texts.filters:
            facts += f" {self.texts.filters}"
        return hashlib.sha256(f"{facts}\n{self._digest}".encode()).hexdigest()[:16]

    def called(self, item: int) -> str:
        shard = int(np.searchsorted(self.first, item, "right")) - 1
        return f"{self.shards[shard].address}, sample {item - int(self.first[shard])} of {self.split}"

    @property
    def place(self) -> str:
        return self._place

    def _shard(self, item: int) -> Shard:
        return self.shards[int(np.searchsorted(self.first, item, "right")) - 1]

    def _captions(self, item: int) -> list[str]:
        """Raises BadPicture where there are none that can be read."""
        return self.texts.captions(self._shard(item), self.rows[item])


@dataclass(frozen=True)
class Texts:
    """How captions are read from samples, and which samples they and their json let pass."""

    columns: Columns
    lines: Lines
    filters: Filters | None

    def captions(self, shard: Shard, row: np.void) -> list[str]:
        """Raises BadPicture where there are none that can be used."""
        content = shard.read(int(row["caption"]), int(row["caption_bytes"]))
        try:
            text = decoded(content)
            found = self._of_json(text) if row["json"] else self._of_text(text)
        except UnicodeDecodeError:
            raise BadPicture(NO_TEXT) from None
        except (ValueError, RecursionError):
            found = []
        if not found:
            raise BadPicture("without a readable caption")
        if self.filters:
            found, why = self.filters.captions(found)
            if why:
                raise BadPicture(why)
        return found

    def check(self, shard: Shard, made: TarIndex) -> None:
        """Raises UserError where the columns that are asked for are in none of a shard's first samples."""
        known: dict[str, None] = {}
        for row in made.rows[:LOOKED_AT]:
            with contextlib.suppress(BadPicture, ValueError, RecursionError):
                held = json.loads(decoded(shard.read(int(row["caption"]), int(row["caption_bytes"]))))
                if isinstance(held, dict):
                    if self.columns.of_captions(list(held)):
                        return
                    known |= dict.fromkeys(held)
        asked = ", ".join(self.columns.captions)
        there = f"there are {shown(', '.join(known))}" if known else "they have no json of columns"
        raise UserError(
            f"data.caption_column={shown(asked)} is in none of the first samples of {shown(shard.address)}; "
            f"{there}"
        )

    def _of_text(self, text: str) -> list[str]:
        if self.lines == "whole":
            text = " ".join(tidy(line) for line in lines_of(text))
            return [text.strip()] if text.strip() else []
        found = [line for line in map(tidy, lines_of(text)) if line]
        return found[:1] if self.lines == "first" else found

    def _of_json(self, text: str) -> list[str]:
        held = json.loads(text)
        names = self.columns.of_captions(list(held)) if isinstance(held, dict) else []
        return [caption for name in names for caption in texts(held[name])]


@dataclass(frozen=True)
class Sieve:
    """Reads the texts of each sample, and as much of its picture as tells the size, where filters ask."""

    texts: Texts
    filters: Filters
    max_pixels: int

    def __call__(self, shard: Shard, made: TarIndex) -> TarIndex:
        out: dict[str, list[str]] = {why: list(names) for why, (_, names) in made.out.items()}
        before = {why: count - len(names) for why, (count, names) in made.out.items()}
        columns: dict[str, None] = {}
        kept = np.zeros(len(made.rows), bool)
        for k, (row, place) in enumerate(zip(made.rows, made.beside, strict=True)):
            try:
                why = self._why(shard, row, place, columns)
            except BadPicture as error:
                why = str(error)
            kept[k] = not why
            if why:
                out.setdefault(why, []).append(f"sample {k}")
        counts = {why: (n + before.get(why, 0), names) for why, (n, names) in counted(out).items()}
        return TarIndex(made.rows[kept], made.digest, counts, made.beside[kept], list(columns))

    def _why(self, shard: Shard, row: np.void, place: np.ndarray, columns: dict[str, None]) -> str:
        """Why a sample is left out; empty where it is used. Adds to the names of `columns`."""
        self.texts.captions(shard, row)
        if self.filters.columns:
            said = self._beside(shard, place)
            columns |= dict.fromkeys(said)
            there = Columns(values=self.filters.columns).of_values(list(said))
            if why := self.filters.values({name: said[known] for name, known in there.items()}):
                return why
        return self.filters.size(*self._size(shard, row)) if self.filters.sizes else ""

    def _beside(self, shard: Shard, place: np.ndarray) -> dict[str, Any]:
        try:
            said = json.loads(decoded(shard.read(*map(int, place)))) if place[1] else {}
        except (ValueError, RecursionError):
            return {}
        return said if isinstance(said, dict) else {}

    def _size(self, shard: Shard, row: np.void) -> tuple[int, int]:
        return size_in(shard, row, self.max_pixels)


def size_in(shard: Shard, row: np.void, max_pixels: int) -> tuple[int, int]:
    """Width and height of a sample's picture, of which the head is read. Raises BadPicture."""
    start, whole = int(row["picture"]), int(row["bytes"])
    if whole > HEAD:
        with contextlib.suppress(BadPicture):  # a long head
            return size_of(shard.read(start, HEAD), max_pixels)
    return size_of(shard.read(start, whole), max_pixels)


def measured(shards: Sequence[Shard], parts: Sequence[np.ndarray], max_pixels: int) -> np.ndarray:
    """Width and height (n, 2) of the pictures of all rows; of what is broken 1, 1."""

    def one(shard: Shard, rows: np.ndarray) -> np.ndarray:
        sizes = np.ones((len(rows), 2), np.int32)
        for k, row in enumerate(rows):
            with contextlib.suppress(BadPicture):
                sizes[k] = size_in(shard, row, max_pixels)
        return sizes

    found = kept_sizes(shards, parts, max_pixels, one)
    return np.concatenate(found) if found else np.ones((0, 2), np.int32)


Part = tuple[list[Shard], np.ndarray, np.ndarray, str]  # shards, rows, first item of each, digest


@lru_cache(maxsize=4)
def opened(
    place: str,
    lists: tuple[tuple[str, tuple[str, ...]], ...],
    copies: int,
    largest: int,
    texts: Texts,
    max_pixels: int,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, Part]:
    """The splits of shards, in one scan for all three."""
    shards = [Shard(address, copies) for _, some in lists for address in some]
    given = {address: name for name, some in lists for address in some}
    if len(given) < len(shards):
        raise UserError(
            "data.shards, data.val_shards and data.test_shards share a shard; give each to one split"
        )
    filters = texts.filters
    sieve = Sieve(texts, filters, max_pixels) if filters else None
    indices = index(shards, largest, not texts.columns.captions, sieve)
    there = [made for made in indices if isinstance(made, TarIndex)]
    if filters and there:
        known = list(dict.fromkeys(name for made in there for name in made.columns))
        filters.check(known, known, place)
    usable = [(s, made) for s, made in zip(shards, indices, strict=True) if isinstance(made, TarIndex)]
    usable = [(shard, made) for shard, made in usable if len(made.rows)]
    out = told(shards, indices)
    if texts.columns.captions and not sieve and usable:
        texts.check(*usable[0])
    if not any(given[shard.address] == "train" for shard, _ in usable):
        raise UserError(
            f"data.shards={shown(place)} has no usable sample. Looked for tar files of NAME.jpg (png, webp) "
            "with NAME.txt or NAME.json" + (f"; {out}" if out else "")
        )
    if out:
        rank_zero_warn(
            f"{shown(place)}: {sum(len(m.rows) for _, m in usable):,} samples are used. Left out: {out}"
        )
    parts, how = _divided(usable, given, {"val": val_fraction, "test": test_fraction}, seed)
    sizes = ", ".join(f"{len(rows):,} {split}" for split, (_, rows, _, _) in parts.items())
    total = sum(len(made.rows) for _, made in usable)
    say(f"{shown(place)}: {len(usable):,} shards with {total:,} samples; {sizes} ({how})")
    return parts


Pairs = Sequence[tuple[Shard, TarIndex]]


def _divided(
    usable: Pairs, given: dict[str, str], fractions: dict[str, float], seed: int
) -> tuple[dict[str, Part], str]:
    """Each split's part, and how they were found."""
    splits = {name: [pair for pair in usable if given[pair[0].address] == name] for name in SPLITS}
    how = [f"{name} as data.{name}_shards" for name in SPLITS[1:] if splits[name]]
    if not how and len(set((folders := _folders([shard.address for shard, _ in usable])).values())) > 1:
        splits = {n: [pair for pair in usable if folders.get(pair[0].address) == n] for n in SPLITS}
        how = ["by folders"]
    pool = splits["train"]
    asked = {name: fractions[name] for name in SPLITS[1:] if not splits[name] and fractions[name] > 0}
    parts = {name: _part(some) for name, some in splits.items()}
    if not asked:
        return parts, ", ".join(how) or "all are to train on"
    samples = sum(len(made.rows) for _, made in pool)
    if samples < FEWEST:
        return parts | dict.fromkeys(asked, parts["train"]), f"fewer than {FEWEST} are in every split"
    if len(pool) * min(asked.values()) >= 1:
        places, by = np.random.default_rng(seed).permutation(len(pool)), "by shards"
    else:
        places = np.concatenate([made.rows["place"] for _, made in pool])
        places, by = (places + seed * 0.6180339887498949) % 1, "by a hash of their keys"
    owner = owners(places, asked)
    for k, name in enumerate(("train", *asked)):
        if by == "by shards":
            parts[name] = _part([pool[i] for i in np.flatnonzero(owner == k)])
        else:
            parts[name] = _part(pool, owner == k)
    return parts, ", ".join([*how, by])


def _folders(places: Sequence[str]) -> dict[str, str]:
    """Splits by the folders below the one that all addresses share."""
    common = 0
    for parts in zip(*(place.split("/")[:-1] for place in places), strict=False):
        if len(set(parts)) > 1:
            break
        common += len(parts[0]) + 1
    found = folder_splits([place[common:] for place in places])
    return {place: found[place[common:]] for place in places if place[common:] in found}


def _part(pairs: Pairs, mask: np.ndarray | None = None) -> Part:
    """The samples of some shards, or those among them that `mask` says."""
    shards, rows, digest, at = [], [], hashlib.sha256(), 0
    for shard, made in pairs:
        some = made.rows if mask is None else made.rows[mask[at : at + len(made.rows)]]
        at += len(made.rows)
        if len(some):
            shards.append(shard)
            rows.append(some)
            digest.update(made.digest.encode() + some.tobytes())
    first = np.cumsum([0, *map(len, rows)])
    return shards, np.concatenate(rows) if rows else np.empty(0, ROW), first, digest.hexdigest()
