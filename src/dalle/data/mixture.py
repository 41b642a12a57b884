"""Several sources as one, with weights: how often training draws from each.

In training the places of an epoch are shared out: in each window of places every source has as many as its
weight asks for, to within two, in an order of their own. Which item a place stands for is a function of the
seed and of its number from the beginning of training, so any place can be entered at once, on any number of
workers and ranks. A source goes on in the next epoch where it was in this one; one that is used up begins
anew, in a new order. Validation and test go through the splits of all sources, each picture once.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dalle.data.pictures import say
from dalle.data.sources import Order, Source, mix
from dalle.data.splits import Split
from dalle.data.text import shown
from dalle.errors import UserError
from dalle.instantiate import check_arguments
from dalle.ranges import PositiveInt, Side

LARGEST = 1e100  # weight, so that there is a sum
FINE = 2**40  # parts into which shares are rounded
PASSES = 16  # orders of passes through sources that are kept


class Mixture:
    """One split of several sources. Items are numbered across them, so that the first so many items hold
    every source by its size.

    Args:
        sources: factories of sources by names of one's own.
        image_size: S, of all of them.
        weights: positive numbers, by the names of sources; None: by their sizes, which is each item once in
            an epoch.
        window: places in which the shares are as the weights say.

    Raises:
        UserError: weights of other names than the sources', or that are not positive; a source without an
            item to train on.
    """

    def __init__(
        self,
        split: Split,
        sources: Mapping[str, Any],  # as values in a mapping are not checked before they come here
        image_size: Side,
        weights: Mapping[str, Any] | None = None,
        window: PositiveInt = 100_000,
    ) -> None:
        if not sources:
            raise UserError(
                "data=mixture has no sources; +data@data.sources.NAME=folder data.sources.NAME.root=PICTURES "
                "adds one, of any kind"
            )
        if odd := [name for name, make in sources.items() if not callable(make)]:
            raise UserError(
                f"data.sources.{odd[0]} is no source; +data@data.sources.{odd[0]}=folder "
                f"data.sources.{odd[0]}.root=PICTURES makes it one"
            )
        self.split, self.image_size, self.window = split, image_size, window
        self.names = list(sources)
        self.weights = _checked(self.names, weights)
        for name, make in sources.items():
            if isinstance(make, partial):
                given = {**make.keywords, "split": split, "image_size": image_size}
                check_arguments(make.func, given, f"data.sources.{name}", partial_call=False)
        self.sources = [_made(name, make, split, image_size) for name, make in sources.items()]
        for name, source in zip(sources, self.sources, strict=True):
            if not isinstance(source, Source):
                raise UserError(f"data.sources.{name} is no source of pictures but a {type(source).__name__}")
            if getattr(source, "buckets", False):
                raise UserError(
                    f"data.sources.{name}.buckets=true: places of a mixture are shared out one by one; "
                    "leave it out"
                )
        self.sizes = np.array([len(source) for source in self.sources], np.int64)
        self.fixed = all(source.fixed for source in self.sources)
        # Of all items in a row: those of each source lie evenly
        places = np.concatenate([(np.arange(n) + 0.5) / max(1, n) for n in self.sizes])
        order = np.argsort(places, kind="stable")
        starts = np.cumsum(self.sizes) - self.sizes
        self._source = np.repeat(np.arange(len(self.sizes), dtype=np.uint16), self.sizes)[order]
        self._item = order - starts[self._source]
        self._number = np.empty_like(order)
        self._number[order] = np.arange(len(order))
        self._starts = starts
        if split == "train":
            if empty := [name for name, n in zip(self.names, self.sizes, strict=True) if not n]:
                raise UserError(f"data.sources.{empty[0]} has nothing to train on; leave it out")
            self._introduce()

    def __len__(self) -> int:
        return len(self._item)

    def captions(self, item: int) -> list[str]:
        return self.sources[self._source[item]].captions(int(self._item[item]))

    def images(self, items: Sequence[int], epoch: int = 0) -> Float[Tensor, "b 3 s s"]:
        return self._gathered("images", items, epoch)

    @property
    def pixels(self) -> Callable[..., Tensor]:
        """Where all sources have bytes, see `stored_images`."""
        if not all(hasattr(source, "pixels") for source in self.sources):
            raise AttributeError("pixels")
        return partial(self._gathered, "pixels")

    def _gathered(self, kind: str, items: Sequence[int], epoch: int = 0) -> Tensor:
        """Each source makes its own together."""
        numbers = np.asarray(items, np.int64)
        owners, parts, rows = self._source[numbers], [], []
        for k in np.unique(owners):
            here = np.flatnonzero(owners == k)
            parts.append(getattr(self.sources[k], kind)(self._item[numbers[here]].tolist(), epoch))
            rows.append(here)
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)[back]

    def fingerprint(self) -> str:
        facts = [
            f"{name} {source.fingerprint()}" for name, source in zip(self.names, self.sources, strict=True)
        ]
        facts.append(f"{self.weights} {self.window}" if self.weights else "")
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def source_of(self, item: int) -> str:
        """The name of an item's source."""
        return self.names[self._source[item]]

    def order(self, seed: int, epoch: int, items: int) -> Order:
        return MixedOrder(self, seed, epoch, items)

    def _introduce(self) -> None:
        total = len(self)
        shares = _shares(self.weights) if self.weights else self.sizes / total
        said = [
            f"{shown(name)} {share:.1%} ({n:,} items, {share * total / n:.2g} passes an epoch)"
            for name, share, n in zip(self.names, shares, self.sizes, strict=True)
        ]
        say(f"mixture of {total:,} items: {', '.join(said)}")


