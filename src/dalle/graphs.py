"""CUDA graphs: what a GPU does in a step, recorded once and from then on started by one command.

A step of a small network, or for few pictures, is hundreds of kernels of microseconds, and Python starts them
more slowly than a GPU runs them. What is recorded works on the same memory each time, so shapes are fixed,
inputs are copied in, and nothing may be decided on the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

WARM_UP = 3  # runs before a recording, in which kernels are chosen and compiled


def recorded(run: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """`run`, which takes and returns nothing, as a CUDA graph; on other devices `run` itself.

    It runs a few times now. Graphs that never run at the same time can share a pool of memory for what they
    compute in between (`memory_pool`).
    """
    if device.type != "cuda":
        return run
    # weights that autocast has cast and kept belong to it, not to the graph
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    with torch.cuda.device(device), torch.autocast("cuda", dtype, enabled, cache_enabled=False):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
    return graph.replay


def memory_pool(device: torch.device) -> Any:
    """One for several graphs; None where there are none."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Recorded:
    """A function of tensors (B, ...) and nests of them, whose rows are independent of each other: one graph
    for all batches up to the first one's size, which are filled up to it.

    On other devices fixed shapes are all that is left of it, which is what `torch.compile` likes.

    Args:
        run: takes the tensors that change from call to call by position, all others by keyword: these are
            copied only when they are other tensors than the last time.
        most: graphs that are kept; each holds memory of its own.
    """

    def __init__(self, run: Callable[..., Any], most: int = 4) -> None:
        self.run, self.most = run, most
        self.graphs: dict[Any, _Graph] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        signs = [(x.shape[1:], x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        key = (str(spec), str(signs), device, autocast, torch.is_inference_mode_enabled())
        graph = self.graphs.pop(key, None)
        if graph is None or len(tensors[0]) > graph.rows:
            while len(self.graphs) >= self.most:
                self.graphs.pop(next(iter(self.graphs)))  # the one that was not used for longest
            graph = _Graph(self.run, leaves, spec)
        self.graphs[key] = graph
        return graph(leaves, len(tree_flatten(args)[0]))


class _Graph:
    def __init__(self, run: Callable[..., Any], leaves: list[Any], spec: Any) -> None:
        self.inputs = [torch.empty_like(x).copy_(x) if isinstance(x, Tensor) else x for x in leaves]
        self.last: list[Any] = list(leaves)
        first = next(x for x in self.inputs if isinstance(x, Tensor))
        self.rows = len(first)
        args, kwargs = tree_unflatten(self.inputs, spec)
        self.outputs: Any = None

        def fill() -> None:
            self.outputs = run(*args, **kwargs)

        self.replay = recorded(fill, first.device)

    def __call__(self, leaves: list[Any], changing: int) -> Any:
        for number, (own, given) in enumerate(zip(self.inputs, leaves, strict=True)):
            if isinstance(given, Tensor) and (number < changing or given is not self.last[number]):
                own[: len(given)].copy_(given)
                self.last[number] = given
        rows = next(len(x) for x in leaves if isinstance(x, Tensor))
        self.replay()
        outputs, spec = tree_flatten(self.outputs)
        return tree_unflatten([x[:rows].clone() if isinstance(x, Tensor) else x for x in outputs], spec)
