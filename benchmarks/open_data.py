"""How long it takes to open many pictures: the first time, and again in another process.

Makes small JPEGs with captions, in the ways people keep them, and opens each as `dalle train` does (all three
splits). The second opening finds in the index what the first has seen. The disk's cache is warm: the files
have just been written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

OPEN = """
import time
from dalle.data.{module} import {name}
start, before = time.perf_counter(), time.process_time()
sizes = [len({name}(split, {place!r}, 64)) for split in ("train", "val", "test")]
print("took", time.perf_counter() - start, time.process_time() - before, sum(sizes))
"""
KINDS = {
    "a .txt each": ("folder", "Folder", "texts"),
    "metadata.jsonl": ("folder", "Folder", "table"),
    "COCO, 5 captions": ("coco", "Coco", "coco"),
    "TSV of paths": ("table", "Table", "table.tsv"),
    "parquet": ("hf", "HuggingFace", "packed"),
}


def jpegs(side: int, kinds: int = 64) -> list[bytes]:
    rng, out = np.random.default_rng(0), []
    for _ in range(kinds):
        rough = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        held = BytesIO()
        rough.resize((side, side), Image.Resampling.BICUBIC).save(held, "JPEG", quality=90)
        out.append(held.getvalue())
    return out


def make(root: Path, pictures: int, side: int) -> None:
    """No two files are equal: what follows the end of a JPEG is no part of the picture."""
    some = jpegs(side)
    names = [f"{k // 1000:03d}/{k:06d}.jpg" for k in range(pictures)]
    for folder in ("texts", "table", "coco/train2017"):
        for k, name in enumerate(names):
            path = root / folder / (name if folder != "coco/train2017" else Path(name).name)
            if not k % 1000:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(some[k % len(some)] + k.to_bytes(4, "big"))
            if folder == "texts":
                path.with_suffix(".txt").write_text(f"a picture of thing {k}\n")
    rows = [{"file_name": name, "text": f"a picture of thing {k}"} for k, name in enumerate(names)]
    (root / "table" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = "".join(f"table/{name}\ta picture of thing {k}\n" for k, name in enumerate(names))
    (root / "table.tsv").write_text(f"filepath\ttitle\n{lines}")
    images = [{"id": k, "file_name": Path(name).name} for k, name in enumerate(names)]
    captions = [
        {"id": 5 * k + j, "image_id": k, "caption": f"a picture of thing {k}, way {j}"}
        for k in range(pictures)
        for j in range(5)
    ]
    (root / "coco" / "annotations").mkdir()
    place = root / "coco" / "annotations" / "captions_train2017.json"
    place.write_text(json.dumps({"images": images, "annotations": captions}))
    pack(root / "packed", some, pictures)


def pack(folder: Path, some: list[bytes], pictures: int, shard: int = 10_000) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    count = -(-pictures // shard)
    for number in range(count):
        rows = [
            {
                "image": {"bytes": some[k % len(some)] + k.to_bytes(4, "big"), "path": None},
                "text": f"thing {k}",
            }
            for k in range(number * shard, min(pictures, (number + 1) * shard))
        ]
        place = folder / f"train-{number:05d}-of-{count:05d}.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), place)


def opened(kind: str, root: Path) -> tuple[str, int]:
    """Seconds, and in brackets those of the CPU; how many pictures there are."""
    module, name, place = KINDS[kind]
    code = OPEN.format(module=module, name=name, place=str(root / place))
    cache = {"XDG_CACHE_HOME": str(root / "cache"), "HF_HOME": str(root / "cache" / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | cache, capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("took "))
    _, seconds, cpu, items = line.split()
    return f"{float(seconds):.1f} ({float(cpu):.1f})", int(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=256, help="px")
    parser.add_argument("--only", default="", help="only kinds whose name contains this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start = time.perf_counter()
        make(root, args.pictures, args.side)
        print(f"{args.pictures:,} JPEGs of {args.side} px, made in {time.perf_counter() - start:.0f} s")
        print(f"{'kept as':<18} {'first':>14} {'again':>14}   seconds (of the CPU)")
        for kind in KINDS:
            if args.only in kind:
                (first, items), (again, _) = opened(kind, root), opened(kind, root)
                assert items == args.pictures, (kind, items)
                print(f"{kind:<18} {first:>14} {again:>14}", flush=True)


if __name__ == "__main__":
    main()
