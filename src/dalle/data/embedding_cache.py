"""What a frozen CLIP makes of a source, computed once and kept on disk as memory-mapped arrays.

A cache is a folder `<key>/` of .npy files and a `meta.json`. It is written under another name and renamed
once it is complete, so whatever bears the right name is a whole cache; checksums show later damage. That part
(`open_or_build`) also serves `codes.py`.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from dalle.data.batch import Batch
from dalle.data.buckets import Buckets
from dalle.data.frozen import FrozenCLIP
from dalle.data.sources import Source, SourceDataset, Tokenize, captions_of
from dalle.files import atomic_folder, reserve, write_json
from dalle.reading import check_file

FORMAT = 1  # raise it when the files change
CHUNK = 256  # items or captions embedded at a time
Cache = TypeVar("Cache")
TEXT = {  # name -> type on disk; half precision for the states, which are many and follow a layer norm
    "text": np.int32,
    "text_embed": np.float32,
    "text_hidden": np.float16,
    "text_mask": np.bool_,
}
IN_BATCH = {
    "text": torch.int64,
    "text_embed": torch.float32,
    "text_hidden": torch.float32,
    "text_mask": torch.bool,
}


class BrokenCache(Exception):
    """A cache that is damaged, or of another format. It is built anew."""


class EmbeddingCache:
    """Raw embeddings of the items 0..n-1 of a source, read-only, straight from disk.

    `has_text` says whether captions are there too (their states can be too large to keep). Then every caption
    is one row of the arrays about text, and the captions of item i are the rows first[i] .. first[i + 1] - 1.

    Raises:
        BrokenCache: something is missing; with `verify`, also if any byte has changed.
    """

    def __init__(self, path: Path, verify: bool = False):
        self.path = path
        try:
            meta = read_meta(path, verify)
            self.has_text: bool = meta["text"]
            self.image_embed = self._open("image_embed")
            if self.has_text:
                self.first = np.array(self._open("first"))
                self.captions: list[str] = json.loads((path / "captions.json").read_text(encoding="utf-8"))
                self._text = {name: self._open(name) for name in TEXT}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenCache(str(error)) from error

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)  # a worker process opens the files again instead of receiving a copy

    def __len__(self) -> int:
        return len(self.image_embed)

    def images(self, items: Sequence[int]) -> Tensor:
        """(B, E) float32."""
        return torch.from_numpy(np.array(self.image_embed[list(items)]))

    def texts(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """`text` (B, T), `text_embed` (B, E), `text_hidden` (B, T, D), `text_mask` (B, T) of these rows."""
        taken = {name: torch.from_numpy(np.array(array[list(rows)])) for name, array in self._text.items()}
        return {name: tensor.to(IN_BATCH[name]) for name, tensor in taken.items()}

    def _open(self, name: str) -> np.ndarray:
        return np.load(self.path / f"{name}.npy", mmap_mode="r")


class CachedDataset(SourceDataset):
    """A `SourceDataset` whose embeddings come from a cache; only what is not in it is asked of the source."""

    def __init__(
        self,
        source: Source,
        cache: EmbeddingCache,
        tokenize: Tokenize,
        images: bool,
        seed: int | None,
        buckets: Buckets | None = None,
    ):
        super().__init__(source, None if cache.has_text else tokenize, images, seed, buckets)
        self.cache = cache

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        epoch, items = self.split_virtual(indices)
        if not self.cache.has_text:
            batch = super().__getitems__(indices)
        else:
            first = self.cache.first
            rows = self.choose(epoch, items, [range(int(first[i]), int(first[i + 1])) for i in items])
            batch = Batch(index=torch.tensor(items), caption=[self.cache.captions[row] for row in rows])
            batch.update(self.cache.texts(rows))  # pyright: ignore[reportCallIssue, reportArgumentType]  # keys of a batch, which the hint does not say
            if self.with_images:
                batch["image"] = self.pictures(items, epoch)
        batch["image_embed"] = self.cache.images(items)
        return batch


def cached_embeddings(
    cache_dir: Path,
    source: Source,
    clip: FrozenCLIP,
    items: int,
    text_bytes: int,
    first_only: bool = False,
    verify: bool = True,
) -> EmbeddingCache:
    """Opens the cache for the first `items` items of a source, building it where it is missing or broken.

    Args:
        text_bytes: captions are kept where they take at most so many bytes.
        first_only: keep only the first caption of each item (validation uses no other).
        verify: compare checksums; False where another process has just done so.
    """
    facts = [*clip.made_by, clip.tokenizer.to_dict(), source.fingerprint(), source.image_size]
    path = cache_dir / cache_key(*facts, items, text_bytes, first_only)

    def build(folder: Path) -> dict[str, Any]:
        return _build(folder, source, clip, items, text_bytes, first_only)

    return open_or_build(path, EmbeddingCache, build, f"Embeddings of {items} items", verify)


def cache_key(*facts: Any) -> str:
    """The name of a cache: a hash of everything that its files depend on."""
    return hashlib.sha256(json.dumps([FORMAT, *facts], sort_keys=True).encode()).hexdigest()[:24]


def open_or_build(
    path: Path,
    open_cache: Callable[[Path, bool], Cache],
    build: Callable[[Path], dict[str, Any]],
    what: str,
    verify: bool,
) -> Cache:
    """Opens the cache at `path`, building it where it is missing or broken.

    Args:
        open_cache: opens a folder, `open_cache(path, verify)`; raises BrokenCache.
        build: fills a folder with files and gives what else its `meta.json` says.
        what: what is in it, for messages.
        verify: compare checksums; False where another process has just done so.
    """
    if path.exists():
        try:
            cache = open_cache(path, verify)
            if verify:
                rank_zero_info(f"{what}: read from {path}")
            return cache
        except BrokenCache as error:
            rank_zero_info(f"{what}: {path} is damaged ({error}); computing them again")
            shutil.rmtree(path)
    with atomic_folder(path) as folder:
        meta = build(folder)
        files = {file.name: [file.stat().st_size, _checksum(file)] for file in sorted(folder.iterdir())}
        write_json(folder / "meta.json", {**meta, "format": FORMAT, "files": files}, indent=None)
    return open_cache(path, False)


def read_meta(path: Path, verify: bool) -> dict[str, Any]:
    """The cache's `meta.json`. Raises BrokenCache where a file is cut short or, with `verify`, changed."""
    check_file(path / "meta.json")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise BrokenCache(f"format {meta['format']}, not {FORMAT}")
    for name, (size, checksum) in meta["files"].items():
        if (path / name).stat().st_size != size:
            raise BrokenCache(f"{name} is cut short")
        if verify and _checksum(path / name) != checksum:
            raise BrokenCache(f"{name} has changed")
    return meta


