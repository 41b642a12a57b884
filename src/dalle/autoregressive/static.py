"""Drawing codes over a cache of fixed size: every step does the same to the same memory.

So on a GPU a step is one CUDA graph: the network, guidance, filters, the draw itself, with the code's rank as
a number that only the device knows, and no word from the GPU to the host before the last code. Uniforms are
drawn outside, each batch's as without graphs, and copied in, so seeds mean the same.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dalle.autoregressive.draws import OnStep, Options, Uniform, choose
from dalle.graphs import memory_pool, recorded


class Buffers(NamedTuple):
    """What a step reads and writes."""

    rank: Int64[Tensor, "1"]  # of the code that the network reads
    code: Int64[Tensor, "B"]
    noise: Float[Tensor, "B K"]
    known: Int64[Tensor, "B N"]
    codes: Int64[Tensor, "B N"]


class Static:
    """What is kept from batch to batch, for one network: its cache, and the graphs.

    A batch that is smaller than the one before is filled up to its size. Networks need what `DALLE` has:
    `reach`, `prefill(..., cache=)`, a `step` whose rank is a tensor, and `compile_step`.

    Args:
        compiled: fuses the kernels of a step by `torch.compile`, which takes half a minute at first.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self.key: Any = None
        self.rows = 0

    @torch.no_grad()
    def __call__(
        self,
        net: Any,
        text: Int64[Tensor, "B T"],
        keep_text: Bool[Tensor, "B"] | None,
        known: Int64[Tensor, "B N"],
        places: Sequence[int],
        options: Options,
        uniform: Uniform,
        on_step: OnStep | None,
    ) -> Int64[Tensor, "B N"]:
        """Codes of a picture for each caption; `places` are those at which one is drawn, in order."""
        rows, device = len(text), text.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = (text.shape[1:], device, options, autocast, torch.is_inference_mode_enabled())
        if key != self.key or rows > self.rows:
            self.begin(net, options, known)
            self.key = key
        streams, more = options.streams, self.rows - rows
        text, known = (torch.cat((x, x[:1].expand(more, -1))) for x in (text, known))
        keep = torch.ones_like(text[:, 0], dtype=torch.bool)
        if keep_text is not None:
            keep[:rows] = keep_text
        keep = torch.cat((keep, torch.zeros_like(keep))) if streams == 2 else keep
        first, last = places[0], places[-1]
        self.buffers.known.copy_(known)
        self.buffers.codes.copy_(known.clamp(min=0))
        given = self.buffers.codes[:, :first].repeat(streams, 1)
        prefill = partial(net.prefill, text.repeat(streams, 1), keep, given)

        if self.cache is None:
            _, self.cache = prefill()
        if not self.steps:
            for length in sorted({net.reach(i) for i in range(net.codes - 1)}):
                self.steps[length] = recorded(partial(self.step, net, length, options), device, self.pool)

        wanted, drawn, noise = set(places), self.buffers.codes[:rows], self.buffers.noise[:rows]
        times = len(places) if options.temperature else 0
        ahead = getattr(uniform, "ahead", None)
        uniforms = ahead(noise, times) if ahead else (uniform(noise) for _ in range(times))
        logits, _ = prefill(cache=self.cache)
        for i in range(first, last + 1):
            if i in wanted and options.temperature:
                noise.copy_(next(uniforms))
            if i == first:
                self.write(logits, torch.full_like(self.buffers.rank, i), options)
            else:
                self.buffers.rank.fill_(i - 1)
                self.steps[net.reach(i - 1)]()
            if on_step is not None and i in wanted:
                on_step(i + 1, drawn)
        return drawn.clone()

    def begin(self, net: Any, options: Options, known: Int64[Tensor, "B N"]) -> None:
        """Memory for batches of this size."""
        self.rows, (b, n) = len(known), known.shape
        rank, code, codes = (known.new_zeros(size) for size in ((1,), (b,), (b, n)))
        noise = torch.full((b, net.image_vocab), 0.5, device=known.device)
        self.buffers = Buffers(rank, code, noise, known.clone(), codes)
        self.cache: Any = None
        self.steps: dict[int, Callable[[], object]] = {}
        self.pool = memory_pool(known.device)
        self.choose: Callable[..., Tensor] = choose
        if self.compiled:
            self.choose = torch.compile(choose, fullgraph=True)
            net.compile_step()

    def step(self, net: Any, length: int, options: Options) -> None:
        """The code after the one at `rank`."""
        code, rank = self.buffers.code.repeat(options.streams), self.buffers.rank
        self.write(net.step(code, rank, self.cache.upto(length)), rank + 1, options)

    def write(self, logits: Float[Tensor, "S K"], place: Int64[Tensor, "1"], options: Options) -> None:
        code = self.choose(logits, self.buffers.noise, options)
        known = self.buffers.known.index_select(1, place)[:, 0]
        code = torch.where(known < 0, code, known)
        self.buffers.code.copy_(code)
        self.buffers.codes.index_copy_(1, place, code[:, None])
