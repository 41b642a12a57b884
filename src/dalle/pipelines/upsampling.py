"""Upsamplers after a pipeline that draws pictures, or alone on pictures of any size (DALL-E 2, sec. 2.1).

Picture j of prompt i is enlarged with noise of its own, seeded by (seed, i, j, number of the upsampler).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle.data.batch import Batch
from dalle.data.sources import mix
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.nets.half import to_bf16
from dalle.stages.base import Stage

# Each stage has noise of its own: another prior sampler leaves the decoder's as it was. FIT is that of what
# inpainting keeps, FIRST the first upsampler's.
PRIOR, DECODER, FIT, FIRST = 1, 2, 3, 16
LARGEST, TILE = 2048**2, 1024  # larger pictures (in pixels) are looked at in tiles of this side


class Upsamplers(nn.Module):
    """Trained upsamplers, one after the other; `upsample` enlarges pictures.

    Args:
        stages: each with `sample(batch, randn=...) -> (B, 3, H, W)`, `low_size`, `net.factor` and
            `check`, which refuses what `sample` cannot be told.
        image_size: side of the pictures that the first one gets; None: of whatever size.

    Raises:
        UserError: one was not trained for what comes before it.
    """

    def __init__(self, stages: Mapping[str, Any], image_size: int | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.image_size = image_size
        for name, stage in stages.items():
            if self.image_size is not None and stage.low_size != self.image_size:
                raise UserError(
                    f"{name} enlarges pictures of {stage.low_size} px to {stage.net.image_size} px, but what "
                    f"comes before it draws {self.image_size} px; give an upsampler trained with "
                    f"data.image_size={self.image_size * stage.net.factor}"
                )
            self.image_size = stage.net.image_size
        self.eval()

    def check(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises UserError for options that a stage cannot be told: before anything is drawn for it."""
        for name, module in self.stages.items():
            stage: Any = module
            told = options.get(name, {})
            stage.check(told.get("noise_level"), told.get("tile"))

    @torch.inference_mode()
    def upsample(
        self,
        images: Float[Tensor, "N 3 h w"],
        seeds: Sequence[Sequence[int]],
        batch_size: int = 16,
        precision: Literal["fp32", "bf16"] = "fp32",
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Float[Tensor, "N 3 H W"]:
        """Enlarged pictures in [-1, 1], on the CPU.

        Args:
            seeds: numbers for each picture that decide its noise.
            options: further arguments of each stage's `sample` by its name: sampler, noise_level, tile.
        """
        for number, (name, module) in enumerate(self.stages.items(), FIRST):
            stage: Any = module
            chosen = dict((options or {}).get(name, {}))
            if images.shape[-2] * images.shape[-1] * stage.net.factor**2 > LARGEST:
                chosen.setdefault("tile", TILE)
            made = []
            for start in range(0, len(images), batch_size):
                low = images[start : start + batch_size].to(stage.device)
                own = [mix(*key, number) for key in seeds[start : start + batch_size]]
                with torch.autocast(low.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    batch = cast(Batch, {"low": low})
                    drawn = stage.sample(batch, randn=per_sample(own, low.device), **chosen)
                made.append(drawn.float().clamp(-1, 1).cpu())
            images = torch.cat(made)
        return images


class Drawing(nn.Module):
    """What pipelines that draw pictures have in common: upsamplers may come after them."""

    upsamplers: Upsamplers | None

    def __init__(self) -> None:
        super().__init__()
        self.upsamplers = None

    def prepare(self, precision: Literal["fp32", "bf16"], compile: Literal["none", "graphs", "full"]) -> None:
        """Readies what draws for much drawing; networks stay so.

        Args:
            precision: bf16 casts weights once and for all, of which autocast else makes copies all the time.
                Before the pipeline goes to its device, there is never room needed for fp32 there.
            compile: as `Stage.speed_up` has it.
        """
        for stage in self.modules():
            if isinstance(stage, Stage):
                if precision == "bf16":
                    to_bf16(stage.net)
                stage.speed_up(compile)

    def upsample(
        self,
        images: Float[Tensor, "N 3 h w"],
        n: int = 1,
        seed: int = 0,
        batch_size: int = 16,
        precision: Literal["fp32", "bf16"] = "fp32",
        options: Mapping[str, Mapping[str, Any]] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Float[Tensor, "N 3 H W"]:
        """Pictures, `n` of each caption, as the pipeline's upsamplers enlarge them; without any, as they are.

        Other arguments are those of `sample`, and of `Upsamplers.upsample`.
        """
        if self.upsamplers is None:
            return images
        order = range(len(images) // n) if numbers is None else numbers
        seeds = [(seed, order[i // n], i % n) for i in range(len(images))]
        return self.upsamplers.upsample(images, seeds, batch_size, precision, options)


class PictureFolder(Drawing):
    """Pictures that are there already, in place of ones that are drawn: `sample.py pipeline=upsampler`."""

    clip = None
    image_size = None
