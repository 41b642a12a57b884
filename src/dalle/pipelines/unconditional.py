"""Pictures of a stage that reads no caption, such as a VAE: drawn from noise alone.

Picture j is drawn from noise of its own, seeded by (seed, i, j), where i is the number of its caption: those
are only what is written under the pictures.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle.data.sources import mix
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.pipelines.upsampling import Drawing


class Unconditional(Drawing):
    """A stage with `sample(batch, randn=...) -> (B, 3, H, W)`, which reads no captions."""

    clip = None

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage: Any = stage
        self.eval()

    @property
    def image_size(self) -> int:
        return self.stage.net.image_size

    @property
    def device(self) -> torch.device:
        return next(self.stage.parameters()).device

    @torch.inference_mode()
    def sample(
        self,
        captions: Sequence[str],
        n: int = 1,
        seed: int = 0,
        batch_size: int = 16,
        precision: Literal["fp32", "bf16"] = "fp32",
        numbers: Sequence[int] | None = None,
        **_: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """`n` pictures for each caption, in [-1, 1] on the CPU.

        `numbers` are those of the captions in a longer list; None counts from 0. Raises UserError for
        impossible numbers.
        """
        if n < 1 or batch_size < 1:
            raise UserError(f"n and batch_size must be at least 1, not {n} and {batch_size}")
        seeds = [mix(seed, i, j) for i in numbers or range(len(captions)) for j in range(n)]
        images = []
        for start in range(0, len(seeds), batch_size):
            part = seeds[start : start + batch_size]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                made = self.stage.sample({"caption": [""] * len(part)}, randn=per_sample(part, self.device))
            images.append(made.float().clamp(-1, 1).cpu())
        return torch.cat(images)
