"""The order in which an epoch goes through shards: a pure function of (seed, epoch, position).

Shards come in a new order in each epoch; then the samples of each `window` places of that long row change
places among themselves. That is what a shuffle buffer does, but nothing has to be held to do it, and any
place of an epoch can be entered at once: a run is resumed, or gone on with by other ranks, without reading
again what it has seen.
"""

from collections.abc import Sequence

import numpy as np


class ShardOrder:
    """One epoch's order.

    Args:
        first: (S + 1,) item at which each of S shards begins, and the number of all items.
        window: places among which samples are mixed; None: all.
        resample: draw shards with replacement instead of each once.
        items: use only the items below.
    """

    def __init__(
        self,
        first: Sequence[int] | np.ndarray,
        window: int | None,
        resample: bool,
        seed: int,
        epoch: int,
        items: int,
    ) -> None:
        starts = np.asarray(first, np.int64)
        sizes = np.diff(np.minimum(starts, items))
        used = np.flatnonzero(sizes)
        rng = np.random.default_rng([seed, epoch])
        if resample:
            drawn, total = [], 0
            while total < items:
                drawn.append(rng.choice(used, len(used)))
                total += int(sizes[drawn[-1]].sum())
            used = np.concatenate(drawn)
        else:
            used = used[rng.permutation(len(used))]
        self.starts, self.ends = starts[used], np.cumsum(sizes[used])
        self.begins = self.ends - sizes[used]
        self.items, self.key = items, (seed, epoch)
        self.window = min(window or items, items)
        self._mixed: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        moved = np.empty_like(places)
        windows = places // self.window
        for k in np.unique(windows):
            here = windows == k
            moved[here] = k * self.window + self._permutation(int(k))[places[here] - k * self.window]
        shard = np.searchsorted(self.ends, moved, "right")
        return self.starts[shard] + moved - self.begins[shard]

    def _permutation(self, k: int) -> np.ndarray:
        if self._mixed[0] != k:
            size = min(self.window, self.items - k * self.window)
            self._mixed = k, np.random.default_rng([*self.key, k + 1]).permutation(size)
        return self._mixed[1]
