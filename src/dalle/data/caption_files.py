"""Where the captions of a folder of pictures come from: files beside them, or the names of class folders.

Both are frozen dataclasses so that equal ones share one scan of the folder. Names are POSIX paths below the
root.
"""

import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from dalle.data.caption_tables import SUFFIXES, Columns, NotATable, Table, read_table
from dalle.data.splits import folder_splits, split_folder, split_names
from dalle.data.text import NO_TEXT, lines, read_text, shown, tidy
from dalle.data.zip_files import Archive, Member
from dalle.errors import UserError

TABLES = ("metadata", "captions", "caption", "annotations", "labels", "prompts")  # usual names, lower case
TEXTS = (".txt", ".caption")
LARGEST_TEXT = 2**20  # bytes of a picture's text file; what is larger is no caption
SHOWN = 8  # class names in the first line
UNPACK = "have to be unpacked first"
FOREIGN = {  # endings of files that a folder is not read from -> what they are, and what reads them
    "-ubyte": ("idx", "data=idx data.root={root} reads"),
    "-ubyte.gz": ("idx", "data=idx data.root={root} reads"),
    ".parquet": ("parquet", "data=table data.path={root} reads"),
    ".arrow": ("arrow", "data=hf data.path={root} reads"),
    ".tar": ("WebDataset (tar)", "data=webdataset data.shards={root}/{name} reads"),
    ".zip": ("zip", "data=folder data.root={root}/{name} reads"),
    ".tgz": ("tar.gz", UNPACK),
    ".tar.gz": ("tar.gz", UNPACK),
    ".csv.gz": ("packed table", UNPACK),
    ".tsv.gz": ("packed table", UNPACK),
    ".jsonl.gz": ("packed table", UNPACK),
}
GENERIC = re.compile(r"(image|img|picture|photo)s?", re.IGNORECASE)  # folders that name no class
TEXT_FOLDER = re.compile(r"(caption|text|txt|prompt|description)s?", re.IGNORECASE)  # beside that of pictures
ARTICLE = re.compile(r"\b(a)n?(?= \{\})", re.IGNORECASE)
LIKE_YOU = (
    r"eu|ewe|one\b|once\b|ufo|uk|uni[cftv]|us[aeu]|ut[ei]"  # begin with a consonant that is not written
)
AN = re.compile(rf"(?!{LIKE_YOU})[aeiou]|heir|honest|hono|hour", re.IGNORECASE)

Root = Path | Archive  # root / name can be read


@dataclass
class Found:
    """Captions of pictures, and what is to be said about where they are from."""

    captions: dict[str, list[str]]
    origin: str = ""
    splits: dict[str, str] = field(default_factory=dict)  # as tables give them
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # why -> what
    unread: list[str] = field(
        default_factory=list
    )  # files that may hold captions, and why they were not read
    sure_splits: bool = False  # they count before those of folders
    values: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # what tables say beside
    columns: list[str] = field(default_factory=list)  # all names of theirs


