"""The codes that a frozen image tokenizer makes of a source, computed once and kept on disk.

One row of 16-bit codes (32-bit where the vocabulary asks for it) for each picture, in a cache of the kind of
`cache.py` that is found by the hash of the tokenizer's weights and of the pictures. Captions are kept beside
them: a picture that turns out broken when it is read leaves its place, and its caption, to another.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from dalle.data.batch import Batch
from dalle.data.embedding_cache import BrokenCache, cache_key, chunks, create, open_or_build, read_meta
from dalle.data.frozen import FrozenTokenizer
from dalle.data.sources import Source, SourceDataset, captions_of, mix, stored_images
from dalle.data.tokenizers import TextTokenizer
from dalle.files import write_json


class CodeCache:
    """Codes and captions of the items 0..n-1 of a source, the codes read-only and straight from disk.

    Raises:
        BrokenCache: something is missing; with `verify`, also if any byte has changed.
    """

    def __init__(self, path: Path, verify: bool = False) -> None:
        self.path = path
        try:
            read_meta(path, verify)
            self.codes = np.load(path / "codes.npy", mmap_mode="r")
            self.captions: list[list[str]] = json.loads((path / "captions.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenCache(str(error)) from error

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)  # a worker process opens the files again instead of receiving a copy

    def __len__(self) -> int:
        return len(self.codes)

    def __call__(self, items: Sequence[int]) -> Int64[Tensor, "b n"]:
        return torch.from_numpy(self.codes[list(items)].astype(np.int64))


def cached_codes(
    cache_dir: Path, source: Source, tokenizer: FrozenTokenizer, items: int, verify: bool = True
) -> CodeCache:
    """Opens the cache for the first `items` items of a source, building it where it is missing or broken.

    Args:
        verify: compare checksums; False where another process has just done so.
    """
    key = cache_key("codes", *tokenizer.made_by, source.fingerprint(), source.image_size, items)

    def build(folder: Path) -> dict[str, Any]:
        return _build(folder, source, tokenizer, items)

    return open_or_build(cache_dir / key, CodeCache, build, f"Codes of {items} pictures", verify)


def _build(folder: Path, source: Source, tokenizer: FrozenTokenizer, items: int) -> dict[str, Any]:
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    codes = create(folder, "codes", kind, items, tokenizer.grid**2)
    captions = []
    with tqdm(total=items, desc=f"Encoding {items} pictures", unit="", disable=None) as progress:
        for chunk in chunks(items):
            image = source.images(chunk).to(tokenizer.device)
            codes[chunk.start : chunk.stop] = tokenizer.encode(image).cpu().numpy()
            captions += captions_of(source, chunk)
            progress.update(len(chunk))
    codes.flush()
    write_json(folder / "captions.json", captions, indent=None)
    return {}


class CodeDataset(SourceDataset):
    """Batches of `text`, `caption`, `index`, and `codes` from a cache; without one, of the `image` to encode.

    Args:
        images: also give `image` where codes come from a cache.
        seed: which caption of an item is used, and how it falls into tokens, in which epoch; None = always
            the first caption.
        dropout: share of the tokenizer's merges that are left out (BPE dropout, Provilkov et al. 2020).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: TextTokenizer,
        cache: CodeCache | None,
        images: bool,
        seed: int | None,
        dropout: float,
    ) -> None:
        super().__init__(source, images=images or cache is None, seed=seed)
        self.tokenizer, self.cache, self.dropout = tokenizer, cache, dropout

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        epoch, items = self.split_virtual(indices)
        if self.cache is None:
            batch = super().__getitems__(indices)
        else:
            batch = Batch(index=torch.tensor(items), codes=self.cache(items))
            batch["caption"] = self.choose(epoch, items, [self.cache.captions[i] for i in items])
            if self.with_images:
                batch["image"] = stored_images(self.source, items, epoch)
        options: dict[str, Any] = {}
        if self.dropout:
            seeds = [
                mix(self.seed or 0, epoch, item, 2) for item in items
            ]  # 2: not the caption's, not the crop's
            options = {"dropout": self.dropout, "seeds": seeds}
        batch["text"] = self.tokenizer(batch["caption"], **options)
        return batch
