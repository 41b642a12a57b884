"""What a step of training holds in memory, counted on any device: what autograd keeps, and all there is."""

import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Saved:
    """Counts the bytes that autograd keeps for backward passes: each storage once, and not the weights."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.uses = weights, Counter[int]()
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "Kept":
        storage = tensor.untyped_storage()
        place = storage._cdata if tensor.is_meta else storage.data_ptr()
        kept, size = Kept(tensor), storage.nbytes()
        if place not in self.weights:
            if not self.uses[place]:
                self.now += size
                self.peak = max(self.peak, self.now)
            self.uses[place] += 1
            weakref.finalize(kept, self.release, place, size)
        return kept

    def release(self, place: int, size: int) -> None:
        self.uses[place] -= 1
        if not self.uses[place]:
            self.now -= size


class Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Live(TorchDispatchMode):
    """Counts the bytes of what operations make on a device, from when it is made to when it is let go of:
    activations and gradients, and what comes and goes within a step (weights that autocast has cast, losses
    in fp32, the optimizer's products). What kernels need inside of them is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}  # storages, by their place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}  # of views, and in place
        self.see(storage for storage in storages(made) if storage._cdata not in given)
        return made

    def see(self, made: Iterable[torch.UntypedStorage]) -> None:
        for storage in made:
            place, size = storage._cdata, storage.nbytes()
            if storage.device.type == self.device.type and place not in self.known:
                self.known[place] = weakref.ref(storage, partial(self.release, place, size))
                self.now += size
        self.peak = max(self.peak, self.now)

    def release(self, place: int, size: int, _: Any) -> None:
        del self.known[place]
        self.now -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
