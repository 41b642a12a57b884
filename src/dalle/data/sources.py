"""From a source of captioned pictures to batches: the `Source` protocol, a data set, a sampler.

A virtual index v = epoch * len(source) + item tells a DataLoader worker the epoch without any shared state,
so captions and crops that change from epoch to epoch are pure functions of v, however many workers there are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dalle.data.batch import Batch
from dalle.data.buckets import Buckets
from dalle.errors import UserError
from dalle.instantiate import instantiate
from dalle.trust import Trust, composed


@runtime_checkable
class Source(Protocol):
    """One split of a set of captioned pictures, made as `source(split="train" | "val" | "test")`."""

    image_size: int
    fixed: bool
    """`images(item)` does not depend on the epoch, so what a frozen network makes of it can be kept."""

    def __len__(self) -> int: ...

    def captions(self, item: int) -> list[str]:
        """All captions of an item, one or more."""
        ...

    def images(self, items: Sequence[int], epoch: int = 0) -> Tensor:
        """(B, 3, S, S) float32 in [-1, 1]."""
        ...

    def fingerprint(self) -> str:
        """Short hash of everything the images and captions depend on."""
        ...


def source_of(node: Any, where: str, split: str, trust: Trust = composed, **more: Any) -> Source:
    """The split of the source that settings describe, whether or not as a partial.

    Args:
        where: the settings' place, for messages.
        trust: see `instantiate`.
        more: arguments beside those settings.

    Raises:
        UserError: they describe none, or one that cannot be made.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{where} describes no source of pictures")
    made = instantiate({**node, "_partial_": False}, where, trust, split=split, **more)
    if not isinstance(made, Source):
        raise UserError(f"{where} is no source of pictures but a {type(made).__name__}")
    return made


SourceFactory = Callable[..., Source]  # source(split=...) -> Source
Tokenize = Callable[[list[str]], Tensor]  # B captions -> (B, T) int64
Order = Callable[[np.ndarray], np.ndarray]  # places in an epoch (k,) -> items (k,)
Caption = TypeVar("Caption")


def captions_of(source: Source, items: Sequence[int]) -> list[list[str]]:
    """All captions of each of many items.

    A source that is much quicker at making captions together offers `captions_of(items)`, one for each item.
    """
    together: Callable[[Sequence[int]], list[str]] | None = getattr(source, "captions_of", None)
    if together is None:
        return [source.captions(item) for item in items]
    return [[caption] for caption in together(items)]


def first_captions(source: Source, items: Sequence[int]) -> list[str]:
    """The first caption of each item: what validation reads, and what is drawn in an evaluation."""
    return [some[0] for some in captions_of(source, items)]


def stored_images(source: Source, items: Sequence[int], epoch: int) -> Tensor:
    """Images as they go from a worker to the device: the `pixels(items, epoch)` of a source that has them,
    (B, 3, S, S) uint8, which `SourceDataModule` makes into numbers there; else its `images`.
    """
    return getattr(source, "pixels", source.images)(items, epoch)


def mix(*numbers: int) -> int:
    """Hash of some integers, 64 bits, the same on every machine (splitmix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


class SourceDataset(Dataset):
    """Turns a list of virtual indices into one `Batch` in one call, so a source can render a batch at once.

    Args:
        source: one split.
        tokenize: adds `text` where given.
        images: adds `image` when True; as `stored_images` gives them.
        seed: which caption of an item is used in which epoch; None = always the first (validation).
        buckets: shapes of the images; None: squares.
        squares: adds the squares, as `square`.
    """

    def __init__(
        self,
        source: Source,
        tokenize: Tokenize | None = None,
        images: bool = True,
        seed: int | None = None,
        buckets: Buckets | None = None,
        squares: bool = False,
    ):
        self.source, self.tokenize, self.with_images, self.seed = source, tokenize, images, seed
        self.buckets, self.with_squares = buckets, squares

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        epoch, items = self.split_virtual(indices)
        batch = Batch(index=torch.tensor(items, dtype=torch.int64))
        if self.with_images:  # first: a picture found broken while being read takes its caption with it
            batch["image"] = self.pictures(items, epoch)
        if self.with_squares:
            batch["square"] = stored_images(self.source, items, epoch)
        batch["caption"] = self.choose(epoch, items, captions_of(self.source, items))
        if self.tokenize is not None:
            batch["text"] = self.tokenize(batch["caption"])
        return batch

    def pictures(self, items: Sequence[int], epoch: int) -> Tensor:
        """Of one batch, so of one bucket."""
        if self.buckets is None:
            return stored_images(self.source, items, epoch)
        source: Any = self.source
        return source.oblong(items, self.buckets.shape(items[0]))

    def split_virtual(self, indices: Sequence[int]) -> tuple[int, list[int]]:
        """Epoch and item numbers; a batch never straddles two epochs."""
        n = len(self.source)
        return indices[0] // n, [index % n for index in indices]

    def choose(
        self, epoch: int, items: Sequence[int], captions: Iterable[Sequence[Caption]]
    ) -> list[Caption]:
        """That one of each item's captions (or of whatever stands for them) which is used in this epoch."""
        return [
            some[0 if self.seed is None or len(some) == 1 else mix(self.seed, epoch, item) % len(some)]
            for item, some in zip(items, captions, strict=True)
        ]


