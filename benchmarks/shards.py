"""Pictures a second from shards, beside raw decoding by webdataset: `python benchmarks/shards.py`.

Makes JPEGs of 256 px with captions in tar files, and reads them once in each way, in batches, by worker
processes: ours (shuffled, with captions, as float tensors at 256 px and at 64 px) and `webdataset` with
Pillow's decoding to bytes. The ways take turns; the median counts. Give it cores with `taskset`.
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

import numpy as np
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from dalle.data import picture_reader
from dalle.data.sources import EpochSampler, SourceDataset, identity_collate
from dalle.data.webdataset import WebDataset

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


def raw(paths: list[str], workers: int) -> Iterable[object]:
    data = webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt")
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
            "webdataset, bytes at 256 px": lambda: raw(paths, args.workers),
            "ours, tensors at 256 px": lambda: ours(folder, SIDE, args.workers),
            "ours, tensors at 64 px": lambda: ours(folder, 64, args.workers),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                taken[name].append(seconds(way()))
        for name, times in taken.items():
            print(f"{name:<30}{args.items / statistics.median(times):8,.0f} pictures/s")


if __name__ == "__main__":
    main()
