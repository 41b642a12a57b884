"""What `dalle encode` has written, as a `Source`: embeddings or codes are read, no network makes them again.

Pictures come from the data that were encoded, where they are still there and asked for: to train a prior, or
the transformer on codes, none are. Arrays stay on disk, memory-mapped, and captions in Arrow's own memory.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dalle.data.code_cache import CodeCache
from dalle.data.embedding_cache import IN_BATCH, EmbeddingCache
from dalle.data.frozen import Frozen
from dalle.data.pictures import say
from dalle.data.shuffling import ShardOrder
from dalle.data.sources import Source, source_of
from dalle.data.splits import Split
from dalle.errors import UserError
from dalle.ranges import Place, PositiveInt, Side
from dalle.reading import check_file, read_json
from dalle.schemas import EncodedManifest
from dalle.trust import listed

SCHEMA = 1  # of the manifest and the files
MANIFEST = "manifest.json"
ADVICE = "encode it again"
SIZES = {  # of the network, by kind, what a manifest must say
    "clip": ("embed_dim", "text_width", "context_length"),
    "codes": ("vocab_size", "grid"),
}
TEXT = {"text": "text", "text_emb": "text_embed", "text_hidden": "text_hidden", "text_mask": "text_mask"}


def array_path(out: Path, split: str, name: str, number: int, width: int) -> Path:
    return out / split / name / f"{name}_{number:0{width}d}.npy"


def metadata_path(out: Path, split: str, number: int, width: int) -> Path:
    return out / split / "metadata" / f"metadata_{number:0{width}d}.parquet"


def read_manifest(path: Place) -> EncodedManifest:
    """Of a folder that `dalle encode` has written.

    Raises:
        UserError: no such folder, or one of another layout.
    """
    file = Path(path).expanduser() / MANIFEST
    if not file.is_file():
        raise UserError(
            f"data.path={path} holds no {MANIFEST}; dalle encode clip data=... out={path} writes it"
        )
    manifest = read_json(file, EncodedManifest, ADVICE)
    if manifest["schema"] != SCHEMA:
        raise UserError(f"{path} was written with layout {manifest['schema']}, this version reads {SCHEMA}")
    return manifest


class Rows:
    """Arrays of shards as one long array, read where asked.

    Args:
        shape: of a row.
        kind: what numbers there are: f: with a floating point, i: whole, b: true or false.
    """

    def __init__(self, files: Sequence[Path], first: np.ndarray, shape: tuple[int, ...], kind: str) -> None:
        self.files, self.first, self.shape, self.kind = tuple(files), first, shape, kind
        if self.files:  # the others when they are read: there may be thousands
            self._shard(0)

    def __len__(self) -> int:
        return int(self.first[-1])

    def __call__(self, rows: Sequence[int]) -> np.ndarray:
        """These rows, (k, ...), as they are on disk."""
        wanted = np.asarray(rows, np.int64)
        shards = np.searchsorted(self.first, wanted, "right") - 1
        parts = [(shards == shard, self._shard(int(shard))) for shard in np.unique(shards)]
        made = np.empty((len(wanted), *self.shape), parts[0][1].dtype if parts else np.uint8)
        for here, part in parts:
            made[here] = part[wanted[here] - self.first[shards[here][0]]]
        return made

    def _shard(self, number: int) -> np.ndarray:
        array, rows = _mapped(self.files[number]), int(self.first[number + 1] - self.first[number])
        if array.shape != (rows, *self.shape) or array.dtype.kind.replace("u", "i") != self.kind:
            raise UserError(
                f"{self.files[number]} is damaged: its shape is {list(array.shape)} of {array.dtype}, not "
                f"{[rows, *self.shape]}; {ADVICE}"
            )
        return array


@lru_cache(maxsize=4096)
def _mapped(path: Path) -> np.ndarray:
    try:
        check_file(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:100]}); {ADVICE}") from None


class Captions:
    """All captions in order, in Arrow's memory, which worker processes share."""

    def __init__(self, chunks: Sequence[Any], first: np.ndarray) -> None:
        self.chunks, self.first = chunks, first

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, row: int) -> str:
        shard = int(np.searchsorted(self.first, row, "right")) - 1
        return self.chunks[shard][int(row - self.first[shard])].as_py()


