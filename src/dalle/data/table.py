"""Tables that name pictures, or hold them: parquet, CSV and TSV of any dialect, JSON lines, as a `Source`.

Unlike in `Folder`, the table says what belongs to the set: pictures may lie anywhere, and what else is in
their folders is not looked at.
"""

import os
import re
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from dalle.data.caption_files import TABLES, Names
from dalle.data.caption_tables import PARQUET, SUFFIXES, Columns, NotATable, Row, holds_pictures, read_table
from dalle.data.file_listing import list_files
from dalle.data.filters import Filters
from dalle.data.folder import columns
from dalle.data.hf import files_of, rows_of, split_of
from dalle.data.image_files import MAX_PIXELS, Fit
from dalle.data.image_files import SUFFIXES as PICTURES
from dalle.data.picture_index import Stamp
from dalle.data.pictures import Catalogue, Pictures
from dalle.data.splits import Split, split_names
from dalle.data.text import shown
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, Places, PositiveInt, Seed, Side, Text

ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://|data:image/", re.IGNORECASE)
IN_FOLDERS = (".csv", ".tsv", ".jsonl", ".ndjson")  # of a folder; a .txt there may be any text
ADDRESSED = "named by an address: download them first, as img2dataset does (data=webdataset reads its shards)"


class Table(Pictures):
    """The pictures that tables name or hold.

    Args:
        path: a table, a pattern (`data/*.parquet`), a folder of tables, or a list of such. Files called
            `train`, `val`, `test`, or a column `split`, say the splits.
        root: the folder that pictures' paths start from; None: that of their table.
        image_column, caption_column: None: those of the usual names.
        (all others): as in `Folder`.
    """

    def __init__(
        self,
        split: Split,
        path: Place | Places,
        image_size: Side,
        root: Place | None = None,
        image_column: Text | None = None,
        caption_column: Text | Sequence[Text] | None = None,
        crop: Literal["center", "random"] = "center",
        val_fraction: Fraction = 0.05,
        test_fraction: Fraction = 0.05,
        seed: Seed = 0,
        max_pixels: PositiveInt = MAX_PIXELS,
        fit: Fit = "crop",
        filters: Filters | None = None,
        buckets: bool = False,
    ):
        wanted = columns(image_column, caption_column, filters)
        files = tables_of(path)
        packed = [file for file in files if file.suffix.lower() in PARQUET and holds_pictures(file, wanted)]
        if packed and len(packed) < len(files):
            raise UserError(
                f"data.path={path} mixes tables that hold pictures ({shown(packed[0].name)}) with others; "
                "give one kind"
            )
        if packed:
            table = rows_of([str(file) for file in files], None, wanted, ("a photo of a {}",))
        else:
            table = table_pictures(files, root, wanted)
        super().__init__(
            split,
            table,
            image_size,
            crop,
            val_fraction,
            test_fraction,
            seed,
            max_pixels,
            fit,
            filters,
            buckets,
        )


def tables_of(path: str | Path | Sequence[str]) -> list[Path]:
    """The tables that a setting names; of a folder its parquet files, or else its other tables."""
    given = [str(path)] if isinstance(path, str | Path) else [str(one) for one in path]
    places = [os.path.expanduser(one) for one in given]
    kinds = (PARQUET, IN_FOLDERS, tuple(f"{name}{suffix}" for name in TABLES for suffix in SUFFIXES))
    files = next((found for kind in kinds if (found := files_of(places, kind))), [])
    if not files:
        raise UserError(f"data.path={shown(given[0])} holds no table ({', '.join(SUFFIXES)})")
    return [Path(file) for file in files]


def table_pictures(files: Sequence[Path], root: str | Path | None, columns: Columns) -> "TablePictures":
    if root is not None and not Path(root).expanduser().is_dir():
        raise UserError(f"data.root={root} is no folder; give that from which the table's paths start")
    stamps = tuple((status.st_size, status.st_mtime_ns) for status in (file.stat() for file in files))
    return TablePictures(tuple(files), stamps, Path(root).expanduser() if root else None, columns)


@dataclass(frozen=True)
class TablePictures:
    """Tables of paths as a `Collection`."""

    files: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    root: Path | None
    columns: Columns

    setting = "data.path"

    @property
    def place(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.base)

    @cached_property
    def base(self) -> Path:
        """What names are relative to."""
        return self.root or Path(os.path.commonpath([file.absolute().parent for file in self.files]))

    def content(self, name: str) -> Path | bytes:
        return self.base / name

    def find(self) -> Catalogue:
        found = _Found(self)
        for file in self.files:
            found.read(file)
        kinds = split_names(set(found.splits.values()))
        given = {name: kinds[split] for name, split in found.splits.items() if split in kinds}
        if len(set(given.values())) < 2 or "train" not in given.values():
            given = {}
        origin = [f"{shown(name)} ({', '.join(map(shown, used))})" for name, used in found.read_from.items()]
        if len(origin) > 2:
            origin = [f"{len(origin)} tables like {origin[0]}"]
        return Catalogue(
            found.pictures,
            found.captions,
            " and ".join(origin),
            given,
            {why: list(dict.fromkeys(some)) for why, some in found.left_out.items()},
            unread=found.unread,
            values=found.values,
            columns=found.columns,
            wanted="rows with a picture's path and a caption",
        )


