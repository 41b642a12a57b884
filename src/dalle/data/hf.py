"""Hugging Face data sets as a `Source`: a local folder, parquet or Arrow files, `save_to_disk`, or the hub.

The `datasets` library reads them into memory-mapped Arrow files (in its own cache), so a picture is found at
once wherever it is. Pictures stay encoded until they are asked for. No code of a data set is ever run: the
library has no loading scripts any more, and its loaders that are no tables or pictures are refused here.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob, has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from dalle.data.caption_files import label_caption
from dalle.data.caption_tables import Columns, texts
from dalle.data.filters import Filters
from dalle.data.folder import columns
from dalle.data.image_files import MAX_PIXELS, BadPicture, Fit
from dalle.data.imagefolder import sentences
from dalle.data.picture_index import Stamp
from dalle.data.pictures import Catalogue, Pictures, say
from dalle.data.sources import Source
from dalle.data.splits import Split, split_names
from dalle.data.text import read_text, shown
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, Places, PositiveInt, Seed, Side, Text

BUILDERS = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow"}
LOADERS = ("parquet", "arrow", "imagefolder", "json", "csv", "cache")  # of the library, that are used here
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # NAME or OWNER/NAME
BATCH = 1000  # rows whose captions are read at a time


def hugging_face(
    split: Split,
    path: Place | Places,
    image_size: Side,
    subset: Text | None = None,
    image_column: Text | None = None,
    caption_column: Text | Sequence[Text] | None = None,
    template: Text | Annotated[Sequence[Text], MinLen(1)] = "a photo of a {}",
    streaming: bool = False,
    shuffle_window: PositiveInt | None = 10_000,
    crop: Literal["center", "random"] = "center",
    val_fraction: Fraction = 0.05,
    test_fraction: Fraction = 0.05,
    seed: Seed = 0,
    max_pixels: PositiveInt = MAX_PIXELS,
    fit: Fit = "crop",
    filters: Filters | None = None,
    buckets: bool = False,
) -> Source:
    """A `HuggingFace`; a `ParquetStream` where streaming, to which alone `shuffle_window` matters.

    Raises:
        UserError: as these do; streaming, with what needs to have seen all pictures.
    """
    where = (split, path, image_size, subset, image_column, caption_column, template, crop)
    how = (val_fraction, test_fraction, seed, max_pixels, fit)
    if not streaming:
        return HuggingFace(*where, *how, filters, buckets)
    for name, given in (("filters", filters), ("buckets", buckets)):
        if given:
            raise UserError(
                f"data.{name} needs to have seen all pictures, and data.streaming=true sees each when it is "
                "needed; leave one of them out"
            )
    from dalle.data.parquet_stream import ParquetStream

    return ParquetStream(*where, *how, shuffle_window)


class HuggingFace(Pictures):
    """Pictures and captions by the columns of a Hugging Face data set.

    The splits are its own; one that is not among them is drawn from `train`. Whole numbers that stand for
    classes become captions by `template`.

    Args:
        path: a folder (of pictures with metadata, of parquet, or written by `save_to_disk`), a parquet or
            Arrow file, a pattern of such (`data/train-*.parquet`) or a list; or the name of a data set at the
            hub, which is downloaded once.
        subset: that configuration of a data set which has several.
        image_column, caption_column: None: the column that holds pictures, and those of the usual names.
        template: one or more sentences with a `{}` for the name of a class.
        (all others): as in `Folder`.
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
        filters: Filters | None = None,
        buckets: bool = False,
    ):
        self.templates = sentences(template)
        rows = rows_of(path, subset, columns(image_column, caption_column, filters), self.templates)
        super().__init__(
            split,
            rows,
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
        self.has_classes = all(table.labels for table in rows.splits.values())


def rows_of(
    path: str | Path | Sequence[str], subset: str | None, columns: Columns, templates: tuple[str, ...]
) -> "Rows":
    """The collection of a path, with what tells its versions apart."""
    given = [str(path)] if isinstance(path, str | Path) else [str(one) for one in path]
    places = [os.path.expanduser(one) for one in given]
    if len(places) == 1 and not has_magic(places[0]) and not os.path.exists(places[0]):
        if not HUB.fullmatch(given[0]):
            raise UserError(f"data.path={given[0]} does not exist")
        return Rows((given[0],), (), subset, columns, templates)
    found = files_of(places, tuple(BUILDERS))
    if len(places) == 1 and os.path.isdir(places[0]):
        found, places = _everything(Path(places[0])), [os.path.abspath(places[0])]
        _check_files(found)
    else:
        places = [os.path.abspath(file) for file in found]
        if odd := [file for file in places if Path(file).suffix.lower() not in BUILDERS]:
            raise UserError(
                f"data.path={shown(odd[0])} is neither parquet nor Arrow; data=table reads tables of text"
            )
    stamps = tuple((file, *_stamp(file)) for file in found)
    return Rows(tuple(places), stamps, subset, columns, templates)


def files_of(places: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """The files that paths, patterns and folders (for their files of these kinds) stand for.

    Raises:
        UserError: one of them stands for nothing.
    """
    files: list[str] = []
    for place in places:
        if os.path.isdir(place):
            found = [file for file in _everything(Path(place)) if file.lower().endswith(suffixes)]
        else:
            found = sorted(glob(place, recursive=True)) if not os.path.exists(place) else [place]
        if not found and not os.path.isdir(place):
            raise UserError(f"data.path={shown(place)}: there is no such file")
        files += found
    _check_files(files)
    return files


def _check_files(files: Sequence[str]) -> None:
    """Raises UserError where one of them may never end."""
    if odd := [file for file in files if os.path.exists(file) and not os.path.isfile(file)]:
        raise UserError(f"data.path: {shown(odd[0])} is no file (a pipe, a device); move it away")


def _everything(folder: Path) -> list[str]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(root, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _stamp(file: str) -> Stamp:
    try:
        status = os.stat(file)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Rows:
    """A data set as a `Collection`; its pictures are called SPLIT/ROW."""

    places: tuple[str, ...]
    stamps: tuple[tuple[str, int, int], ...]
    subset: str | None
    columns: Columns
    templates: tuple[str, ...]

    setting = "data.path"

    @property
    def place(self) -> str:
        return self.places[0] if len(self.places) == 1 else os.path.dirname(self.places[0])

    @property
    def splits(self) -> "dict[str, SplitRows]":
        return _opened(self)

    def content(self, name: str) -> Path | bytes:
        split, _, row = name.rpartition("/")
        place = Path(self.place)
        return self.splits[split].picture(int(row), place if os.path.isdir(place) else place.parent)

    def find(self) -> Catalogue:
        tables = self.splits
        pictures: dict[str, Stamp] = {}
        captions: dict[str, list[str]] = {}
        values: dict[str, Mapping[str, Any]] = {}
        for split, table in tables.items():
            for row, said in enumerate(table.values()):
                values[f"{split}/{row}"] = said
            for row, some in enumerate(table.captions(self.templates)):
                name = f"{split}/{row}"
                pictures[name] = table.stamp[0], table.stamp[1] ^ row
                captions[name] = some
        kinds = split_names(tables)
        given = {}
        if len(set(kinds.values())) > 1 and "train" in kinds.values():
            given = {name: kinds[s] for name in pictures if (s := name.rpartition("/")[0]) in kinds}
        table = next(iter(tables.values()))
        used = ", ".join(map(shown, table.caption_columns))
        origin = f"column {used} (pictures from {shown(table.image_column)})"
        return Catalogue(
            pictures,
            captions,
            origin,
            given,
            wanted="rows with a picture and a caption",
            values=values,
            columns=table.names,
        )


class SplitRows:
    """One split: where its pictures and captions are."""

    def __init__(self, data: Any, columns: Columns) -> None:
        import datasets

        features = data.features
        self.image_column = image_column_of(features, columns)
        self.caption_columns = caption_columns_of(features, columns, self.image_column)
        images = data.select_columns([self.image_column])
        if isinstance(features[self.image_column], datasets.Image):
            images = images.cast_column(self.image_column, datasets.Image(decode=False))
        self.images = images
        self.texts = data.select_columns(self.caption_columns)
        self.names = list(features)
        self.beside = columns.of_values(self.names)
        self.numbers = data.select_columns(list(self.beside.values())) if self.beside else None
        self.readers = {name: reader_of(features[name]) for name in self.caption_columns}
        self.labels = all(isinstance(features[name], datasets.ClassLabel) for name in self.caption_columns)
        files = [_stamp(held["filename"]) for held in data.cache_files]
        self.stamp = sum(size for size, _ in files), max((time for _, time in files), default=0)

    def captions(self, templates: Sequence[str]) -> Iterator[list[str]]:
        for batch in _batches(self.texts):
            for row in zip(*(batch[name] for name in self.caption_columns), strict=True):
                cells = zip(self.readers.values(), row, strict=True)
                yield [text for read, cell in cells for text in read(cell, templates)]

    def values(self) -> Iterator[dict[str, Any]]:
        """What each row says in the columns that filters ask for."""
        for batch in _batches(self.numbers) if self.numbers else ():
            for row in zip(*(batch[there] for there in self.beside.values()), strict=True):
                yield dict(zip(self.beside, row, strict=True))

    def picture(self, row: int, beside: Path) -> Path | bytes:
        held = self.images[row][self.image_column]
        if isinstance(held, dict):
            held = held.get("bytes") or held.get("path")
        if isinstance(held, str) and held:
            if "://" in held:
                raise BadPicture("an address, no picture (download them first, as img2dataset does)")
            return beside / held
        if not isinstance(held, bytes | bytearray) or not held:
            raise BadPicture("empty")
        return bytes(held)


def _batches(rows: Any) -> Iterator[Mapping[str, Any]]:
    try:
        yield from rows.iter(BATCH)
    except UnicodeDecodeError as error:  # Arrow does not look at what it is given as text
        names = ", ".join(map(shown, rows.column_names))
        raise UserError(f"data.path: a text in {names} is not UTF-8 ({error}); write the data anew") from None


Reader = Callable[[Any, Sequence[str]], list[str]]


def reader_of(feature: Any) -> Reader:
    """What turns a cell into captions."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        return lambda cell, templates: (
            [label_caption(t, names[cell].replace("_", " ")) for t in templates]
            if isinstance(cell, int) and 0 <= cell < len(names)
            else []
        )
    if str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        return lambda cell, templates: (
            [label_caption(t, str(cell)) for t in templates] if isinstance(cell, int) else []
        )
    return lambda cell, templates: texts(cell)


def image_column_of(features: Mapping[str, Any], columns: Columns) -> str:
    import datasets

    names = list(features)
    if columns.picture is not None:
        if found := columns.of_picture(names):
            return found[0]
        raise UserError(f"data.image_column={columns.picture} is not there; there are {_listed(features)}")
    likely = columns.of_picture(names)
    order = [*likely, *(name for name in names if name not in likely)]
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in order:
        feature = features[name]
        if isinstance(feature, datasets.Image):
            kinds["image"].append(name)
        elif isinstance(feature, dict) and "bytes" in feature:
            kinds["struct"].append(name)
        elif str(getattr(feature, "dtype", "")) in ("binary", "large_binary"):
            kinds["bytes"].append(name)
        elif name in likely and "string" in str(getattr(feature, "dtype", "")):
            kinds["path"].append(name)
    for kind in ("image", "struct", "bytes", "path"):
        if kinds[kind]:
            return kinds[kind][0]
    raise UserError(
        f"no column holds pictures; there are {_listed(features)}. data.image_column=NAME says which does"
    )


def caption_columns_of(features: Mapping[str, Any], columns: Columns, picture: str) -> list[str]:
    names = [name for name in features if name != picture]
    found = columns.of_captions(names)
    if columns.captions and len(found) < len(columns.captions):
        wanted = ", ".join(columns.captions)
        raise UserError(f"data.caption_column={wanted} is not there; there are {_listed(features)}")
    if not found:
        raise UserError(
            f"no column of a usual name holds captions; there are {_listed(features)}. "
            "data.caption_column=NAME says which does"
        )
    return found


def _listed(features: Mapping[str, Any]) -> str:
    kinds = [f"{shown(n)} ({getattr(f, 'dtype', None) or type(f).__name__})" for n, f in features.items()]
    return ", ".join(kinds)[:300]


@lru_cache(maxsize=4)
def _opened(rows: Rows) -> dict[str, SplitRows]:
    loaded = _load(rows)
    return {split: SplitRows(data, rows.columns) for split, data in loaded.items() if len(data)} or _empty(
        rows
    )


def _empty(rows: Rows) -> dict[str, SplitRows]:
    raise UserError(f"data.path={shown(rows.place)} holds no rows")


def _load(rows: Rows) -> Mapping[str, Any]:
    try:
        import datasets
        from datasets import config
        from datasets.utils import logging
    except ImportError:
        raise UserError("Hugging Face data sets need a package: pip install 'dalle[data]'") from None
    place, folder = rows.places[0], os.path.isdir(rows.places[0])
    remote = not rows.stamps and not os.path.exists(place)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is raised as well
    try:
        if remote:
            say(f"data.path={place}: no such file here, so it is asked for at the Hugging Face hub (kept in "
                f"{config.HF_DATASETS_CACHE})")  # fmt: skip
            _look_for_the_hub(place)
        if folder and any(os.path.isfile(os.path.join(place, name)) for name in SAVED):
            loaded = datasets.load_from_disk(place)
        elif folder or remote:
            if folder:
                _only_here(Path(place))
            builder = datasets.load_dataset_builder(place, rows.subset)
            kind = type(builder).__module__.rpartition(".")[2]
            if kind not in LOADERS:
                raise UserError(f"data.path={shown(place)} is read by {kind!r} there, {_instead(kind)}")
            loaded = datasets.load_dataset(place, rows.subset)
        else:
            kinds = {BUILDERS[Path(file).suffix.lower()] for file in rows.places}
            if len(kinds) > 1:
                raise UserError("data.path mixes parquet and Arrow files; give one kind of them")
            loaded = datasets.load_dataset(kinds.pop(), data_files=_by_split(rows.places))
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its formats and the network give rise to
        why = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:240]
        what = "is no file or folder here, and the hub does not give it" if remote else "cannot be read"
        why += "; data.subset=NAME chooses one" if "onfig name is missing" in why else ""
        why += ": a parquet file there has no rows; take it away" if "BatchSize must be" in why else ""
        raise UserError(f"data.path={shown(place)} {what} ({why})") from None
    finally:
        logging.set_verbosity(before)
    return (
        {str(split): data for split, data in loaded.items()}
        if isinstance(loaded, dict)
        else {"train": loaded}
    )


def files_of_builder(name: str, subset: str | None) -> dict[str, list[str]]:
    """Addresses of the files of a data set at the hub, by its splits.

    Raises:
        UserError: the hub does not say; or its files are not tables of pictures.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("Hugging Face data sets need a package: pip install 'dalle[data]'") from None
    say(f"data.path={name}: no such file here, so it is asked for at the Hugging Face hub")
    _look_for_the_hub(name)
    try:
        files = datasets.load_dataset_builder(name, subset).config.data_files or {}
    except Exception as error:  # the library raises whatever its formats and the network give rise to
        why = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:240]
        raise UserError(
            f"data.path={shown(name)} is no file or folder here, and the hub does not give it ({why})"
        ) from None
    return {str(split): list(map(str, some)) for split, some in files.items()}


def _only_here(folder: Path) -> None:
    """Refuses a folder whose README.md, which `datasets` follows, leads to files that are not in it."""
    try:
        text = read_text(folder / "README.md")
    except (OSError, UnicodeDecodeError):
        return
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    configs = re.search(r"^configs:.*?(?=^\w|\Z)", head[1] if head else "", re.MULTILINE | re.DOTALL)
    if configs and (far := re.search(r"\S*(://|\.\./)\S*|(?<=[\s\"'])/\S+", configs[0])):
        raise UserError(f"README.md in data.path={shown(str(folder))} names files elsewhere: {shown(far[0])}")


def _look_for_the_hub(name: str) -> None:
    """Where it cannot be reached, only what is kept here counts, at once instead of after many tries."""
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=10)
    except HfHubHTTPError:
        return  # it has answered; `datasets` says what is wrong
    except Exception:
        config.HF_HUB_OFFLINE = True


def _instead(kind: str) -> str:
    return "data=webdataset reads tar files" if kind == "webdataset" else "which is not for pictures"


def _by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by the splits that their names tell."""
    base = os.path.commonpath([os.path.dirname(file) for file in files])
    kinds = {file: split_of(os.path.relpath(file, base)) for file in files}
    if "train" not in kinds.values() or None in kinds.values():
        return {"train": list(files)}
    found: dict[str, list[str]] = defaultdict(list)
    for file, kind in kinds.items():
        found["validation" if kind == "val" else str(kind)].append(file)
    return dict(found)


def split_of(name: str) -> str | None:
    """The split that a file's name tells: `train-00000-of-00002.parquet`, `val/0.csv`, `split=test/0.csv`."""
    *folders, last = name.replace(os.sep, "/").split("/")
    words = [re.split(r"[-_.]", last)[0], *(folder.removeprefix("split=") for folder in reversed(folders))]
    return next((kind for word in words if (kind := split_names([word]).get(word))), None)