class EncodedEmbeddings(EmbeddingCache):
    """An `EmbeddingCache` of shards."""

    def __init__(self, source: "Encoded") -> None:
        self.source = source
        self.has_text = source.manifest["text_states"]
        self.first: np.ndarray = source.first_caption
        self.captions: Any = source.all_captions
        facts = source.manifest["network"]
        embed, length = (facts["embed_dim"],), facts["context_length"]
        rows = {"text": ((length,), "i"), "text_emb": (embed, "f"), "text_mask": ((length,), "b"),
                "text_hidden": ((length, facts["text_width"]), "f")}  # fmt: skip
        self._images = source.rows("img_emb", source.first, embed, "f")
        firsts = source.all_captions.first
        self._texts = {name: source.rows(name, firsts, *rows[name]) for name in TEXT} if self.has_text else {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source,)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, items: Sequence[int]) -> Float[Tensor, "b e"]:
        return torch.from_numpy(self._images(items).astype(np.float32))

    def texts(self, rows: Sequence[int]) -> dict[str, Tensor]:
        taken = {TEXT[name]: torch.from_numpy(some(rows)) for name, some in self._texts.items()}
        return {name: tensor.to(IN_BATCH[name]) for name, tensor in taken.items()}


class EncodedCodes(CodeCache):
    """A `CodeCache` of shards."""

    def __init__(self, source: "Encoded") -> None:
        self.source, self.vocab_size = source, source.manifest["network"]["vocab_size"]
        self._codes = source.rows("codes", source.first, (source.manifest["network"]["grid"] ** 2,), "i")
        self.captions: Any = CaptionLists(source)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source,)

    def __len__(self) -> int:
        return len(self._codes)

    def __call__(self, items: Sequence[int]) -> Int64[Tensor, "b n"]:
        codes = torch.from_numpy(self._codes(items).astype(np.int64))
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.vocab_size:
            raise UserError(f"{self.source.path} holds codes that are none of {self.vocab_size}; {ADVICE}")
        return codes


class CaptionLists:
    """The captions of each item."""

    def __init__(self, source: "Encoded") -> None:
        self.source = source

    def __getitem__(self, item: int) -> list[str]:
        return self.source.captions(item)


