"""CUDA graphs: what a GPU does in a step, recorded once and from then on started by one command.

A step of a small network, or for few pictures, is hundreds of kernels of microseconds, and Python starts them
more slowly than a GPU runs them. What is recorded works on the same memory each time, so shapes are fixed,
inputs are copied in, and nothing may be decided on the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

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
        self.graph: _Graph | None = None  # the last one

    def __call__(self, *args: Tensor, **kwargs: Any) -> Any:
        graph, device = self.graph, args[0].device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        mode = (device, autocast, torch.is_inference_mode_enabled())
        if graph is None or not graph.goes_on(args, kwargs, mode):
            self.graph = graph = self.graph_for(args, kwargs, mode)
        return graph(args)

    def graph_for(self, args: tuple[Tensor, ...], kwargs: dict[str, Any], mode: Any) -> "_Graph":
        """One that there is, told of what is given by keyword, or a new one."""
        leaves, spec = tree_flatten((args, kwargs))
        key = (str(spec), str(list(map(sign, leaves))), mode)
        graph = self.graphs.pop(key, None)
        if graph is None or len(args[0]) > graph.rows:
            while len(self.graphs) >= self.most:
                self.graphs.pop(next(iter(self.graphs)))  # the one that was not used for longest
            graph = _Graph(self.run, args, kwargs, mode)
        self.graphs[key] = graph
        graph.tell(kwargs)
        return graph


def sign(x: Any) -> Any:
    """What has to be the same for a graph to be."""
    return (x.shape[1:], x.dtype) if isinstance(x, Tensor) else x


class _Graph:
    """Of one shape. Its inputs are copies of what was given, and its outputs are copied."""

    def __init__(
        self, run: Callable[..., Any], args: tuple[Tensor, ...], kwargs: dict[str, Any], mode: Any
    ) -> None:
        def own(x: Any) -> Any:
            return torch.empty_like(x).copy_(x) if isinstance(x, Tensor) else x

        self.rows, self.count, self.mode = len(args[0]), 0, mode
        self.args = tuple(own(x) for x in args)
        self.kwargs = tree_map(own, kwargs)
        self.last = kwargs
        self.outputs: Any = None

        def fill() -> None:
            self.outputs = run(*self.args, **self.kwargs)

        self.replay = recorded(fill, args[0].device)

    def goes_on(self, args: tuple[Tensor, ...], kwargs: dict[str, Any], mode: Any) -> bool:
        """Whether this is the next step of the same drawing."""
        return (
            mode == self.mode
            and len(args[0]) == self.count
            and list(map(sign, args)) == list(map(sign, self.args))
            and kwargs.keys() == self.last.keys()
            and all(x is self.last[name] for name, x in kwargs.items())
        )

    def tell(self, kwargs: dict[str, Any]) -> None:
        self.last = kwargs
        for own, given in zip(tree_leaves(self.kwargs), tree_leaves(kwargs), strict=True):
            if isinstance(given, Tensor):
                own[: len(given)].copy_(given)

    def __call__(self, args: tuple[Tensor, ...]) -> Any:
        self.count = len(args[0])
        for own, given in zip(self.args, args, strict=True):
            own[: self.count].copy_(given)
        self.replay()
        return tree_map(lambda x: x[: self.count].clone() if isinstance(x, Tensor) else x, self.outputs)