class _Found:
    """Collects what tables say."""

    def __init__(self, table: TablePictures) -> None:
        self.table = table
        self.pictures: dict[str, Stamp] = {}
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.read_from: dict[str, list[str]] = {}
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self.unread: list[str] = []
        self.values: dict[str, Mapping[str, Any]] = {}
        self.columns: list[str] = []
        self._prefixes: dict[Path, tuple[str, str]] = {}
        self.at: dict[str, tuple[str, Stamp] | None] = {}  # as written -> name and stamp

    def read(self, file: Path) -> None:
        folder = self.table.root or file.absolute().parent
        try:
            table = read_table(file, self.table.columns, lambda name: self.locate(name, folder) is not None)
        except NotATable as error:
            if len(self.table.files) == 1:
                raise UserError(f"{shown(str(file))} is {error}") from None
            self.unread.append(f"{shown(file.name)} is {error}")
            return
        split = split_of(os.path.relpath(file, self.table.base) if not self.table.root else file.name)
        gone: list[Row] = []
        for row in table.rows:
            if place := self.locate(row.picture, folder):
                self.add(*place, row, split)
            else:
                gone.append(row)
        self.search(gone, folder, split)
        self.read_from[file.name] = table.columns
        self.columns += [name for name in table.names if name not in self.columns]
        if table.broken:
            why = f"lines of {shown(file.name)} without a picture's name and a caption column"
            self.left_out[why] += [f"line {number}" for number in table.broken]

    def add(self, name: str, stamp: Stamp, row: Row, split: str | None) -> None:
        self.pictures[name] = stamp
        known = self.captions.setdefault(name, [])
        known += [caption for caption in row.captions if caption not in known]
        if row.values:
            self.values[name] = {**self.values.get(name, {}), **row.values}
        if row.split or split:
            self.splits[name] = row.split or split or ""

    def search(self, rows: Sequence[Row], folder: Path, split: str | None) -> None:
        """Pictures whose paths lead nowhere may have been moved together: they are looked for by name."""
        for row in rows:
            if ADDRESS.match(row.picture):
                self.left_out[ADDRESSED].append(row.picture)
        rows = [row for row in rows if not ADDRESS.match(row.picture)]
        if not rows:
            return
        listed = [n for n, _, _ in list_files(folder).files if n.lower().endswith(PICTURES)]
        names = Names(str(folder), listed)
        shift = names.shift([row.picture for row in rows], "")
        for row in rows:
            found = names.find(row.picture, "", shift)
            place = self.locate(found[0], folder) if len(found) == 1 else None
            if place:
                self.add(*place, row, split)
            else:
                why = "of a name that several have" if len(found) > 1 else "listed but not there"
                self.left_out[why].append(row.picture)

    def locate(self, written: str, folder: Path) -> tuple[str, Stamp] | None:
        """The file that a path means: its name below the base, and its stamp."""
        if (key := f"{folder}\0{written}") not in self.at:
            self.at[key] = self._locate(written, folder)
        return self.at[key]

    def _locate(self, written: str, folder: Path) -> tuple[str, Stamp] | None:
        if ADDRESS.match(written):
            return None
        ways = [written, written.replace("\\", "/"), re.sub(r"#\d+$", "", written), unquote(written)]
        if written.startswith("file://"):
            ways = [unquote(written.removeprefix("file://"))]
        for way in dict.fromkeys(ways):
            try:
                status = os.stat(os.path.join(folder, way))
            except (OSError, ValueError):  # ValueError: a NUL
                continue
            if stat.S_ISDIR(status.st_mode):
                continue
            return self._name(way, folder), (status.st_size, status.st_mtime_ns)
        return None

    def _name(self, way: str, folder: Path) -> str:
        """Relative to the base where the table says so, so that names stay when all of it moves."""
        base, before = self.prefixes(folder)
        way = way.removeprefix(base)
        if not os.path.isabs(way):
            way = before + way.removeprefix("./")
        return way.replace("//", "/")

    def prefixes(self, folder: Path) -> tuple[str, str]:
        """The base as paths begin with it, and what leads from it to a folder."""
        if folder not in self._prefixes:
            base = os.path.join(os.path.abspath(self.table.base), "")
            before = os.path.relpath(folder, base)
            self._prefixes[folder] = base, "" if before == "." else f"{before}/"
        return self._prefixes[folder]
