"""Noise whose every row has its own seed, so that a sample does not depend on the batch it was drawn in."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PerSample:
    """One CPU generator per sample, whatever the device: the same seed gives the same noise everywhere."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = torch.device(device)

    def initial(self, shape: Sequence[int]) -> Tensor:
        """Standard normal (len(seeds), *shape) float32 on the device; shape is that of one sample."""
        pinned = self.device.type == "cuda"  # so that the host goes on while it is copied
        rows = torch.empty(len(self.generators), *shape, pin_memory=pinned)
        for row, generator in zip(rows, self.generators, strict=True):
            torch.randn(tuple(shape), generator=generator, out=row)
        return rows.to(self.device, non_blocking=pinned)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise like x (B, *), row i from seed i. Raises ValueError unless B is the number of seeds."""
        if len(x) != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds, but a batch of {len(x)}")
        return self.initial(x.shape[1:]).to(x)


def per_sample(seeds: Sequence[int], device: torch.device | str = "cpu") -> PerSample:
    """`randn` for the samplers, row i from seeds[i]; its `initial(shape)` is the noise to start from."""
    return PerSample(seeds, device)
