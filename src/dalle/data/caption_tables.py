"""Tables of captions as people have them: .csv of any separator, .tsv, .txt, .jsonl, .json, .parquet.

Columns are known by their usual names, whatever their case and underscores; a separator is the one that makes
known columns of the first line. Nothing is cut: what an unquoted separator would split off a caption stays in
it, and lines that cannot be read are counted.
"""

import ast
import contextlib
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from dalle.data.text import lines, read_text, shown, tidy
from dalle.data.zip_files import Member
from dalle.errors import UserError
from dalle.reading import check_file

PARQUET = (".parquet", ".pq")
SUFFIXES = (*PARQUET, ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt", ".token")
SEPARATORS = (",", "\t", ";", "|")
OTHER_QUOTES = str.maketrans("'\"", "\"'")
SURROGATE = re.compile(r"[\ud800-\udfff]")  # stands for a byte that is not UTF-8
ODD_LINES = 0.1  # share of lines that may be so
ODD_SEPARATOR = re.compile(r"[^\w\s\"'().\[\]{}/\\-]|[\x00-\x08\x1c-\x1f]")
LONGEST_RECORD = 100  # lines in one quoted field, after which the quote is taken for a letter
PEEK = 20  # lines that tell whether a table without a header names pictures

# Names of columns, without underscores and spaces, the likeliest first.
PICTURE_COLUMNS = (
    "filename", "filepath", "file", "image", "imagepath", "imagename", "imagefile", "imagefilename", "img",
    "imgpath", "imgname", "imgfile", "path", "picture", "picturepath", "photo", "name", "key",
    "imageid", "id",
)  # fmt: skip
# The first of these groups of which a table has a column is read, with all of its columns.
CAPTION_COLUMNS = (
    r"(text|txt|caption|prompt|sentence)s?\d*",
    r"(title|description|alt|alttext|comment|raw|summary)s?\d*",
    r"(label|class|classname|category|tag|keyword|name)s?",
)
SPLIT_COLUMNS = ("split", "subset")
ADDRESS_COLUMNS = ("url", "urls", "imageurl", "imgurl", "link")


class NotATable(Exception):
    """A file without a table that can be read; the message follows its name: "is ..."."""


@dataclass(frozen=True)
class Columns:
    """Which columns are read; None and (): those of the usual names."""

    picture: str | None = None
    captions: tuple[str, ...] = ()
    values: tuple[str, ...] = field(default=(), repr=False)  # read beside: what filters ask for

    def of_picture(self, names: Sequence[str]) -> list[str]:
        """Columns that may hold the picture's name, the likeliest first."""
        if self.picture is not None:
            return [name for name in names if plain(name) == plain(self.picture)]
        likely = [name for name in names if plain(name) in PICTURE_COLUMNS]
        return sorted(likely, key=lambda name: PICTURE_COLUMNS.index(plain(name)))

    def of_captions(self, names: Sequence[str], picture: str = "") -> list[str]:
        """Columns that hold captions."""
        if self.captions:
            wanted = [plain(caption) for caption in self.captions]
            return [name for name in names if plain(name) in wanted]
        others = [name for name in names if name != picture]
        groups = ([n for n in others if re.fullmatch(group, plain(n))] for group in CAPTION_COLUMNS)
        return next((group for group in groups if group), [])

    def of_values(self, names: Sequence[str]) -> dict[str, str]:
        """What is read beside, by its name here -> by its name there."""
        there = {plain(name): name for name in reversed(names)}
        return {name: there[plain(name)] for name in self.values if plain(name) in there}


@dataclass(frozen=True)
class Row:
    picture: str
    captions: list[str]
    split: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """What a file says: its rows, the caption columns they are from, numbers of lines that say nothing, and
    the names of all columns.
    """

    rows: list[Row] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def read_table(path: Path | Member, columns: Columns, is_picture: Callable[[str], bool]) -> Table:
    """Reads a table.

    Args:
        is_picture: whether there is a picture of a name. Tells a table without a header by its first lines.

    Raises:
        NotATable: no text, empty, another kind of file, or without columns that are known.
    """
    if path.suffix.lower() in PARQUET:
        table = _from_objects(enumerate(_parquet(path, columns), 1), columns)
        table.names = _parquet_file(path).schema_arrow.names
        return table
    odd: list[int] = []
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        text, odd = _mostly_text(path)
    except OSError as error:
        raise NotATable(f"a file that cannot be read ({error.strerror})") from None
    if not text.strip():
        raise NotATable("empty")
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        table = _from_objects(_objects(text, columns), columns)
    else:
        table = _from_records(text, columns, is_picture)
    table.broken = sorted({*table.broken, *odd})
    return table


def _mostly_text(path: Path | Member) -> tuple[str, list[int]]:
    """The text of a file of which some lines are not UTF-8, without them, and their numbers."""
    rows = path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
    odd = [number for number, row in enumerate(rows, 1) if SURROGATE.search(row)]
    if len(odd) > max(1, ODD_LINES * len(rows)) or odd[0] == 1:
        raise NotATable("not UTF-8 text; save it as UTF-8")
    return "\n".join("" if SURROGATE.search(row) else row for row in rows), odd


def _parquet(path: Path | Member, columns: Columns) -> Iterator[dict[str, Any] | None]:
    """The rows of a parquet file, as far as their columns may be read; no pictures that are in it."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise NotATable("in parquet, which needs pyarrow: pip install 'dalle[data]'") from None
    try:
        file = _parquet_file(path)
        names = [field.name for field in file.schema_arrow]
        pictures = [name for name in columns.of_picture(names) if not _packed(file.schema_arrow.field(name))]
        if not pictures and any(map(_packed, file.schema_arrow)):
            raise NotATable("parquet with pictures in it: data=table data.path=FILE reads it")
        used = {*pictures, *(name for p in pictures for name in columns.of_captions(names, p))}
        if used <= set(pictures):
            raise NotATable(_unknown(names))
        used |= {name for name in names if plain(name) in SPLIT_COLUMNS}
        used |= set(columns.of_values(names).values())
        for batch in file.iter_batches(columns=sorted(used)):
            yield from _batch_rows(batch)
    except (ArrowException, OSError) as error:
        raise NotATable(f"no whole parquet file ({' '.join(str(error).split())[:100]})") from None


def _batch_rows(batch: Any) -> list[dict[str, Any] | None]:
    """None for a row with text that is not UTF-8, which Arrow does not look at."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for k in range(len(batch)) for row in _batch_rows(batch.slice(k, 1))]


def holds_pictures(path: Path, columns: Columns) -> bool:
    """Whether a parquet file has pictures in it instead of their paths.

    Raises:
        UserError: it cannot be read.
    """
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise UserError("parquet files need a package: pip install 'dalle[data]'") from None
    try:
        schema = _parquet_file(path).schema_arrow
    except (ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:100]
        raise UserError(f"{shown(str(path))} is no whole parquet file ({why})") from None
    if columns.picture is not None:
        return any(_packed(schema.field(name)) for name in columns.of_picture(schema.names))
    return any(map(_packed, schema))


def _parquet_file(path: Path | Member) -> Any:
    from pyarrow import parquet

    if isinstance(path, Path):
        check_file(path)
    return parquet.ParquetFile(BytesIO(path.read_bytes()) if isinstance(path, Member) else path)


def _packed(field: Any) -> bool:
    """Whether a column may hold pictures: bytes, alone or with their path."""
    from pyarrow import types

    kind = field.type
    if types.is_struct(kind):
        return any(kind.field(k).name == "bytes" for k in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def plain(name: str) -> str:
    """The name of a column as it is compared."""
    return re.sub(r"[\s_\-.\"']", "", name).casefold()


def _from_objects(objects: Iterator[tuple[int, Any]], columns: Columns) -> Table:
    table, seen = Table(), {}
    for number, item in objects:
        row = _row(item, columns) if isinstance(item, dict) else None
        if row is None:
            table.broken.append(number)
            seen |= dict.fromkeys(item) if isinstance(item, dict) else {}
            continue
        table.rows.append(row[0])
        table.names += [name for name in item if name not in table.names]
        table.columns += [name for name in row[1] if name not in table.columns]
    if not table.rows:
        raise NotATable(_unknown(list(seen)) if seen else "broken: no line of it is a JSON object")
    return table


def _row(item: dict[str, Any], columns: Columns) -> tuple[Row, list[str]] | None:
    """A row and the columns of its captions; None where it lacks the one or the other."""
    for picture in columns.of_picture(list(item)):
        value = item[picture]
        if isinstance(value, dict):  # {"image": {"path": ...}}
            value = next((value[name] for name in columns.of_picture(list(value))), None)
        names = texts(value)
        captions = columns.of_captions(list(item), picture)
        if len(names) == 1 and captions:
            found = [text for name in captions for text in texts(item[name])]
            split = next((item[name] for name in item if plain(name) in SPLIT_COLUMNS), None)
            values = {name: item[there] for name, there in columns.of_values(list(item)).items()}
            return Row(names[0], found, split if isinstance(split, str) else None, values), captions
    return None


def _objects(text: str, columns: Columns) -> Iterator[tuple[int, Any]]:
    """The objects of JSON lines, or of one list, however it is wrapped; None for what is none."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        for number, line in enumerate(lines(text), 1):
            if line.strip():
                yield number, _loads(line)
        return
    yield from enumerate(_by_columns(whole, columns) or _unwrapped(whole), 1)


def _by_columns(whole: Any, columns: Columns) -> list[Any]:
    """The rows of what holds the values of each column, in lists or by the rows' numbers (as pandas writes
    it); nothing where it is no such table.
    """
    if not isinstance(whole, dict):
        return []
    picture = next(iter(columns.of_picture(list(whole))), None)
    if picture is None or not columns.of_captions(list(whole), picture):
        return []
    if all(isinstance(column, list) for column in whole.values()):
        whole = {name: dict(enumerate(column)) for name, column in whole.items()}
    first = whole[picture]
    if not all(isinstance(column, dict) and column.keys() == first.keys() for column in whole.values()):
        return []
    return [{name: column[key] for name, column in whole.items()} for key in first]


def _loads(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _unwrapped(whole: Any) -> list[Any]:
    """A list of rows, out of what JSON files wrap it in."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        raise NotATable("no table: it holds neither a list nor objects")
    if isinstance(whole.get("images"), list) and isinstance(whole.get("annotations"), list):
        raise NotATable(
            "in the format of COCO: data=coco reads it (data.root= the folder of pictures and annotations)"
        )
    lists = [value for value in whole.values() if isinstance(value, list) and value]
    if len(rows := [value for value in lists if isinstance(value[0], dict)]) == 1:
        return rows[0]  # {"images": [...]}
    if Columns().of_picture(list(whole)) or Columns().of_captions(list(whole)):
        return [whole]
    if all(isinstance(value, dict) for value in whole.values()):
        return [{**row, "file_name": name} for name, row in whole.items()]
    return [{"file_name": name, "text": value} for name, value in whole.items()]


def texts(value: Any, depth: int = 0) -> list[str]:
    """The texts in a value: one or a list, also one written as JSON or Python do, numbers as text, of
    {"raw": ...} what its usual names hold.
    """
    if isinstance(value, str):
        if depth < 3 and (parts := _written_list(value.strip())):
            return texts(parts, depth + 1)
        return [text] if (text := tidy(value)) else []
    if isinstance(value, int) and not isinstance(value, bool):  # of any number of digits
        return [str(value)]
    if isinstance(value, float) and math.isfinite(value):
        return [str(value)]
    if isinstance(value, dict) and depth < 3:
        return [text for name in Columns().of_captions(list(value)) for text in texts(value[name], depth + 1)]
    if isinstance(value, list) and depth < 3:
        return [text for part in value for text in texts(part, depth + 1)]
    return []


def _from_records(text: str, columns: Columns, is_picture: Callable[[str], bool]) -> Table:
    if head := re.match(r"sep=(.)\r?\n", text):  # Excel's own
        text = text[head.end() :]
    if re.match(r"\s*'[^'\"]*'[^\w\s]'|\s*'[^'\"]*'\t'", text):  # quoted by the other kind of quotes
        table = _from_records(text.translate(OTHER_QUOTES), columns, is_picture)
        table.rows = [
            replace(row, captions=[caption.translate(OTHER_QUOTES) for caption in row.captions])
            for row in table.rows
        ]
        return table
    first = next(line for line in lines(text) if line.strip())
    others = sorted(set(ODD_SEPARATOR.findall(first)) - set(SEPARATORS))
    separators = (*SEPARATORS, *others)
    heads = {separator: _fields(first, separator) or first.split(separator) for separator in separators}
    heads = {separator: [tidy(name) for name in names] for separator, names in heads.items()}
    known = {separator: _known(names, columns) for separator, names in heads.items()}
    separator = max(separators, key=lambda separator: len(known[separator][1]) + bool(known[separator][0]))
    picture, captions = known[separator]
    if picture and captions:
        return _with_header(text, separator, heads[separator], picture, captions, columns)
    if columns.picture is None and not columns.captions and (separator := _without_header(text, is_picture)):
        return _with_header(text, separator, ["file_name", "text"], "file_name", ["text"], None)
    raise NotATable(_unknown(max(heads.values(), key=len)))


def _known(names: list[str], columns: Columns) -> tuple[str | None, list[str]]:
    """The columns of pictures and captions."""
    picture = next(iter(columns.of_picture(names)), None)
    return picture, columns.of_captions(names, picture or "") if picture else []


def _without_header(text: str, is_picture: Callable[[str], bool]) -> str | None:
    """The separator of a table of names and captions, where the first and most lines begin with a picture."""
    some = [line for line in lines(text) if line.strip()][:PEEK]
    for separator in (*SEPARATORS, " "):
        starts = [_fields(line, separator) or line.split(separator) for line in some]
        good = [len(parts) > 1 and is_picture(parts[0].strip()) for parts in starts]
        if good[0] and sum(good) > len(some) // 2:
            return separator
    return None


def _with_header(
    text: str,
    separator: str,
    names: list[str],
    picture: str,
    captions: list[str],
    columns: Columns | None,
) -> Table:
    """`columns`: None where the first line is a row like the others."""
    table = Table(columns=captions, names=names)
    places = [k for k, name in enumerate(names) if name in captions]
    beside = {name: names.index(there) for name, there in columns.of_values(names).items()} if columns else {}
    split = next((k for k, name in enumerate(names) if plain(name) in SPLIT_COLUMNS), None)
    for number, raw, fields in _records(text, separator):
        if columns and [tidy(name) for name in fields] == names:  # also where files were put together
            continue
        if len(fields) > len(names):
            fields = _rejoined(raw, fields, separator, len(names), places)
        if len(fields) > len(names) or not (name := tidy(fields[names.index(picture)])):
            table.broken.append(number)
            continue
        found = [part for place in places if place < len(fields) for part in _listed(fields[place])]
        where = fields[split].strip() if split is not None and split < len(fields) else None
        values = {column: fields[place] for column, place in beside.items() if place < len(fields)}
        table.rows.append(Row(name, found, where, values))
    return table


def _records(text: str, separator: str) -> Iterator[tuple[int, str, list[str]]]:
    """Number of the first line, raw text and fields of each record; a quoted field may go over lines."""
    rows = lines(text)
    place = 0
    while place < len(rows):
        start, raw = place, rows[place]
        place += 1
        if not raw.strip():
            continue
        fields = _fields(raw, separator)
        if fields is None:
            longer = raw
            for extra in range(place, min(place + LONGEST_RECORD, len(rows))):
                longer = f"{longer}\n{rows[extra]}"
                if '"' in rows[extra]:
                    if fields := _fields(longer, separator):
                        raw, place = longer, extra + 1
                        break
                    if not _open_quote(longer, separator):
                        break
        yield start + 1, raw, fields or raw.split(separator)


def _fields(raw: str, separator: str) -> list[str] | None:
    """The fields of a line; None where its quotes do not close, or close amid a field."""
    if '"' not in raw:
        return raw.split(separator)
    csv.field_size_limit(sys.maxsize)
    backslashes: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
    for more in ({}, backslashes) if '\\"' in raw else ({},):
        with contextlib.suppress(csv.Error):
            return next(csv.reader([raw], delimiter=separator, skipinitialspace=True, strict=True, **more))
    return None


def _open_quote(raw: str, separator: str) -> bool:
    try:
        next(csv.reader([raw], delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        return "end of data" in str(error)
    return False


def _rejoined(raw: str, fields: list[str], separator: str, width: int, places: Sequence[int]) -> list[str]:
    """Too many fields -> as many as there should be: unquoted separators belong to the caption."""
    while len(fields) > width and not fields[-1].strip():
        fields = fields[:-1]
    if len(fields) <= width or len(places) != 1:
        return fields
    exact = raw.split(separator)
    if '"' in raw:
        with contextlib.suppress(csv.Error):
            exact = next(csv.reader([raw], delimiter=separator))  # keeps the spaces around separators
    before, after = places[0], len(exact) - (width - 1 - places[0])
    if after <= before:
        return fields
    return [*exact[:before], separator.join(exact[before:after]), *exact[after:]]


def _listed(value: str) -> list[str]:
    """The texts of a field; "nan" and "null" are none."""
    return [] if value.strip().casefold() in ("nan", "null") else texts(value)


def _written_list(text: str) -> list[str]:
    """The texts of a list as JSON or Python write it; none where it is no such."""
    if text[:2] not in ('["', "['") or text[-1] != "]":
        return []
    try:
        found = json.loads(text) if text[1] == '"' else ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return found if isinstance(found, list) and all(isinstance(part, str) for part in found) else []


def _unknown(names: Sequence[str]) -> str:
    far = any(plain(name) in ADDRESS_COLUMNS for name in names)
    return (
        f"without columns that are known: it has {', '.join(map(shown, names))[:200]}; "
        "data.image_column=NAME and data.caption_column=NAME say which hold names of pictures, and captions"
        + ("; pictures at addresses have to be downloaded first, as img2dataset does" if far else "")
    )