class Encoded:
    """One split of a folder that `dalle encode` has written.

    Args:
        split: train, val or test.
        path: the folder.
        image_size: that of what was encoded, or null; another is refused.
        shuffle_window: places among which samples are mixed; null: a whole epoch.

    Raises:
        UserError: no such folder, one of another layout, or not all of its shards. Of `embeddings` and
            `codes`: they are another network's. Of `images`: the pictures are not there any more, or others.
    """

    fixed = True
    has_classes = False

    def __init__(
        self,
        split: Split,
        path: Place,
        image_size: Side | None = None,
        shuffle_window: PositiveInt | None = None,
    ) -> None:
        self.split, self.path, self.shuffle_window = split, Path(path).expanduser(), shuffle_window
        self.manifest = read_manifest(self.path)
        self.image_size: int = self.manifest["image_size"]
        if image_size not in (None, self.image_size):
            raise UserError(
                f"data.image_size={image_size}, but {path} was encoded from pictures of {self.image_size} px"
            )
        self.items = self.manifest["items"].get(split, 0)
        step = self.manifest["shard_items"]
        most = max((-(-n // step) for n in self.manifest["items"].values()), default=0)
        self._width, self._shards = len(str(max(0, most - 1))), -(-self.items // step)
        name = f"metadata_{'[0-9]' * self._width}.parquet"
        there = sum(1 for _ in (self.path / split / "metadata").glob(name))
        if there < self._shards:
            raise UserError(
                f"{path}: {self._shards - there:,} of {self._shards:,} shards of {split} are still to be "
                "written; the same dalle encode command goes on"
            )
        self.first = np.minimum(np.arange(self._shards + 1) * step, self.items)
        sizes = ", ".join(f"{n:,} {name}" for name, n in self.manifest["items"].items())
        say(f"{path}: {self.manifest['kind']} of {sizes}, encoded by weights {self.manifest['weights']}")

    def __len__(self) -> int:
        return self.items

    def captions(self, item: int) -> list[str]:
        rows = range(int(self.first_caption[item]), int(self.first_caption[item + 1]))
        return [self.all_captions[row] for row in rows]

    def images(self, items: Sequence[int], epoch: int = 0) -> Float[Tensor, "b 3 s s"]:
        return self.pictures.images(items, epoch)

    def fingerprint(self) -> str:
        made = (self.manifest[key] for key in ("kind", "weights", "precision", "dtype"))
        return "-".join([self.manifest["fingerprint"].get(self.split, ""), *made, str(self.shuffle_window)])

    @property
    def order(self) -> Callable[[int, int, int], ShardOrder] | None:
        """Of an epoch, `order(seed, epoch, items)`; None: a permutation of all."""
        if self.shuffle_window is None:
            return None
        return lambda *which: ShardOrder(self.first, self.shuffle_window, False, *which)

    def embeddings(self, clip: Frozen) -> EncodedEmbeddings:
        self._check("clip", clip, "embeddings", "clip")
        return EncodedEmbeddings(self)

    def codes(self, tokenizer: Frozen) -> EncodedCodes:
        self._check("codes", tokenizer, "codes", "image_tokenizer")
        return EncodedCodes(self)

    def rows(self, name: str, first: np.ndarray, shape: tuple[int, ...], kind: str) -> Rows:
        files = [array_path(self.path, self.split, name, k, self._width) for k in range(self._shards)]
        return Rows(files, first, shape, kind)

    def _check(self, kind: str, net: Frozen, what: str, setting: str) -> None:
        found = self.manifest["kind"]
        if found != kind:
            raise UserError(
                f"{self.path} holds {found}, and {what} are needed: dalle encode {kind} writes them"
            )
        if (here := net.weights_hash) != (there := self.manifest["weights"]):
            raise UserError(
                f"{self.path} holds {what} by another network ({there}) than {setting} is now ({here}); "
                "encode them again, or name the run that made them"
            )
        for name in SIZES[kind]:
            if self.manifest["network"].get(name) != getattr(net, name):
                raise UserError(f"{self.path / MANIFEST} is damaged (network.{name}); {ADVICE}")

    @cached_property
    def pictures(self) -> Source:
        """The data that were encoded."""
        node, where = self.manifest["data"]["node"], f"{self.path / MANIFEST}: data"
        try:
            source = source_of(node, where, self.split, listed)
        except UserError as error:
            raise UserError(f"{self.path} holds no pictures, which are needed here, and {error}") from None
        if source.fingerprint() != self.manifest["fingerprint"].get(self.split):
            raise UserError(f"{self.path}: the pictures have changed since they were encoded; {ADVICE}")
        return source

    @cached_property
    def _metadata(self) -> tuple[np.ndarray, Captions]:
        from pyarrow import parquet

        counts, chunks = [np.zeros(1, np.int64)], []
        for k in range(self._shards):
            path = metadata_path(self.path, self.split, k, self._width)
            try:
                check_file(path)
                column = parquet.read_table(path, columns=["captions"]).column(0).combine_chunks()
                counts.append(np.asarray(column.value_lengths().to_numpy(zero_copy_only=False), np.int64))
            except Exception as error:  # Arrow's own kinds
                raise UserError(
                    f"{path} cannot be read ({' '.join(str(error).split())[:100]}); {ADVICE}"
                ) from None
            chunks.append(column.flatten())
        first = np.cumsum(np.concatenate(counts))
        if len(first) != self.items + 1:
            raise UserError(
                f"{self.path} is damaged: {len(first) - 1} captions for {self.items} items; {ADVICE}"
            )
        return first, Captions(chunks, np.cumsum([0, *map(len, chunks)]))

    @property
    def first_caption(self) -> np.ndarray:
        """(n + 1,) row of the first caption of each item."""
        return self._metadata[0]

    @property
    def all_captions(self) -> Captions:
        return self._metadata[1]