def identity_collate(batch: Any) -> Any:
    """`collate_fn` for a data set whose `__getitems__` makes whole batches."""
    return batch


class EpochSampler(Sampler[list[int]]):
    """Yields batches of virtual indices: a fresh permutation in each epoch, the same on every machine.

    With `world` ranks, every rank gets as many batches of the same sizes as every other; together the ranks'
    batches number b are what one process with batch size `batch_size * world` would see as its number b.

    Args:
        n: items in the source.
        batch_size: per rank.
        shuffle: else in order.
        drop_last: drop what does not fill a batch on all ranks; else items from the front fill up the ranks.
        limit: only the first `limit` items (bounded validation).
        whole: epochs are a multiple of so many batches, those of an accumulated step; for `drop_last`.
        order: of a shuffled epoch, where the source has one of its own: `order(seed, epoch, items)` gives
            what maps places in the epoch to items. Else a permutation of all.
        buckets: (n,) number of each item's bucket; the items of a batch, over all ranks, are of one.
        position: asked at every `iter` for (epoch, batches already seen in it), so a resumed run goes on with
            exactly the batches it would have seen; without it `set_epoch` says.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
        position: Callable[[], tuple[int, int]] | None = None,
        whole: int = 1,
        order: Callable[[int, int, int], Order] | None = None,
        buckets: np.ndarray | None = None,
    ):
        self.order, self.buckets = order, buckets
        self.n, self.batch_size, self.shuffle, self.drop_last = n, batch_size, shuffle, drop_last
        self.seed, self.rank, self.world, self.position, self.whole = seed, rank, world, position, whole
        self.used = n if limit is None else min(n, limit)
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next `iter` is this epoch's, without its first `start` batches."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches in a whole epoch on one rank, also when the epoch is entered midway."""
        counts = [self.used] if self.buckets is None else np.bincount(self.buckets[: self.used]).tolist()
        step = self.batch_size * self.world
        if self.drop_last:
            batches = sum(count // step for count in counts)
            return batches - batches % self.whole
        return sum(-(-count // step) for count in counts)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.position() if self.position else (self.epoch, self.start)
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        order, step = self._order(epoch), self.batch_size * self.world
        if self.buckets is not None:
            batches = self._of_buckets(order(np.arange(self.used)), self.buckets, step)
            for items in batches[start : len(self)]:
                yield (epoch * self.n + items[self.rank :: self.world]).tolist()
            return
        # Without drop_last the ranks are filled up, so that each has as many
        end = len(self) * step if self.drop_last else -(-self.used // self.world) * self.world
        for b in range(start, len(self)):
            places = np.arange(b * step + self.rank, min((b + 1) * step, end), self.world)
            yield (epoch * self.n + order(places % self.used)).tolist()

    def _of_buckets(self, items: np.ndarray, buckets: np.ndarray, step: int) -> list[np.ndarray]:
        """The batches over all ranks of items in their order; each stands where its middle item stood."""
        kinds, found = buckets[items], []
        for kind in np.unique(kinds):
            places = np.flatnonzero(kinds == kind)
            end = len(places) // step * step if self.drop_last else len(places)
            found += [places[at : min(at + step, end)] for at in range(0, end, step)]
        found.sort(key=lambda places: places[len(places) // 2])
        # Without drop_last the ranks are filled up here, too
        return [items[np.resize(some, len(some) + -len(some) % self.world)] for some in found]

    def _order(self, epoch: int) -> Order:
        """From places in an epoch to items."""
        if not self.shuffle:
            return lambda places: places
        if self.order:
            return self.order(self.seed, epoch, self.used)
        return np.random.default_rng([self.seed, epoch]).permutation(self.used).__getitem__
