"""Pictures a second from shards, beside raw decoding by webdataset: `python benchmarks/shards.py`.

Makes JPEGs of 256 px with captions in tar files, and reads them once in each way, in batches, by worker
processes: ours (shuffled, with captions) and `webdataset` with Pillow's decoding, each at 256 px, and
brought to 64 px. All give bytes; numbers in [-1, 1], which ours become on the device, are measured here, too,
made by the one process that gets the batches. The ways take turns; the median counts, and the ratio within a
turn. Give it cores with `taskset`.
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from dalle.data import picture_reader
from dalle.data.sources import EpochSampler, SourceDataset, identity_collate
from dalle.data.webdataset import WebDataset
from dalle.images import from_uint8

SIDE, BATCH, SHARD = 256, 64, 500


def make(folder: Path, items: int) -> list[str]:
    """Shards of smooth noise with an edge, which JPEG packs as it does photographs."""
    paths = []
    for k in range(0, items, SHARD):
        path = folder / f"{k // SHARD:05d}.tar"
        with tarfile.open(path, "w") as file:
            for item in range(k, min(k + SHARD, items)):
                rng = np.random.default_rng(item)
                coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
                values = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
                values = values + rng.normal(0, 6, values.shape) + 40 * (np.arange(SIDE)[:, None, None] > 99)
                held = BytesIO()
                Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(held, "JPEG", quality=90)
                for kind, content in (("jpg", held.getvalue()), ("txt", f"thing {item}".encode())):
                    info = tarfile.TarInfo(f"{item:08d}.{kind}")
                    info.size = len(content)
                    file.addfile(info, BytesIO(content))
        paths.append(str(path))
    return paths


def ours(folder: Path, side: int, workers: int) -> Iterable[object]:
    source = WebDataset("train", folder, side, val_fraction=0.0, test_fraction=0.0)
    sampler = EpochSampler(len(source), BATCH, shuffle=True, order=source.order)
    return DataLoader(
        SourceDataset(source, seed=0), batch_sampler=sampler, collate_fn=identity_collate, num_workers=workers
    )


def as_numbers(loader: Iterable[Any]) -> Iterable[object]:
    for batch in loader:
        yield from_uint8(batch["image"])


def shrunk(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))


def raw(paths: list[str], side: int, workers: int) -> Iterable[object]:
    kind = "rgb8" if side == SIDE else "pil"
    data = webdataset.WebDataset(paths, shardshuffle=False).decode(kind).to_tuple("jpg", "txt")
    if side != SIDE:
        data = data.map_tuple(shrunk)
    return DataLoader(data.batched(BATCH), batch_size=None, num_workers=workers)  # pyright: ignore[reportArgumentType]


def seconds(loader: Iterable[object]) -> float:
    """Of a pass, workers being started included."""
    begun = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    picture_reader.MEMORY = 0  # as of sets too large to keep
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        (folder := Path(place, "shards")).mkdir()
        paths = make(folder, args.items)
        size = sum(os.path.getsize(path) for path in paths) / args.items / 1000
        print(f"{args.items} JPEGs of {SIDE} px, {size:.0f} kB each; {args.workers} workers, "
              f"{len(os.sched_getaffinity(0))} cores")  # fmt: skip
        ways: dict[str, Callable[[], Iterable[object]]] = {
            "webdataset at 256 px": lambda: raw(paths, SIDE, args.workers),
            "ours at 256 px": lambda: ours(folder, SIDE, args.workers),
            "ours at 256 px, in [-1, 1]": lambda: as_numbers(ours(folder, SIDE, args.workers)),
            "webdataset at 64 px": lambda: raw(paths, 64, args.workers),
            "ours at 64 px": lambda: ours(folder, 64, args.workers),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                taken[name].append(seconds(way()))
        for name, times in taken.items():
            base = taken["webdataset at 64 px" if "64" in name else "webdataset at 256 px"]
            ratio = statistics.median(b / t for b, t in zip(base, times, strict=True))
            print(f"{name:<30}{args.items / statistics.median(times):8,.0f} pictures/s{ratio:8.2f}")


if __name__ == "__main__":
    main()
