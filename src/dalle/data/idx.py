"""The idx files of MNIST (LeCun et al. 1998) and its like (Fashion-MNIST, KMNIST, EMNIST), as a `Source`.

`train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and `t10k-...`, packed by gzip or not. What torchvision's
`MNIST` reads of them is read here, wherever they lie below a folder, and no more of a packed file than its
head says.
"""

import gzip
import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from annotated_types import MinLen

from dalle.data.caption_files import label_caption
from dalle.data.file_listing import list_files
from dalle.data.filters import Filters
from dalle.data.image_files import MAX_PIXELS, Fit
from dalle.data.imagefolder import sentences
from dalle.data.picture_index import Stamp
from dalle.data.pictures import Catalogue, Pictures
from dalle.data.splits import Split
from dalle.data.text import shown
from dalle.errors import UserError
from dalle.ranges import Fraction, Place, PositiveInt, Seed, Side, Text

NAME = re.compile(r"(?P<split>.*?)[-_.]?(?P<what>images|labels)[-_.]idx\d-ubyte(\.gz)?", re.IGNORECASE)
SPLITS = {"train": "train", "t10k": "test", "test": "test", "val": "val", "valid": "val"}
UBYTE = 8  # the code of unsigned bytes
LARGEST = 2**33  # bytes of one file, unpacked


class Idx(Pictures):
    """Pictures of classes in idx files; captions are made from the classes.

    Args:
        root: the folder of the files, at any depth.
        classes: their names, by label; None: the labels' numbers.
        template: one or more sentences with a `{}` for the class.
        (all others): as in `Folder`.
    """

    has_classes = True

    def __init__(
        self,
        split: Split,
        root: Place,
        image_size: Side,
        classes: Annotated[Sequence[Text], MinLen(1)] | None = None,
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
        files = idx_files(Path(root).expanduser())
        names = None if classes is None else tuple(classes)
        pictures = IdxPictures(Path(root).expanduser(), files, names, self.templates)
        super().__init__(
            split, pictures, image_size, crop, val_fraction, test_fraction, seed, max_pixels, fit, filters,
            buckets,
        )  # fmt: skip


def idx_files(root: Path) -> "tuple[IdxFile, ...]":
    """The pairs of files in a folder.

    Raises:
        UserError: there are none, or several of one split.
    """
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"data.root={root} {what}; give the folder of idx files")
    found: dict[str, dict[str, tuple[str, Stamp]]] = {}
    for name, size, time in list_files(root).files:
        match = NAME.fullmatch(PurePosixPath(name).name)
        if match and (split := _split(match["split"])):
            kinds = found.setdefault(split, {})
            held = kinds.get(match["what"].lower())
            if held and held[0].removesuffix(".gz") != name.removesuffix(".gz"):
                raise UserError(
                    f"data.root={shown(str(root))} holds several sets ({shown(held[0])}, {shown(name)}); "
                    "give the folder of one"
                )
            if not held:  # unpacked, where it is there in both ways: shorter names come first
                kinds[match["what"].lower()] = name, (size, time)
    files = []
    for split, kinds in found.items():
        if len(kinds) < 2:
            name = next(iter(kinds.values()))[0]
            wanted = next(iter({"images", "labels"} - set(kinds)))
            raise UserError(f"{shown(name)} is there, but not the file of its {wanted}")
        files.append(IdxFile(split, *kinds["images"], *kinds["labels"]))
    if not files:
        raise UserError(
            f"data.root={shown(str(root))} holds no idx files (train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte, t10k-..., also .gz)"
        )
    return tuple(sorted(files))


def _split(words: str) -> str | None:
    parts = re.split(r"[-_.]", words.casefold())
    return next((SPLITS[part] for part in parts if part in SPLITS), "train" if words == "" else None)


@dataclass(frozen=True, order=True)
class IdxFile:
    """One split: the files of its pictures and labels."""

    split: str
    images: str
    images_stamp: Stamp
    labels: str
    labels_stamp: Stamp


@dataclass(frozen=True)
class IdxPictures:
    """idx files as a `Collection`; pictures are called SPLIT/NUMBER."""

    root: Path
    files: tuple[IdxFile, ...]
    classes: tuple[str, ...] | None
    templates: tuple[str, ...]

    setting = "data.root"

    @property
    def place(self) -> str:
        return str(self.root)

    def content(self, name: str) -> Path | bytes:
        split, _, number = name.partition("/")
        images = _arrays(self)[split][0]
        picture = images[int(number)]
        kind = b"P5" if picture.ndim == 2 else b"P6"
        height, width = picture.shape[:2]
        return b"%s %d %d 255\n" % (kind, width, height) + picture.tobytes()  # as a netpbm file

    def find(self) -> Catalogue:
        pictures: dict[str, Stamp] = {}
        captions: dict[str, list[str]] = {}
        splits: dict[str, str] = {}
        counts: Counter[str] = Counter()
        stamps = {file.split: file.images_stamp for file in self.files}
        for split, (_, labels) in _arrays(self).items():
            words = self._words(int(labels.max(initial=0)) + 1)
            for number, label in enumerate(labels.tolist()):
                name = f"{split}/{number}"
                pictures[name], splits[name] = stamps[split], split
                captions[name] = words[label]
                counts[words[label][0]] += 1
        if "train" not in stamps or len(stamps) < 2:
            splits = {}
        origin = f"the labels of {len(counts)} classes"
        return Catalogue(pictures, captions, origin, splits, wanted="idx files with pictures")

    def _words(self, labels: int) -> list[list[str]]:
        names = self.classes or tuple(map(str, range(labels)))
        if len(names) < labels:
            raise UserError(
                f"data.classes names {len(names)} classes, but there are labels up to {labels - 1}"
            )
        return [[label_caption(template, name) for template in self.templates] for name in names]


@lru_cache(maxsize=2)
def _arrays(found: IdxPictures) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pictures (N, H, W) or (N, H, W, 3) and labels (N,) of each split."""
    out = {}
    for file in found.files:
        images, labels = read_idx(found.root / file.images), read_idx(found.root / file.labels)
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise UserError(f"{shown(file.images)} holds no pictures: its shape is {list(images.shape)}")
        if labels.ndim != 1 or len(labels) != len(images):
            raise UserError(
                f"{shown(file.labels)} does not belong to {shown(file.images)}: {list(labels.shape)} labels "
                f"of {len(images)} pictures"
            )
        out[file.split] = images, labels
    return out


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes.

    Raises:
        UserError: another kind of file, or one cut short.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != UBYTE or not 1 <= head[3] <= 4:
                raise UserError(f"{shown(str(path))} is no idx file of bytes")
            sides = file.read(4 * head[3])
            shape = np.frombuffer(sides[: len(sides) // 4 * 4], ">u4").tolist()
            size = math.prod(shape)
            if len(shape) < head[3] or not 0 < size <= LARGEST:
                raise UserError(f"{shown(str(path))} is no idx file with anything in it")
            content = file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{shown(str(path))} cannot be read ({error})") from None
    if len(content) < size:
        raise UserError(f"{shown(str(path))} is cut short: {len(content)} of {size} bytes")
    return np.frombuffer(content, np.uint8).reshape(shape)