class MixedOrder:
    """One epoch: which item each of its places stands for.

    Args:
        items: use only the items below, of every source its first ones; so many places has an epoch.
    """

    def __init__(self, mixture: Mixture, seed: int, epoch: int, items: int) -> None:
        self.mixture, self.seed, self.epoch, self.items = mixture, seed, epoch, items
        self.sizes = np.bincount(mixture._source[:items], minlength=len(mixture.names))
        # Bounds of the shares in whole numbers, so that they are exact after any number of places
        self.bounds = [0, *map(int, np.cumsum(self.sizes))]
        if mixture.weights:
            parts = np.cumsum(
                [w if n else 0 for w, n in zip(mixture.weights.values(), self.sizes, strict=True)]
            )
            self.bounds = [0, *(round(part / parts[-1] * FINE) for part in parts)]
        least = min(b - a for a, b in itertools.pairwise(self.bounds) if b > a) / self.bounds[-1]
        if mixture.weights and least * items < 2:
            raise UserError(
                f"data.weights gives a source less than 2 of the {items:,} places of an epoch; give it more"
            )
        # No shorter than that every source has a place in each
        window = max(mixture.window, int(2 / least) + 1)
        self.starts = [k * window for k in range(max(1, items // window))]
        self._pass = lru_cache(maxsize=PASSES)(self._pass_of)
        self._window = lru_cache(maxsize=4)(self._window_of)

    def drawn(self, place: int) -> np.ndarray:
        """Of each source, how many places before this one of the epoch, and in all epochs before, are its."""
        at = self.epoch * self.items + place
        return np.diff(np.array([at * bound // self.bounds[-1] for bound in self.bounds], np.int64))

    def _window_of(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws before a window, first slots of the sources in it, and its permutation of slots."""
        start, end = [*self.starts, self.items][k : k + 2]
        before = self.drawn(start)
        slots = np.concatenate([[0], np.cumsum(self.drawn(end) - before)])
        return before, slots, np.random.default_rng([self.seed, self.epoch, k]).permutation(end - start)

    def _pass_of(self, source: int, number: int) -> Order:
        n = int(self.sizes[source])
        own: Any = getattr(self.mixture.sources[source], "order", None)
        seed = mix(self.seed, source) % 2**32
        if own:
            return own(seed, number, n)
        return np.random.default_rng([seed, number]).permutation(n).__getitem__

    def __call__(self, places: np.ndarray) -> np.ndarray:
        numbers = np.empty_like(places)
        windows = np.searchsorted(self.starts, places, "right") - 1
        for k in np.unique(windows):
            here = np.flatnonzero(windows == k)
            before, first, permutation = self._window(int(k))
            slots = permutation[places[here] - self.starts[k]]
            owners = np.searchsorted(first, slots, "right") - 1
            for source in np.unique(owners):
                mine = owners == source
                draws = before[source] + slots[mine] - first[source]
                numbers[here[mine]] = self._numbers(int(source), draws)
        return numbers

    def _numbers(self, source: int, draws: np.ndarray) -> np.ndarray:
        """Numbers in the mixture of what a source draws as its draw of such a number from the beginning."""
        passes, places = np.divmod(draws, self.sizes[source])
        items = np.empty_like(draws)
        for number in np.unique(passes):
            some = passes == number
            items[some] = self._pass(source, int(number))(places[some])
        return self.mixture._number[self.mixture._starts[source] + items]


def _made(name: str, make: Callable[..., Source], split: Split, image_size: int) -> Source:
    """A source; what is wrong with it is said with its name."""
    try:
        return make(split=split, image_size=image_size)
    except UserError as error:
        raise UserError(f"data.sources.{name}: {error}") from None


def _checked(names: Sequence[str], weights: Mapping[str, Any] | None) -> dict[str, float]:
    if not weights:
        return {}
    if odd := sorted({*names} ^ {*weights}):
        what = "no source" if odd[0] in weights else "no weight of"
        known = ", ".join(map(shown, names))
        raise UserError(f"data.weights: there is {what} {shown(odd[0])}; give one for each of {known}")
    for name in names:
        weight = weights[name]
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0 < weight <= LARGEST):
            raise UserError(
                f"data.weights.{name} must be a positive number, got {weight}; the largest is {LARGEST:g}, "
                f"and ~data.sources.{name} leaves a source out"
            )
    return {name: float(weights[name]) for name in names}


def _shares(weights: Mapping[str, float]) -> list[float]:
    total = sum(weights.values())
    return [weight / total for weight in weights.values()]
