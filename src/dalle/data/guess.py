"""Which choice of `data` reads what lies at a path: guesses from names alone, the likeliest first."""

import json
import os
from pathlib import Path, PurePosixPath

from dalle.data.caption_files import GENERIC
from dalle.data.caption_tables import PARQUET, Columns, holds_pictures
from dalle.data.caption_tables import SUFFIXES as TABLES
from dalle.data.coco import CAPTIONS, KARPATHY, annotation_files
from dalle.data.file_listing import list_files
from dalle.data.hf import HUB, SAVED
from dalle.data.idx import NAME as IDX
from dalle.data.image_files import SUFFIXES as PICTURES
from dalle.data.splits import split_names
from dalle.data.text import shown
from dalle.data.zip_files import Archive, is_zip
from dalle.errors import UserError

Settings = dict[str, str]
PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".mat", ".h5", ".hdf5", ".lmdb", ".mdb")
PEEK = 2**16  # bytes of a JSON file that tell what it is


def guesses(path: str) -> list[Settings]:
    """Settings to try, in order.

    Raises:
        UserError: nothing here is in a format that is read; says what there is.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = _of_folder(path, place)
    elif place.exists():
        found = _of_file(path, place)
    elif any(letter in path for letter in "*?{"):
        tar = path.endswith((".tar", ".tar.gz", ".tgz"))
        found = [{"data": "webdataset", "data.shards": path} if tar else {"data": "table", "data.path": path}]
    elif HUB.fullmatch(path) and "/" in path:
        found = [{"data": "hf", "data.path": path}]
    else:
        raise UserError(f"{shown(path)} does not exist")
    return found


def _of_file(path: str, place: Path) -> list[Settings]:
    if not place.is_file():
        raise UserError(f"{shown(path)} is no file: a pipe or a device holds no data set")
    name = place.name.lower()
    parent = os.path.dirname(path) or "."
    if is_zip(place):
        return _of_zip(path, [name for name, _, _ in Archive(place).listing().files])
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return [{"data": "webdataset", "data.shards": path}]
    if IDX.fullmatch(place.name):
        return [{"data": "idx", "data.root": parent}]
    if name.endswith(".arrow"):
        return [{"data": "hf", "data.path": path}]
    if name.endswith(".json") and _is_coco(place):
        root = os.path.dirname(parent) or "." if Path(parent).name == "annotations" else parent
        return [{"data": "coco", "data.root": root, "data.annotations": os.path.relpath(path, root)}]
    if name.endswith(TABLES):
        return [{"data": "table", "data.path": path}]
    if name.endswith(PICTURES):
        raise UserError(f"{shown(path)} is one picture; give the folder of pictures with captions")
    if name.endswith((".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")):
        raise UserError(f"{shown(path)} is packed; unpack it first, and check what comes out")
    raise UserError(f"{shown(path)} is in no format that is read{_pickled([name])}")


def _of_zip(path: str, names: list[str]) -> list[Settings]:
    """Of what a zip file holds: COCO's annotations, captions, or else folders that name classes."""
    kinds = ["coco"] if annotation_files(names) else []
    kinds += ["folder", *(["imagefolder"] if _in_classes(names) else [])]
    return [{"data": kind, "data.root": path} for kind in kinds]


def _in_classes(names: list[str]) -> bool:
    """Whether folders may name classes: several do, or one does and there is no table of captions."""
    pictures = [name.replace("\\", "/") for name in names if name.lower().endswith(PICTURES)]
    places = {PurePosixPath(name).parts[:-1] for name in pictures}
    classes = {
        tuple(p for p in place if not GENERIC.fullmatch(p) and not split_names([p])) for place in places
    }
    tables = any(name.lower().endswith(TABLES) for name in names)
    return len(classes - {()}) > (1 if tables else 0)


def _is_coco(place: Path) -> bool:
    if KARPATHY.fullmatch(place.name) or CAPTIONS.fullmatch(place.name):
        return True
    with place.open("rb") as file:
        head = file.read(PEEK)
    return b'"images"' in head and b'"annotations"' in head and not _is_list(head)


def _is_list(head: bytes) -> bool:
    try:
        return json.loads(head.decode("utf-8-sig")[:1] + "]") == []
    except ValueError:
        return False


def _of_folder(path: str, place: Path) -> list[Settings]:
    names = [name for name, _, _ in list_files(place).files]
    pictures = [name for name in names if name.lower().endswith(PICTURES)]
    tables = [name for name in names if name.lower().endswith(TABLES)]
    tars = [name for name in names if name.lower().endswith((".tar", ".tgz", ".tar.gz"))]
    zips = [name for name in names if name.lower().endswith(".zip")]
    parquet = [name for name in names if name.lower().endswith(PARQUET)]
    found: list[Settings] = []
    if any(name in SAVED for name in names):
        found.append({"data": "hf", "data.path": path})
    if annotation_files(names):
        found.append({"data": "coco", "data.root": path})
    if any(IDX.fullmatch(PurePosixPath(name).name) for name in names):
        found.append({"data": "idx", "data.root": path})
    if parquet and _holds_pictures(place / parquet[0]):
        found.append({"data": "table", "data.path": path})
    if tars and len(tars) >= len(pictures):
        found.append({"data": "webdataset", "data.shards": _pattern(path, tars)})
    if pictures:
        found.append({"data": "folder", "data.root": path})
        if _in_classes(names):
            found.append({"data": "imagefolder", "data.root": path})
    if tables and not found:
        found.append({"data": "table", "data.path": path})
    if any(name.lower().endswith(".arrow") for name in names) and not found:
        found.append({"data": "hf", "data.path": path})
    if len(zips) > 1 and not found:
        raise UserError(
            f"{shown(path)} holds {len(zips)} zip files ({shown(zips[0])}, {shown(zips[1])}"
            f"{', ...' if len(zips) > 2 else ''}): unpack them beside one another, or check one of them"
        )
    if zips and not found:
        found += _of_file(os.path.join(path, zips[0]), place / zips[0])
    if not found:
        raise UserError(f"{shown(path)} holds {len(names)} files in no format that is read{_pickled(names)}")
    return found


def _holds_pictures(place: Path) -> bool:
    try:
        return holds_pictures(place, Columns())
    except UserError:
        return False


def _pattern(path: str, tars: list[str]) -> str:
    """The shards of a folder as one setting."""
    if len(tars) == 1:
        return os.path.join(path, tars[0])
    folders = {os.path.dirname(name) for name in tars}
    endings = {name.partition(".")[2] if "." in name else "" for name in map(os.path.basename, tars)}
    ending = endings.pop() if len(endings) == 1 else "tar"
    return os.path.join(path, folders.pop() if len(folders) == 1 else "**", f"*.{ending}")


def _pickled(names: list[str]) -> str:
    """A hint where files hold Python objects, or arrays without captions."""
    batches = [name for name in names if PurePosixPath(name).name.startswith(("data_batch_", "test_batch"))]
    if batches or any(name.lower().endswith((".pkl", ".pickle", ".pt", ".pth")) for name in names):
        return "; pickled Python objects run code when they are opened, and are never read: save them as PNG"
    if some := [name for name in names if name.lower().endswith(PICKLED)]:
        return f"; {shown(some[0])} and its like are arrays: save them as pictures with captions"
    return "; docs/data.md lists those that are"
