"""Hugging Face data sets that are read as they are needed: row groups of parquet files, here or elsewhere.

Nothing is converted or downloaded beforehand. The files' last bytes say where every row is, so a run is
resumed exactly, whatever the number of its workers (a stream of `datasets` forgets what its shuffle buffer
held), and captions are read without their pictures.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import MinLen
from lightning.pytorch.utilities import rank_zero_warn

from dalle.data.caption_tables import Columns
from dalle.data.hf import (
    HUB,
    caption_columns_of,
    files_of,
    files_of_builder,
    image_column_of,
    reader_of,
    split_of,
)
from dalle.data.image_files import MAX_PIXELS, BadPicture, Fit
from dalle.data.imagefolder import sentences
from dalle.data.picture_reader import NAMED, PictureReader
from dalle.data.pictures import check_options, say
from dalle.data.shards import READERS, REMOTE, Shard, addresses, file_system, remote_stamp, tried
from dalle.data.shuffling import ShardOrder
from dalle.data.splits import FEWEST, Split, owners, split_names
from dalle.data.text import shown
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, Places, PositiveInt, Seed, Side, Text

SUFFIXES = (".parquet", ".pq")
SPLITS: tuple[Split, ...] = ("train", "val", "test")
HELD = 2**29  # bytes of row groups that a process keeps
Result = TypeVar("Result")


class ParquetStream(PictureReader):
    """One split of parquet files whose pictures lie in them.

    Args:
        path: a folder, a file, a pattern or a list, here or at an address that fsspec knows
            (`hf://datasets/OWNER/NAME/data/train-*.parquet`); or the name of a data set at the hub.
        shuffle_window: places among which rows are mixed; None: a whole epoch, all over the files.
        (all others): as in `HuggingFace`.

    Raises:
        UserError: no file with rows; says what was found. Later, where a file can no longer be read.
    """

    def __init__(
        self,
        split: Split,
        path: Place | Places,
        image_size: Side,
        subset: Text | None = None,
        image_column: Text | None = None,
        caption_column: Text | Sequence[Text] | None = None,
        template: Text | Annotated[Sequence[Text], MinLen(1)] = "a photo of a {}",
        crop: Literal["center", "random"] = "center",
        val_fraction: Fraction = 0.05,
        test_fraction: Fraction = 0.05,
        seed: Seed = 0,
        max_pixels: PositiveInt = MAX_PIXELS,
        fit: Fit = "crop",
        shuffle_window: PositiveInt | None = 10_000,
    ) -> None:
        check_options(image_size, crop, val_fraction, test_fraction, fit)
        super().__init__(split, image_size, crop, seed, max_pixels, fit)
        several = (caption_column,) if isinstance(caption_column, str) else tuple(caption_column or ())
        given = (str(path),) if isinstance(path, str | Path) else tuple(map(str, path))
        self._place, self.shuffle_window, self.templates = given[0], shuffle_window, sentences(template)
        found = opened(given, subset, val_fraction, test_fraction, seed)
        self.groups, self.rows, self.first = found.parts[split]
        self.columns = Read(found.schema, Columns(image_column, several))
        self.has_classes, self._stamp = self.columns.labels, found.stamp
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
        """Of a row whose caption can be read, too: they are used together or not at all."""
        self._captions(item)
        return self.columns.picture(self._group(item), int(self.rows[item]))

    @property
    def order(self) -> Callable[[int, int, int], ShardOrder] | None:
        """Of an epoch, `order(seed, epoch, items)`; None: a permutation of all."""
        if self.shuffle_window is None:
            return None
        return lambda *which: ShardOrder(self.first, self.shuffle_window, False, *which)

    def fingerprint(self) -> str:
        facts = f"{self.image_size} {self.random_crop and self.seed} {self.fit} {self.columns.names} "
        facts += f"{self.templates} {self.shuffle_window} {self._stamp}\n"
        digest = hashlib.sha256(facts.encode("utf-8", "surrogateescape") + self.rows.tobytes())
        for group in self.groups:
            digest.update(f"{group}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def called(self, item: int) -> str:
        group = self._group(item)
        return f"{group.address}, row {int(self.rows[item])} of row group {group.number}"

    @property
    def place(self) -> str:
        return self._place

    def _group(self, item: int) -> "Group":
        return self.groups[int(np.searchsorted(self.first, item, "right")) - 1]

    def _captions(self, item: int) -> list[str]:
        found = self.columns.captions(self._group(item), int(self.rows[item]), self.templates)
        if not found:
            raise BadPicture("without a readable caption")
        return found


@dataclass(frozen=True)
class Group:
    """Rows of a file that are read together."""

    address: str
    number: int
    size: int


Part = tuple[list[Group], np.ndarray, np.ndarray]  # groups, rows in them, first item of each group


@dataclass(frozen=True)
class Opened:
    schema: Any
    parts: dict[str, Part]
    stamp: str


class Read:
    """Which columns are read, and what their cells are."""

    def __init__(self, schema: Any, columns: Columns) -> None:
        import datasets

        features = datasets.Features.from_arrow_schema(schema)
        self.image = image_column_of(features, columns)
        self.texts = caption_columns_of(features, columns, self.image)
        self.readers = [reader_of(features[name]) for name in self.texts]
        self.labels = all(isinstance(features[name], datasets.ClassLabel) for name in self.texts)
        self.names = (self.image, *self.texts)

    def captions(self, group: Group, row: int, templates: Sequence[str]) -> list[str]:
        table = table_of(group, tuple(self.texts))
        cells = [table.column(name)[row].as_py() for name in self.texts]
        return [
            text for read, cell in zip(self.readers, cells, strict=True) for text in read(cell, templates)
        ]

    def picture(self, group: Group, row: int) -> bytes:
        held = table_of(group, (self.image,)).column(self.image)[row].as_py()
        held = held.get("bytes") if isinstance(held, dict) else held
        if isinstance(held, str):
            raise BadPicture("a path or an address, no picture (leave data.streaming=true out)")
        if not isinstance(held, bytes) or not held:
            raise BadPicture("empty")
        return held


@lru_cache(maxsize=4)
def opened(
    given: tuple[str, ...], subset: str | None, val_fraction: float, test_fraction: float, seed: int
) -> Opened:
    """The splits of some files, in one look at all of them."""
    files = found_files(given, subset)
    everything = list(chain(*files.values()))
    remote_stamp.cache_clear()
    with ThreadPoolExecutor(READERS) as pool:
        footers = dict(zip(everything, pool.map(footer, everything), strict=True))
    whole = {file: made for file, made in footers.items() if not isinstance(made, str)}
    out = {file: made for file, made in footers.items() if isinstance(made, str)}
    if not whole:
        file, why = next(iter(out.items()))
        raise UserError(f"data.path={shown(given[0])} has no usable parquet file; {shown(file)} is {why}")
    schema = next(iter(whole.values())).schema
    for file, made in list(whole.items()):
        if lacking := [name for name in schema.names if name not in made.schema.names]:
            out[file] = f"without the column {shown(lacking[0])}, which others have"
            del whole[file]
    if out:
        named = ", ".join(f"{shown(file)}: {why}" for file, why in list(out.items())[:NAMED])
        rank_zero_warn(f"{shown(given[0])}: {len(out)} of {len(footers)} files are left out ({named})")
    groups: dict[Split, list[Group]] = {
        split: [Group(f, k, n) for f in some if f in whole for k, n in enumerate(whole[f].sizes) if n]
        for split, some in files.items()
    }
    if not groups["train"]:
        raise UserError(f"data.path={shown(given[0])} holds no rows to train on")
    parts, how = divided(groups, {"val": val_fraction, "test": test_fraction}, seed)
    sizes = ", ".join(f"{len(rows):,} {split}" for split, (_, rows, _) in parts.items())
    say(f"{shown(given[0])}: {len(whole):,} parquet files, read as they are needed; {sizes} ({how})")
    return Opened(schema, parts, " ".join(made.stamp for made in whole.values()))


def found_files(given: Sequence[str], subset: str | None) -> dict[Split, list[str]]:
    """Parquet files by their split."""
    here = [place for place in given if not REMOTE.match(place)]
    if (
        len(given) == 1
        and here
        and not os.path.exists(os.path.expanduser(given[0]))
        and HUB.fullmatch(given[0])
    ):
        named = files_of_builder(given[0], subset)
        if odd := [file for file in chain(*named.values()) if not file.lower().endswith(SUFFIXES)]:
            raise UserError(
                f"data.streaming=true reads parquet, and {given[0]} has {shown(odd[0])}; leave it out"
            )
        kinds = split_names(named)
        return {
            split: [f for n, fs in named.items() if kinds.get(n) == split for f in fs] for split in SPLITS
        }
    files: list[str] = []
    for place in given:
        if REMOTE.match(place):
            files += addresses(place, "data.path", SUFFIXES)
        else:
            files += map(os.path.abspath, files_of([os.path.expanduser(place)], SUFFIXES))
    files = list(dict.fromkeys(files))
    if odd := [file for file in files if not file.lower().partition("?")[0].endswith(SUFFIXES)]:
        raise UserError(f"data.streaming=true reads parquet, which {shown(odd[0])} is not; leave it out")
    if not files:
        raise UserError(f"data.path={shown(given[0])}: there are no parquet files")
    folders = [file.split("/")[:-1] for file in files]
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))
    words = [split_of("/".join(file.split("/")[shared:])) for file in files]
    if "train" not in words or None in words:
        return {"train": files, "val": [], "test": []}
    return {split: [f for f, word in zip(files, words, strict=True) if word == split] for split in SPLITS}


@dataclass(frozen=True)
class Footer:
    schema: Any
    sizes: list[int]  # rows of each row group
    stamp: str


def footer(file: str) -> Footer | str:
    """What a file's end says of it, or why it says nothing."""
    from pyarrow import ArrowInvalid

    try:
        stamp = Shard(file, 0).stamp()
        with reading(file, lambda: _file(file)) as held:
            sizes = [held.metadata.row_group(k).num_rows for k in range(held.num_row_groups)]
            return Footer(held.schema_arrow, sizes, stamp)
    except FileNotFoundError:
        return "not there"
    except ArrowInvalid:
        return "no whole parquet file"
    except OSError as error:
        return f"not readable ({error.strerror or error})"