def _build(
    folder: Path, source: Source, clip: FrozenCLIP, items: int, text_bytes: int, first_only: bool
) -> dict[str, Any]:
    with tqdm(total=items, desc=f"Embedding {items} pictures", unit="") as progress:
        images = create(folder, "image_embed", np.float32, items, clip.embed_dim)
        for chunk in chunks(items):
            embed = clip.embed_image(source.images(chunk).to(clip.device))
            images[chunk.start : chunk.stop] = embed.cpu().numpy()
            progress.update(len(chunk))
        images.flush()
    captions = [
        some[: 1 if first_only else None] for chunk in chunks(items) for some in captions_of(source, chunk)
    ]
    text = _text_size(clip, sum(map(len, captions))) <= text_bytes
    if text:
        _build_text(folder, clip, captions)
    return {"text": text}


def _build_text(folder: Path, clip: FrozenCLIP, captions: list[list[str]]) -> None:
    flat = [caption for group in captions for caption in group]
    np.save(folder / "first.npy", np.cumsum([0, *map(len, captions)]))
    write_json(folder / "captions.json", flat, indent=None)
    shapes = {"text": (clip.context_length,), "text_mask": (clip.context_length,)}
    shapes |= {"text_embed": (clip.embed_dim,), "text_hidden": (clip.context_length, clip.text_width)}
    arrays = {name: create(folder, name, kind, len(flat), *shapes[name]) for name, kind in TEXT.items()}
    with tqdm(total=len(flat), desc=f"Embedding {len(flat)} captions", unit="") as progress:
        for chunk in chunks(len(flat)):
            text = clip.tokenizer(flat[chunk.start : chunk.stop]).to(clip.device)
            for name, values in {"text": text, **clip.embed_text(text)}.items():
                arrays[name][chunk.start : chunk.stop] = values.cpu().numpy()
            progress.update(len(chunk))
    for array in arrays.values():
        array.flush()


def _text_size(clip: FrozenCLIP, captions: int) -> int:
    """Bytes of the arrays about text."""
    tokens = clip.context_length
    return captions * (4 * tokens + 4 * clip.embed_dim + 2 * tokens * clip.text_width + tokens)


def create(folder: Path, name: str, kind: type[np.generic], *shape: int) -> np.memmap:
    """An array on disk, to be filled."""
    array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape)
    reserve(folder / f"{name}.npy")
    return array


def chunks(n: int) -> Iterator[range]:
    """0 .. n-1 in portions that a network takes at a time."""
    return (range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
