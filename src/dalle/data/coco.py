"""COCO captions (Chen et al. 2015): annotation files beside folders of pictures, as a `Source`.

`annotations/captions_train2017.json` and its like, and Karpathy's `dataset_coco.json` (Karpathy and Fei-Fei
2015, also of Flickr8k and Flickr30k), which brings its own splits. What `pycocotools.coco.COCO` reads of them
is read here; a row that is broken is named instead of stopping everything.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dalle.data.caption_files import Found, Names, Root
from dalle.data.caption_tables import Columns, texts
from dalle.data.file_listing import Listing
from dalle.data.filters import Filters
from dalle.data.folder import Captioner, Folder
from dalle.data.image_files import MAX_PIXELS, Fit
from dalle.data.splits import Split, split_names
from dalle.data.text import read_text, shown
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, PositiveInt, Seed, Side, Text

CAPTIONS = re.compile(r"captions?([_-].*)?\.json", re.IGNORECASE)  # not instances_*.json, which hold none
HUGGING_FACE = re.compile(r"(.*/)?dataset_(infos?|dict)\.json", re.IGNORECASE)
KARPATHY = re.compile(r"(dataset[_-]|karpathy).*\.json", re.IGNORECASE)


class Coco(Folder):
    """Pictures with the captions of COCO's annotation files, usually several each.

    The splits are those of the files, or of Karpathy's; one that is not among them is drawn from `train`.

    Args:
        root: the folder of annotations and pictures, at any depth (or a zip file of it).
        annotations: files, relative to the root; None: Karpathy's where it is, else all captions_*.json.
        (all others): as in `Folder`.
    """

    def __init__(
        self,
        split: Split,
        root: Place,
        image_size: Side,
        annotations: Text | Sequence[Text] | None = None,
        crop: Literal["center", "random"] = "center",
        val_fraction: Fraction = 0.05,
        test_fraction: Fraction = 0.05,
        seed: Seed = 0,
        max_pixels: PositiveInt = MAX_PIXELS,
        fit: Fit = "crop",
        filters: Filters | None = None,
        buckets: bool = False,
    ):
        self.annotations = (annotations,) if isinstance(annotations, str) else tuple(annotations or ())
        super().__init__(
            split,
            root,
            image_size,
            crop,
            val_fraction,
            test_fraction,
            seed,
            max_pixels,
            fit=fit,
            filters=filters,
            buckets=buckets,
        )

    def captioner(
        self, listing: Listing, captions: str | Path | None, columns: Columns, first_line: bool
    ) -> Captioner:
        names = [name for name, _, _ in listing.files]
        stamps = []
        for file in self.annotations:
            outside = self.root / Path(file).expanduser()
            if file not in names and not outside.is_file():
                raise UserError(f"data.annotations={file}: there is no file {outside}")
            stamps.append(0 if file in names else outside.stat().st_mtime_ns)
        return CocoCaptions(self.annotations or annotation_files(names), tuple(stamps))


def annotation_files(names: Sequence[str]) -> tuple[str, ...]:
    """Those of a folder's files that hold captions in one of COCO's formats, by their names."""
    files = sorted(name for name in names if name.lower().endswith(".json"))
    last = {name: PurePosixPath(name).name for name in files if not HUGGING_FACE.fullmatch(name)}
    karpathy = tuple(name for name in last if KARPATHY.fullmatch(last[name]))
    return karpathy or tuple(name for name in last if CAPTIONS.fullmatch(last[name]))


@dataclass(frozen=True)
class CocoCaptions:
    """Captions of pictures by annotation files.

    Args:
        files: below the root, or with their whole path.
        stamps: times of modification of those that are not below it.
    """

    files: tuple[str, ...]
    stamps: tuple[int, ...] = ()

    wanted = "captions in annotations/captions_*.json or dataset_coco.json"

    def __call__(self, root: Root, pictures: Sequence[str], files: Mapping[str, int]) -> Found:
        found = _Collected(Names(str(root), pictures))
        for file in self.files:
            found.read(file, _loaded(root, file))
        splits = found.splits if len(found.captions) == len(found.splits) else {}
        if "train" not in splits.values():  # of val2017 alone: divided as if there were no splits
            splits = {}
        left_out = {why: list(dict.fromkeys(some)) for why, some in found.left_out.items()}
        named = [shown(PurePosixPath(file).name) for file in self.files]
        origin = ", ".join(named[:4]) + (", ..." if len(named) > 4 else "")
        return Found(found.captions, origin, splits, left_out, sure_splits=True)


@dataclass
class _Collected:
    names: Names
    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    splits: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def read(self, file: str, content: dict[str, Any]) -> None:
        short = shown(PurePosixPath(file).name)
        karpathy = "annotations" not in content
        words = split_names(re.split(r"[_\-.]", PurePosixPath(file).stem))
        rows = _karpathy(content) if karpathy else _official(content)
        for number, written, captions, split in rows:
            if written is None:
                self.left_out[f"rows of {short} without a picture's name"].append(f"row {number}")
                continue
            split = kind_of(split) if split else next(iter(words.values()), None)
            name = self._name(written, [*words, split] if not karpathy else [])
            if name is None:
                self.left_out["listed but not there"].append(written)
                continue
            known = self.captions[name]
            known += [caption for caption in captions if caption not in known]
            if split:
                self.splits[name] = split

    def _name(self, written: str, folders: Sequence[str | None]) -> str | None:
        """The picture that a file name means; of several called so, the one in the split's folder."""
        for folder in filter(None, folders):
            for name in (f"{folder}/{written}", f"images/{folder}/{written}"):  # where they usually are
                if name in self.names.pictures:
                    return name
        found = self.names.find(written, "")
        if not found and (number := re.fullmatch(r".*?(\d{12})(\.\w+)", written)):
            found = self.names.find("".join(number.groups()), "")  # 2014's names, 2017's pictures
        if len(found) > 1:
            parts = {name: PurePosixPath(name).parts[:-1] for name in found}
            for wanted in filter(None, folders):
                if some := [name for name in found if wanted in parts[name]]:
                    found = some
                    break
            else:
                wanted = [set(split_names(parts[name]).values()) for name in found]
                found = [n for n, splits in zip(found, wanted, strict=True) if splits & set(folders)]
        return found[0] if len(found) == 1 else None


