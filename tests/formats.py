"""Small made samples of every format of data, for tests: each has pictures of its own and known captions."""

import gzip
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


def picture(path: Path, k: int) -> Path:
    """A picture of its own for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return path


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def coco(root: Path, train: int = 6, val: int = 3, captions: int = 2) -> Path:
    """As it is unpacked: pictures of both splits are called alike here, as nothing forbids."""
    for split, n, start in (("train2017", train, 0), ("val2017", val, 100)):
        images = [{"id": k + start, "file_name": f"{k:012d}.jpg"} for k in range(n)]
        rows = [
            {"id": 10 * k + j, "image_id": k + start, "caption": f"thing {k + start} in way {j}\n"}
            for k in range(n)
            for j in range(captions)
        ]
        for k in range(n):
            picture(root / split / f"{k:012d}.jpg", k + start)
        found = {"info": {}, "images": images, "annotations": rows}
        write(root / "annotations" / f"captions_{split}.json", json.dumps(found))
        write(root / "annotations" / f"instances_{split}.json", json.dumps({**found, "annotations": []}))
    return root


def karpathy(root: Path, n: int = 8) -> Path:
    splits = ["train", "restval", "val", "test"]
    rows = []
    for k in range(n):
        name = f"COCO_val2014_{k:012d}.jpg"
        picture(root / "val2014" / name, k)
        rows.append(
            {
                "filepath": "val2014", "filename": name, "split": splits[k % 4], "cocoid": k,
                "sentences": [{"raw": f"thing {k}", "tokens": ["thing"]}, {"raw": f"a thing {k}"}],
            }
        )  # fmt: skip
    write(root / "dataset_coco.json", json.dumps({"images": rows, "dataset": "coco"}))
    return root


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def packed(folder: Path, n: int = 8, start: int = 0) -> list[dict]:
    """Rows as the hub has them: the bytes of a picture, and its captions."""
    files = [picture(folder / f"{k}.png", k) for k in range(start, start + n)]
    return [
        {"image": {"bytes": file.read_bytes(), "path": None}, "caption": f"thing {start + k}"}
        for k, file in enumerate(files)
    ]


def idx(root: Path, pack: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", 12), ("t10k", 4)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 3
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            path = root / f"{split}-{what}-ubyte"
            path.write_bytes(head + array.tobytes())
            if pack:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    return root


def zipped(path: Path, n: int = 8) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for k in range(n):
            file.write(picture(path.parent / "loose" / f"{k}.png", k), f"set/{k}.png")
            file.writestr(f"set/{k}.txt", f"thing {k}")
    return path


def captions(source) -> dict[str, list[str]]:
    return {name: source.captions(i) for i, name in enumerate(source.names)}