@dataclass(frozen=True)
class CaptionFiles:
    """Captions from tables (`metadata.jsonl`, `captions.csv` ...), else from a .txt of the picture's name.

    Args:
        table: only this file; None = all of the usual names in the root and below, and .txt; where these give
            nothing, any other table that names pictures.
        stamp: modification time of `table`, which tells one version of it from another.
        columns: of tables.
        first_line: of a .txt only the first line is a caption; else every line is one.
    """

    table: str | None = None
    stamp: int = 0
    columns: Columns = field(default_factory=Columns)
    first_line: bool = False

    wanted = "captions in a .txt of the same name, there or in captions/, in metadata.jsonl or captions.csv"

    def __call__(self, root: Root, pictures: Sequence[str], files: Mapping[str, int]) -> Found:
        """Captions of each picture that has some. `files`: all names, with their sizes in bytes."""
        reader = _Reader(root, Names(str(root), pictures), self.columns)
        if self.table is not None:
            try:
                reader.read(root / self.table, "")
            except NotATable as error:
                raise UserError(f"{self.table} is {error}") from None
            return reader.found(0)
        beside = texts_beside(pictures, files)
        beside |= texts_across([name for name in pictures if name not in beside], files)
        claimed = set(beside.values())
        kinds: dict[bool, list[str]] = {True: [], False: []}
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and name not in claimed:
                stem = PurePosixPath(name).stem.lower()
                kinds[stem in TABLES or bool(split_names([stem]))].append(name)
        reader.try_all(kinds[True])
        texts, other = dict[str, list[str]](), list[str]()
        for name, text in beside.items():
            if not reader.captions.get(name):
                try:
                    path = f"{root}/{text}" if isinstance(root, Path) else root / text
                    texts[name] = self._lines(path, files[text])
                except UnicodeDecodeError:
                    other.append(name)
        reader.captions |= texts
        if not any(reader.captions.values()):
            reader.try_all(kinds[False])
        if other := [name for name in other if not reader.captions.get(name)]:
            reader.left_out[NO_TEXT] += other
        if not any(reader.captions.values()):
            reader.unread += foreign(None if isinstance(root, Archive) else str(root), files)
        return reader.found(sum(map(bool, texts.values())))

    def _lines(self, path: str | Member, size: int) -> list[str]:
        """The captions in a text file. One odd file among thousands has none; its picture is named.

        Raises:
            UnicodeDecodeError: they are in another encoding.
        """
        try:
            text = read_text(path) if size <= LARGEST_TEXT else ""
        except OSError:
            return []
        found = [caption for line in lines(text) if (caption := tidy(line))]
        return found[:1] if self.first_line else found


def foreign(root: str | None, files: Iterable[str]) -> list[str]:
    """What a folder holds in formats that other choices of `data` read, and by which settings.

    Args:
        root: the folder; None: an archive, which has to be unpacked for them.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(files):
        if ending := next((end for end in reversed(FOREIGN) if name.lower().endswith(end)), None):
            found[ending].append(name)
    said = []
    for ending, names in found.items():
        kind, line = FOREIGN[ending]
        several = posixpath.join(posixpath.dirname(names[0]), f"*{ending}")
        name = shown(names[0] if len(names) == 1 or kind == "zip" else several)
        said.append(
            f"{len(names)} {kind} files, which {line.format(root=shown(root), name=name) if root else UNPACK}"
        )
    return said


def texts_beside(pictures: Sequence[str], files: Iterable[str]) -> dict[str, str]:
    """The text file of each picture that has one: `i.txt` or `i.jpg.txt` for `i.jpg`, whatever their case."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in files:
        if name.lower().endswith(TEXTS):
            found[_key(name)].append(name)
    beside = {}
    for picture in pictures if found else ():
        stem = posixpath.splitext(picture)[0]
        wanted = (_key(name + suffix) for suffix in TEXTS for name in (stem, picture))
        if texts := next((found[key] for key in wanted if key in found), None):
            beside[picture] = min(texts, key=lambda text: (not text.startswith(stem), text))
    return beside


