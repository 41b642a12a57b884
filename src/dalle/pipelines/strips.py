"""How diffusion pictures come about: the estimates of the clean picture, as a strip."""

import torch
from jaxtyping import Float
from torch import Tensor

FRAMES = 6


class Estimates:
    """The `on_step` of a stage's `sample`, called for one batch of pictures after another; keeps estimates of
    `frames` steps, evenly from the first to the last.
    """

    def __init__(self, frames: int = FRAMES) -> None:
        self.frames, self.last = frames, -1
        self.batches: list[dict[int, Tensor]] = []

    def __call__(self, i: int, n: int, x0: Float[Tensor, "B 3 H W"]) -> None:
        """The estimate of step i of n; a step that is done again (`resamplings`) is shown as it is left."""
        if n == 1:
            return  # the only estimate is the picture
        if i == 0 and self.last != 0:
            self.batches.append({})
        self.last, count = i, min(self.frames, n)
        if i in {round(k * (n - 1) / (count - 1)) for k in range(count)}:
            self.batches[-1][i] = x0.detach().float().clamp(-1, 1).cpu()

    def strip(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N F 3 H W"]:
        """The estimates that became these pictures, which are the last of them."""
        if not self.batches:
            return images[:, None]
        seen = torch.cat([torch.stack([b[i] for i in sorted(b)], dim=1) for b in self.batches])
        return torch.cat((seen[:, :-1], images[:, None]), dim=1)
