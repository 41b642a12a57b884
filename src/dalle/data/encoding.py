"""Writes what a frozen network makes of captioned pictures, as shards that any number of processes fill.

The layout is that of clip-retrieval's embedding folders, one for each split:

    SPLIT/img_emb/img_emb_000.npy        (n, E), one row for each picture
    SPLIT/text_emb/text_emb_000.npy      (m, E), one row for each caption, those of the first picture first
    SPLIT/text/ text_hidden/ text_mask/  (m, T) ids, (m, T, D) states, (m, T) True = real, where asked for
    SPLIT/codes/ latents/ latents_logvar/   instead, one row for each picture
    SPLIT/metadata/metadata_000.parquet  `image_path`, `caption` (the first), `captions`, `index`

`manifest.json` says which network and which data. The metadata of a shard are written last: a shard with them
is whole. A process takes the next shard that is neither whole nor locked by another one, so whoever is killed
is started again.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dalle.data.encoded import ADVICE, MANIFEST, SCHEMA, array_path, metadata_path
from dalle.data.frozen import Frozen, FrozenCLIP, FrozenTokenizer
from dalle.data.sources import Source, captions_of, identity_collate
from dalle.errors import UserError
from dalle.files import LEFT, atomic_path, clean, explained, reserve, write_json
from dalle.locks import locked
from dalle.ranges import PositiveInt, Workers
from dalle.reading import read_json
from dalle.schemas import EncodedManifest

Kind = Literal["clip", "codes", "latents"]
Arrays = dict[str, np.ndarray]
SPLITS = ("train", "val", "test")
MEASURED = 256  # pictures on which bf16 is compared with fp32


@dataclass(frozen=True)
class Options:
    """How it is written.

    Args:
        shard_items: pictures in a shard.
        batch_size: pictures that a network takes at a time.
        num_workers: processes that read pictures.
        precision: fp32 or bf16, of the network.
        dtype: float32 or float16, of embeddings and latents on disk; text states are float16.
        text_states: write ids, states and mask of captions, too: what priors and decoders read.
    """

    shard_items: PositiveInt = 10_000
    batch_size: PositiveInt = 256
    num_workers: Workers = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    dtype: Literal["float32", "float16"] = "float32"
    text_states: bool = True


class Encoder:
    """A frozen network and the arrays that it makes."""

    def __init__(self, kind: Kind, net: Frozen, options: Options) -> None:
        self.kind, self.net, self.options = kind, net, options

    def facts(self) -> dict[str, Any]:
        """What a reader must know of the network."""
        net = self.net
        if isinstance(net, FrozenCLIP):
            return {
                "embed_dim": net.embed_dim,
                "text_width": net.text_width,
                "context_length": net.context_length,
            }
        if isinstance(net, FrozenTokenizer):
            return {"vocab_size": net.vocab_size, "grid": net.grid}
        return {"latent_dim": net.net.latent_dim}

    @torch.no_grad()
    def images(self, image: Tensor, precision: str | None = None) -> Arrays:
        """Pictures (B, 3, S, S) in [-1, 1] -> arrays with a row for each."""
        bf16 = (precision or self.options.precision) == "bf16"
        image, net, kind = image.to(self.net.device), self.net.net, np.dtype(self.options.dtype)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            if isinstance(self.net, FrozenCLIP):
                return {"img_emb": _numpy(net.encode_image(image), kind)}
            if isinstance(self.net, FrozenTokenizer):
                narrow = np.uint16 if self.net.vocab_size <= 2**16 else np.int32
                return {"codes": _numpy(net.encode(image), np.dtype(narrow))}
            mean, log_variance = net.encode(image)
            return {"latents": _numpy(mean, kind), "latents_logvar": _numpy(log_variance, kind)}

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Arrays:
        """Captions -> arrays with a row for each; none but of a CLIP."""
        if not isinstance(self.net, FrozenCLIP):
            return {}
        text = self.net.tokenizer(captions).to(self.net.device)
        with torch.autocast(text.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            embed, hidden, mask = self.net.net.encode_text(text)
        made = {"text_emb": _numpy(embed, np.dtype(self.options.dtype))}
        if not self.options.text_states:
            return made
        return made | {
            "text": _numpy(text, np.dtype(np.int32)),
            "text_hidden": _numpy(hidden, np.dtype(np.float16)),
            "text_mask": _numpy(mask, np.dtype(np.bool_)),
        }

    def difference(self, image: Tensor) -> dict[str, float]:
        """How far the chosen precision is from fp32, on some pictures."""
        exact, made = self.images(image, "fp32"), self.images(image)
        if self.kind == "codes":
            return {"codes_that_differ": float((exact["codes"] != made["codes"]).mean())}
        name = "img_emb" if self.kind == "clip" else "latents"
        a, b = (arrays[name].astype(np.float64) for arrays in (exact, made))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = (a * b).sum(1) / np.maximum(norms, 1e-12)
        return {"mean_cosine": float(cosines.mean()), "least_cosine": float(cosines.min())}


def _numpy(tensor: Tensor, kind: np.dtype) -> np.ndarray:
    """Raises UserError for numbers that are none, or beyond what so few bits can hold."""
    if not tensor.is_floating_point():
        return tensor.cpu().numpy().astype(kind)
    with np.errstate(over="ignore"):
        made = tensor.float().cpu().numpy().astype(kind)
    if not np.isfinite(made).all():
        raise UserError(
            f"the network gives numbers that are none, or too large for {kind}: give precision=fp32 and "
            "dtype=float32; of a CLIP text_states=false leaves the states out, which are always float16"
        )
    return made


class Portions(Dataset):
    """Portions of consecutive items: pictures, captions, names."""

    def __init__(self, source: Source, portions: Sequence[range]) -> None:
        self.source, self.portions = source, portions

    def __len__(self) -> int:
        return len(self.portions)

    def __getitem__(self, number: int) -> tuple[Tensor, list[list[str]], list[str]]:
        items = self.portions[number]
        image = self.source.images(items)  # first: a picture found broken takes its caption with it
        called = getattr(self.source, "called", None)
        return image, captions_of(self.source, items), [called(item) if called else "" for item in items]


def encode(
    encoder: Encoder, sources: dict[str, Source], described: dict[str, Any], out: Path
) -> tuple[int, int, int]:
    """Writes all shards that are free and not there.

    Args:
        sources: by split.
        described: what the manifest says of the data: `node`, the settings that make them.

    Returns:
        shards written now, shards that are whole, all shards.

    Raises:
        UserError: the folder holds something else, or what another network or other data gave; the disk is
            full.
    """
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    _agree(encoder, sources, described, out)
    todo = [
        (split, k, items) for split, s in sources.items() for k, items in enumerate(_shards(len(s), encoder))
    ]
    width = len(str(max((k for _, k, _ in todo), default=0)))
    (out / ".locks").mkdir(exist_ok=True)
    for folder in chain.from_iterable((out / split).glob("*") for split in sources):
        clean(folder)
    written = 0
    whole = [metadata_path(out, split, k, width).exists() for split, k, _ in todo]
    with tqdm(
        total=sum(len(i) for _, _, i in todo), desc=f"Encoding into {out}", unit="", disable=None
    ) as bar:
        bar.update(sum(len(items) for (_, _, items), there in zip(todo, whole, strict=True) if there))
        for split, k, items in todo:
            place = metadata_path(out, split, k, width)
            if place.exists():
                continue
            with locked(out / ".locks" / f"{split}_{k}") as free:
                if free is None or place.exists():
                    continue
                _write(
                    encoder,
                    sources[split],
                    items,
                    partial(array_path, out, split, number=k, width=width),
                    place,
                    bar,
                )
                written += 1
    there = sum(metadata_path(out, split, k, width).exists() for split, k, _ in todo)
    return written, there, len(todo)


def _shards(n: int, encoder: Encoder) -> list[range]:
    step = encoder.options.shard_items
    return [range(start, min(start + step, n)) for start in range(0, n, step)]


def _agree(encoder: Encoder, sources: dict[str, Source], described: dict[str, Any], out: Path) -> None:
    """Writes the manifest, or holds to the one that is there."""
    options = encoder.options
    first = next(iter(sources.values()))
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": encoder.kind,
        "weights": encoder.net.weights_hash,
        "network": encoder.facts(),
        "image_size": first.image_size,
        "precision": options.precision,
        "dtype": options.dtype,
        "text_states": options.text_states and encoder.kind == "clip",
        "shard_items": options.shard_items,
        "fingerprint": {split: source.fingerprint() for split, source in sources.items()},
        "items": {split: len(source) for split, source in sources.items()},
    }
    if _is_begun(out, facts):
        return
    with locked(out / ".lock", wait=f"{out}: another process is beginning there; waiting for it"):
        if _is_begun(out, facts):
            return
        clean(out)
        if options.precision != "fp32":
            facts["difference"] = encoder.difference(first.images(range(min(MEASURED, len(first)))))
            said = ", ".join(f"{name} {value:.6f}" for name, value in facts["difference"].items())
            print(
                f"{options.precision} beside fp32 on {min(MEASURED, len(first))} pictures: {said}", flush=True
            )
        write_json(out / MANIFEST, facts | {"data": described})


def _is_begun(out: Path, facts: dict[str, Any]) -> bool:
    """Whether there is a manifest that says the same, else nothing; whatever is there stays as it is."""
    if (out / MANIFEST).exists():
        there = dict(read_json(out / MANIFEST, EncodedManifest, f"{ADVICE}, or give another out="))
        other = [f"{key} {there[key]}, here {value}" for key, value in facts.items() if there[key] != value]
        if other:
            raise UserError(f"{out} holds what was encoded otherwise ({'; '.join(other)}); give another out=")
        return True
    if strange := [name for name in sorted(os.listdir(out)) if name != ".lock" and not LEFT.fullmatch(name)]:
        raise UserError(f"{out} holds something else ({strange[0]}); give another out=")
    return False


def _write(encoder: Encoder, source: Source, items: range, place: Any, metadata: Path, bar: Any) -> None:
    """One shard: arrays first, metadata last."""
    size = encoder.options.batch_size
    portions = [items[start : start + size] for start in range(0, len(items), size)]
    loader = DataLoader(
        Portions(source, portions), batch_size=None, collate_fn=identity_collate,
        num_workers=min(encoder.options.num_workers, len(portions)),
    )  # fmt: skip
    captions: list[list[str]] = []
    names: list[str] = []

    def pictures() -> Iterator[Arrays]:
        for image, some, called in loader:
            captions.extend(some)
            names.extend(called)
            yield encoder.images(image)
            bar.update(len(image))

    def texts() -> Iterator[Arrays]:
        for start in range(0, len(flat), size):
            yield encoder.texts(flat[start : start + size])

    _fill(pictures(), len(items), place)
    flat = [caption for some in captions for caption in some]
    if encoder.kind == "clip":
        _fill(texts(), len(flat), place)
    _write_metadata(metadata, names, captions, items)


def _fill(portions: Iterator[Arrays], rows: int, place: Any) -> None:
    """Writes arrays of so many rows as portions of them come; none is there before all are whole."""
    with contextlib.ExitStack() as stack:
        files: dict[str, np.memmap] = {}
        at = 0
        for made in portions:
            for name, values in made.items():
                if name not in files:
                    hidden = stack.enter_context(atomic_path(place(name), sync=False))
                    shape = (rows, *values.shape[1:])
                    files[name] = np.lib.format.open_memmap(
                        hidden, mode="w+", dtype=values.dtype, shape=shape
                    )
                    reserve(hidden)
                files[name][at : at + len(values)] = values
            at += len(next(iter(made.values())))
        for file in files.values():
            file.flush()


def _write_metadata(path: Path, names: list[str], captions: list[list[str]], items: range) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "captions are written as parquet, which needs pyarrow: pip install 'dalle[data]'"
        ) from None
    table = pa.table(
        {
            "image_path": pa.array(names, pa.string()),
            "caption": pa.array([some[0] for some in captions], pa.string()),
            "captions": pa.array(captions, pa.list_(pa.string())),
            "index": pa.array(items, pa.int64()),
        }
    )
    with atomic_path(path, sync=True) as hidden:
        parquet.write_table(table, hidden)