def texts_across(pictures: Sequence[str], files: Iterable[str]) -> dict[str, str]:
    """The text file of each picture whose texts have a folder of their own: `captions/a/i.txt` for
    `images/a/i.jpg`, `train/i.jpg` or `i.jpg`. One that several folders have is nobody's.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name in files if pictures else ():
        if name.lower().endswith(TEXTS):
            for key in _without(posixpath.splitext(name)[0], TEXT_FOLDER):
                found[key].add(name)
    across: dict[str, str] = {}
    for picture in pictures if found else ():
        stem = posixpath.splitext(picture)[0]
        keys = [key for name in (stem, picture) for key in (_key(name), *_without(name, GENERIC))]
        texts = set().union(*(found.get(key, ()) for key in keys))
        if len(texts) == 1:
            across[picture] = texts.pop()
    used = Counter(across.values())
    return {picture: text for picture, text in across.items() if used[text] == 1}


def _without(name: str, folder: re.Pattern[str]) -> list[str]:
    """The key of a name without a folder that is called so; several where there are several."""
    *folders, last = PurePosixPath(name).parts
    places = [i for i, part in enumerate(folders) if folder.fullmatch(part)]
    return [_key(posixpath.join(*folders[:i], *folders[i + 1 :], last)) for i in places]


class _Reader:
    """Collects what tables say of pictures."""

    def __init__(self, root: Root, names: "Names", columns: Columns):
        self.root, self.names, self.columns = root, names, columns
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.read_from: dict[str, list[str]] = {}  # table -> columns
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self.unread: list[str] = []
        self.values: dict[str, Mapping[str, Any]] = {}
        self.names_there: list[str] = []

    def try_all(self, tables: Sequence[str]) -> None:
        for name in tables:
            try:
                self.read(self.root / name, posixpath.dirname(name))
            except NotATable as error:
                self.unread.append(f"{shown(name)} is {error}")

    def read(self, path: Path | Member, folder: str) -> None:
        """Adds a table's captions; those of several tables add up, without repeating one another."""
        table = read_table(path, self.columns, lambda name: bool(self.names.find(name, folder)))
        new: dict[str, list[str]] = defaultdict(list)
        shift = self.names.shift([row.picture for row in table.rows], folder)
        for row in table.rows:
            found = self.names.find(row.picture, folder, shift)
            if len(found) == 1:
                new[found[0]] += row.captions
                if row.values:
                    self.values[found[0]] = {**self.values.get(found[0], {}), **row.values}
                if split := row.split or next(iter(split_names([path.stem])), None):
                    self.splits[found[0]] = split
            elif found:
                why = f"of a name that several have and {shown(path.name)} does not tell apart"
                self.left_out[why] += [name for name in found if name not in self.left_out[why]]
            else:
                self.left_out["listed but not there"].append(row.picture)
        for name, some in new.items():
            known = self.captions.setdefault(name, [])
            known += [text for text in some if text not in known] if known else some
        if new:
            self.read_from[path.name] = table.columns
            self.names_there += [name for name in table.names if name not in self.names_there]
            self._broken(path, table)

    def _broken(self, path: Path | Member, table: Table) -> None:
        if table.broken:
            why = f"lines of {shown(path.name)} without a picture's name and a caption column"
            self.left_out[why] += [f"line {number}" for number in table.broken]

    def found(self, texts: int) -> Found:
        tables = [f"{shown(name)} ({', '.join(map(shown, used))})" for name, used in self.read_from.items()]
        if len(tables) > 2:
            tables = [f"{len(tables)} tables like {tables[0]}"]
        origin = " and ".join([*tables, *([f"{texts} text files"] if texts else [])])
        kinds = split_names(set(self.splits.values()))
        splits = {name: kinds[split] for name, split in self.splits.items() if split in kinds}
        if len(set(splits.values())) < 2 or "train" not in splits.values():
            splits = {}
        missing = dict.fromkeys(self.left_out.pop("listed but not there", ()))
        left_out = {**self.left_out, **({"listed but not there": list(missing)} if missing else {})}
        captions = {k: v for k, v in self.captions.items() if v}
        return Found(
            captions, origin, splits, left_out, self.unread, values=self.values, columns=self.names_there
        )


