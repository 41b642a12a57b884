"""Where the captions of a folder of pictures come from: files beside them, or the names of class folders.

Both are frozen dataclasses so that equal ones share one scan of the folder. Names are POSIX paths below the
root.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dalle.errors import UserError

TABLES = ("metadata.jsonl", "captions.csv", "metadata.csv")
FILE_KEYS = ("file_name", "file", "image")
CAPTION_KEYS = ("text", "caption", "captions")
SPLITS = {
    "train": ("train",),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}  # names of their folders


@dataclass(frozen=True)
class CaptionFiles:
    """Captions from `metadata.jsonl` or `captions.csv`, else from a .txt of the picture's name, one per line.

    Args:
        table: only this .jsonl or .csv file; None = all of the usual names in the root and below, and .txt.
        stamp: modification time of `table`, which tells one version of it from another.
    """

    table: str | None = None
    stamp: int = 0

    wanted = "captions in a .txt of the same name, in metadata.jsonl or in captions.csv"

    def __call__(self, root: Path, pictures: Sequence[str], files: Iterable[str]) -> dict[str, list[str]]:
        """Captions of each picture that has some; a name not among `pictures` was listed but is not there."""
        found: dict[str, list[str]] = defaultdict(list)
        if self.table is not None:
            _read_table(Path(self.table), "", found)
            return found
        files = set(files)
        for name in sorted(files):
            if PurePosixPath(name).name in TABLES:
                _read_table(root / name, str(PurePosixPath(name).parent), found)
        for name in pictures:
            text = str(PurePosixPath(name).with_suffix(".txt"))
            if not found.get(name) and text in files:
                found[name] = _lines(root / text)
        return found


@dataclass(frozen=True)
class ClassNames:
    """Captions from the folder of a picture: "a photo of a {}", `red_panda/` -> "a photo of a red panda"."""

    templates: tuple[str, ...]

    wanted = "pictures in one folder per class"

    def __call__(self, root: Path, pictures: Sequence[str], files: Iterable[str]) -> dict[str, list[str]]:
        folders = {name: PurePosixPath(name).parts[:-1] for name in pictures}
        given = uses_split_folders(pictures)
        classes = {name: parts[1:] if given else parts for name, parts in folders.items()}
        return {
            name: [template.format(parts[0].replace("_", " ")) for template in self.templates]
            for name, parts in classes.items()
            if parts
        }


def uses_split_folders(names: Iterable[str]) -> bool:
    """Whether pictures lie in train/ and val/ or test/, or all in train/; else `train` may be a class."""
    tops = {PurePosixPath(name).parts[0] for name in names if "/" in name}
    return "train" in tops and (len(tops) == 1 or not tops.isdisjoint(SPLITS["val"] + SPLITS["test"]))


def given_split(name: str) -> str | None:
    """The split whose folder a name lies in."""
    top = name.partition("/")[0]
    return next((split for split, folders in SPLITS.items() if top in folders), None)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return []  # one odd file among thousands: its picture is reported as having no readable caption
    return [line.strip() for line in text.split("\n") if line.strip()]


def _read_table(path: Path, folder: str, found: dict[str, list[str]]) -> None:
    """Adds the rows of a .jsonl or .csv file; several rows about one picture add up."""
    for number, row in _rows(path):
        file = next((row[key] for key in FILE_KEYS if row.get(key)), None)
        if not isinstance(file, str):
            raise UserError(f"{path}, line {number}: no file name; expected one of {', '.join(FILE_KEYS)}")
        value: Any = next((row[key] for key in CAPTION_KEYS if row.get(key)), [])
        lines = [value] if isinstance(value, str) else value
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise UserError(f"{path}, line {number}: a caption must be text or a list of texts")
        found[str(PurePosixPath(folder, file))] += [line.strip() for line in lines if line.strip()]


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
        columns = [name for name in reader.fieldnames or [] if name]
        if not set(columns) & set(FILE_KEYS) or not set(columns) & set(CAPTION_KEYS):
            raise UserError(
                f"{path}: its first line must name a column {' | '.join(FILE_KEYS)} and a column "
                f"{' | '.join(CAPTION_KEYS)}; it names {', '.join(columns) or 'nothing'}"
            )
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield number, row