def divided(
    groups: Mapping[Split, Sequence[Group]], fractions: Mapping[Split, float], seed: int
) -> tuple[dict[str, Part], str]:
    """Each split's rows, and how they were found."""
    parts: dict[str, Part] = {split: _part(some) for split, some in groups.items()}
    how = ["by files"] if groups["val"] or groups["test"] else []
    asked = {split: share for split, share in fractions.items() if not groups[split] and share > 0}
    pool = groups["train"]
    if not asked:
        return parts, ", ".join(how) or "all are to train on"
    total = sum(group.size for group in pool)
    if total < FEWEST:
        return {**parts, **dict.fromkeys(asked, parts["train"])}, f"fewer than {FEWEST} are in every split"
    by_groups = len(pool) * min(asked.values()) >= 1
    rng = np.random.default_rng(seed)
    owner = owners(rng.permutation(len(pool) if by_groups else total), asked)
    for k, split in enumerate(("train", *asked)):
        if by_groups:
            parts[split] = _part([pool[i] for i in np.flatnonzero(owner == k).tolist()])
        else:
            parts[split] = _part(pool, owner == k)
    return parts, ", ".join([*how, "by row groups" if by_groups else "by a draw of rows"])


def _part(groups: Sequence[Group], mask: np.ndarray | None = None) -> Part:
    """The rows of some groups, or those among them that `mask` says."""
    kept: list[Group] = []
    rows: list[np.ndarray] = []
    at = 0
    for group in groups:
        some = np.arange(group.size, dtype=np.int32)
        if mask is not None:
            some, at = some[mask[at : at + group.size]], at + group.size
        if len(some):
            kept.append(group)
            rows.append(some)
    first = np.cumsum([0, *map(len, rows)])
    return kept, np.concatenate(rows) if rows else np.empty(0, np.int32), first