class Names:
    """Finds the pictures that a table means, however it writes their names."""

    def __init__(self, root: str, pictures: Sequence[str]):
        self.pictures = set(pictures)
        self.roots = {f"{path}/" for path in (os.path.abspath(root), os.path.realpath(root), root)}

    @cached_property
    def _by_key(self) -> dict[str, list[str]]:
        """Pictures by their names without folders, also without extension."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.pictures):
            last = _key(posixpath.basename(name))
            found[last].append(name)
            found[posixpath.splitext(last)[0]].append(name)
        return found

    def find(self, written: str, folder: str, shift: str = "") -> list[str]:
        """The picture meant, or several among which it cannot be told.

        Args:
            folder: that of the table.
            shift: folders at the front that all names of the table have, and that may not be here.
        """
        for name in dict.fromkeys((written, re.sub(r"#\d+$", "", written), unquote(written))):
            local = self._local(name)
            for path in (posixpath.normpath(posixpath.join(folder, local)), posixpath.normpath(local)):
                if path in self.pictures:
                    return [path]
            parts = PurePosixPath(_key(local)).parts
            candidates = self._by_key.get(parts[-1], []) if parts else []
            needed = max(1, len(parts) - len(PurePosixPath(shift).parts))
            best = [(self._common(name, parts), name) for name in candidates]
            best = [(common, name) for common, name in best if common >= needed]
            below = [(common, name) for common, name in best if folder and name.startswith(f"{folder}/")]
            if best := below or best:
                return [name for common, name in best if common == max(best)[0]]
        return []

    def shift(self, written: Sequence[str], folder: str) -> str:
        folders = {posixpath.dirname(self._local(name)) for name in written}
        absolute = {path.startswith("/") for path in folders}
        return posixpath.commonpath(folders) if len(absolute) == 1 else ""

    def _local(self, name: str) -> str:
        name = name.replace("\\", "/").removeprefix("file://")
        return next((name.removeprefix(root) for root in self.roots if name.startswith(root)), name)

    @staticmethod
    def _common(name: str, parts: Sequence[str]) -> int:
        """How many parts at the end of a name are those written; the last of them is."""
        own = PurePosixPath(_key(name)).parts
        pairs = zip(reversed(own[:-1]), reversed(parts[:-1]), strict=False)
        return 1 + next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(own), len(parts)) - 1)


def _key(name: str) -> str:
    """Names that differ in case, or in how their accents are written, are taken for one."""
    return unicodedata.normalize("NFC", name).casefold()


@dataclass(frozen=True)
class ClassNames:
    """Captions from the folder of a picture: "a photo of a {}", `red_panda/` -> "a photo of a red panda".

    A folder with pictures of its own is a class, whatever lies below it; of `animals/cat`, `animals/dog` the
    deepest folders are. "a {}" becomes "an {}" where English wants it.
    """

    templates: tuple[str, ...]

    wanted = "pictures in one folder per class"

    def __call__(self, root: Root, pictures: Sequence[str], files: Mapping[str, int]) -> Found:
        given = folder_splits(pictures)
        folders = {name: PurePosixPath(name).parts[:-1] for name in pictures}
        for name in given:
            parts = list(folders[name])
            parts.remove(str(split_folder(name)))
            folders[name] = tuple(parts)
        classes = {name: self._readable(place) for name, place in _classes(folders).items()}
        some = sorted(set(classes.values()))
        listed = ", ".join(map(shown, some[:SHOWN])) + (", ..." if len(some) > SHOWN else "")
        captions = {
            name: [label_caption(template, word) for template in self.templates]
            for name, word in classes.items()
        }
        return Found(captions, f"the names of {len(some)} class folders: {listed}")

    @staticmethod
    def _readable(place: tuple[str, ...]) -> str:
        named = [part for part in place if not GENERIC.fullmatch(part)] or place
        return tidy(named[-1].replace("_", " "))


def label_caption(template: str, word: str) -> str:
    """A class name in its sentence, with the article that English wants."""
    article = "n" if AN.match(word) else ""
    if word[:1].isascii() and word[:1].isalpha():
        template = ARTICLE.sub(rf"\g<1>{article}", template)
    return template.replace("{}", word)


def _classes(folders: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The class folder of each picture that lies in one."""
    holding = set(folders.values())
    below: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for place in holding:
        for depth in range(len(place)):
            below[place[:depth]].add(place[depth])
    flat = any(len(place) == 1 for place in holding)  # then a folder with one other in it is a class, too

    def of(place: tuple[str, ...]) -> tuple[str, ...]:
        for depth in range(1, len(place)):
            if place[:depth] in holding or (flat and len(below[place[:depth]]) == 1):
                return place[:depth]
        return place

    return {name: of(place) for name, place in folders.items() if place}