@lru_cache(maxsize=64)
def kind_of(split: str) -> str | None:
    """What the name of a split stands for."""
    return split_names([split]).get(split)


Rows = Iterator[tuple[int, str | None, list[str], str | None]]  # number, picture, captions, split


def _official(content: dict[str, Any]) -> Rows:
    images, annotations = content.get("images"), content["annotations"]
    captions: dict[Any, list[str]] = defaultdict(list)
    for row in annotations if isinstance(annotations, list) else ():
        if isinstance(row, dict) and isinstance(key := row.get("image_id"), int | str):
            captions[key] += texts(row.get("caption"))
    for number, row in enumerate(images if isinstance(images, list) else (), 1):
        name = row.get("file_name") if isinstance(row, dict) else None
        key = row.get("id") if isinstance(row, dict) else None
        good = isinstance(name, str) and name.strip() and isinstance(key, int | str)
        yield number, name if good else None, captions.get(key, []) if good else [], None


def _karpathy(content: dict[str, Any]) -> Rows:
    images = content.get("images")
    for number, row in enumerate(images if isinstance(images, list) else (), 1):
        row = row if isinstance(row, dict) else {}
        name, folder, split = (row.get(key) for key in ("filename", "filepath", "split"))
        sentences = row.get("sentences")
        captions = [
            text
            for sentence in (sentences if isinstance(sentences, list) else ())
            for text in texts(sentence.get("raw") if isinstance(sentence, dict) else sentence)
        ]
        if isinstance(name, str) and name and isinstance(folder, str) and folder:
            name = f"{folder}/{name}"
        yield (
            number,
            name if isinstance(name, str) and name else None,
            captions,
            split if isinstance(split, str) else None,
        )


def _loaded(root: Root, file: str) -> dict[str, Any]:
    try:
        content = json.loads(read_text(root / file))
    except UnicodeDecodeError:
        raise UserError(f"{shown(file)} is not UTF-8 text, as COCO's annotations are") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(file)} is no whole JSON ({error}); download it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{shown(file)} holds no list 'images': it is not in the format of COCO")
    rows = content.get("annotations", [])
    if (
        "annotations" in content
        and content["images"]
        and not any(
            isinstance(row, dict) and "caption" in row for row in (rows if isinstance(rows, list) else ())
        )
    ):
        raise UserError(
            f"{shown(file)} holds no captions (are they instances or keypoints?); "
            "data.annotations=annotations/captions_train2017.json names files that do"
        )
    return content