def reading(file: str, read: Callable[[], Result]) -> Result:
    """What reading gives: from elsewhere as `tried`."""
    return tried(file, read) if REMOTE.match(file) else read()


def _file(file: str) -> Any:
    from pyarrow import parquet

    if not REMOTE.match(file):
        return parquet.ParquetFile(file, memory_map=True)
    files, path = file_system(file)
    return parquet.ParquetFile(files.open(path, cache_type="none"), pre_buffer=True)


class Held:
    """Tables that were read last, in so many bytes; each process has its own."""

    def __init__(self) -> None:
        self.tables: OrderedDict[Any, Any] = OrderedDict()
        self.bytes, self.lock = 0, Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self.lock:  # a file is read by one thread at a time
            if key in self.tables:
                self.tables.move_to_end(key)
                return self.tables[key]
            made = self.tables[key] = make()
            self.bytes += made.nbytes
            while self.bytes > HELD and len(self.tables) > 1:
                self.bytes -= self.tables.popitem(last=False)[1].nbytes
            return made


@lru_cache(maxsize=1)
def _held(process: int) -> Held:
    return Held()


@lru_cache(maxsize=32)
def _open(process: int, file: str) -> Any:
    return _file(file)


def table_of(group: Group, columns: tuple[str, ...]) -> Any:
    """Columns of a row group. Raises UserError where they cannot be had any more."""
    file = group.address

    def read() -> Any:
        try:
            return _open(os.getpid(), file).read_row_group(group.number, columns=list(columns))
        except Exception:
            _open.cache_clear()
            raise

    try:
        return _held(os.getpid()).get((group, columns), lambda: reading(file, read))
    except FileNotFoundError:
        raise UserError(f"{shown(file)} is no longer there; with it, resume=true goes on") from None
    except (OSError, ValueError) as error:  # Arrow's are such
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{shown(file)} cannot be read ({why}); a run goes on with resume=true") from None
