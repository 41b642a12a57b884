"""Noise whose every row has its own seed, so that a sample does not depend on the batch it was drawn in."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

AHEAD = 2**22  # numbers that are drawn ahead at once


class PerSample:
    """One CPU generator per sample, whatever the device: the same seed gives the same noise everywhere."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = torch.device(device)

    def initial(self, shape: Sequence[int]) -> Tensor:
        """Standard normal (len(seeds), *shape) float32 on the device; shape is that of one sample."""
        rows = self.room(shape)
        for row, generator in zip(rows, self.generators, strict=True):
            torch.randn(tuple(shape), generator=generator, out=row)
        return self.moved(rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise like x (B, *), row i from seed i. Raises ValueError unless B is the number of seeds."""
        if len(x) != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds, but a batch of {len(x)}")
        return self.initial(x.shape[1:]).to(x)

    def ahead(self, shape: Sequence[int], times: int) -> Iterator[Tensor]:
        """What `initial(shape)` gives `times` times, drawn by threads while a GPU computes.

        A picture's thousand codes out of ten thousand each are more numbers than one thread draws meanwhile.
        """
        shape, rows = tuple(shape), len(self.generators)
        part = max(1, AHEAD // max(1, rows * torch.Size(shape).numel()))
        sizes = [min(part, times - start) for start in range(0, times, part)]

        def fill(room: Tensor, generator: torch.Generator) -> None:
            for row in room:
                torch.randn(shape, generator=generator, out=row)

        with ThreadPoolExecutor(min(rows, os.cpu_count() or 1)) as threads:

            def begin(size: int) -> tuple[Tensor, list]:
                room = self.room((size, *shape))
                return room, [threads.submit(fill, *job) for job in zip(room, self.generators, strict=True)]

            coming = begin(sizes[0]) if sizes else None
            for size in [*sizes[1:], 0]:
                if coming is None:
                    return
                room, jobs = coming
                for job in jobs:
                    job.result()
                noise = self.moved(room)
                coming = begin(size) if size else None
                yield from noise.unbind(1)

    def room(self, shape: Sequence[int]) -> Tensor:
        """Of the host; pinned for a GPU, so that the host goes on while it is copied.

        Threads may write to it, which are in no inference mode.
        """
        with torch.inference_mode(False):
            return torch.empty(len(self.generators), *shape, pin_memory=self.device.type == "cuda")

    def moved(self, rows: Tensor) -> Tensor:
        return rows.to(self.device, non_blocking=self.device.type == "cuda")


def per_sample(seeds: Sequence[int], device: torch.device | str = "cpu") -> PerSample:
    """`randn` for the samplers, row i from seeds[i]; its `initial(shape)` is the noise to start from."""
    return PerSample(seeds, device)
