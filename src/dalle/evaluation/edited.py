"""Edits of real pictures, measured: `evaluate.py edit=denoise editing.noise=0.2 n=64`.

Pictures of the split are spoilt or masked, each by a random number of its own, and edited by the pipeline. Of
repairs it is known what should come out, so they are held against the originals, beside what was spoilt; of
all edits similarities and what stayed are measured (`dalle.metrics.edits`), and what shows as was asked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_type_hints

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dalle.data.degradations import resized
from dalle.data.scenes import swaps
from dalle.data.shapes import Shapes
from dalle.data.sources import Source, first_captions, mix
from dalle.diffusion.restoration import blur, shrinking
from dalle.errors import UserError
from dalle.evaluation.targets import Pipeline
from dalle.images import from_uint8, to_uint8
from dalle.metrics.edits import kept_beside, kept_outside, similarities
from dalle.metrics.intervals import Figure, of_mean, of_share
from dalle.metrics.judge import Judge
from dalle.metrics.metric import Rows
from dalle.metrics.reconstruction import likeness
from dalle.pipelines.editing import EDITS
from dalle.pipelines.repair import ROUNDING
from dalle.ranges import Fraction, Positive, PositiveInt, Share, check_value

HOLE, LOST = 3 / 8, 0.7  # a box's share of the side, and the share of pixels that are lost


class Editing(TypedDict):
    """The settings `editing` of conf/evaluate.yaml."""

    prompted: bool
    noise: Positive
    blur: Positive
    mask: Literal["box", "half", "pixels"]
    factor: PositiveInt
    resamplings: PositiveInt
    eta: Fraction
    angle: Share
    strength: Share


@dataclass
class Job:
    """A picture, what it is made of it before the edit, and what the pipeline's method is told."""

    image: Float[Tensor, "3 H W"]
    caption: str
    wanted: str
    rng: torch.Generator
    settings: dict[str, Any]
    options: dict[str, Any]

    @property
    def prompt(self) -> str | None:
        """Of repairs, which do without."""
        return self.caption if self.settings.get("prompted") else None

    @property
    def told(self) -> dict[str, Any]:
        """What the method is called with, beside what is of the spoiling."""
        own = ("prompted", "noise", "blur", "mask", "factor")
        return {**self.options, **{k: v for k, v in self.settings.items() if k not in own}}


Done = tuple[Tensor, Tensor | None, Tensor | None]  # made; spoilt, at its size; mask


def denoise(pipeline: Any, job: Job) -> Done:
    noise = job.settings["noise"]
    spoilt = noisy(job.image, job)
    return pipeline.denoise(spoilt, job.prompt, noise=noise, **job.told), spoilt, None


def restore(pipeline: Any, job: Job) -> Done:
    noise, size = job.settings.get("noise", ROUNDING), job.image.shape[-1]
    if "mask" in job.settings:
        mask = mask_of(job)
        torn = noisy(job.image, job).masked_fill(mask, 0.0)
        return pipeline.fill(torn, mask, job.prompt, noise=noise, **job.told), torn, mask
    sigma = job.settings["blur"]
    soft = noisy(blur(size, sigma)(job.image[None])[0], job)
    return pipeline.deblur(soft, job.prompt, blur_sigma=sigma, noise=noise, **job.told), soft, None


def enhance(pipeline: Any, job: Job) -> Done:
    size = job.image.shape[-1]
    small = noisy(shrinking(size, job.settings.get("factor", 2))(job.image[None])[0], job)
    noise = job.settings.get("noise", ROUNDING)
    made = pipeline.enhance(small, job.prompt, noise=noise, **job.told)
    return made, resized(small[None], (size, size), "bicubic")[0], None


def inpaint(pipeline: Any, job: Job) -> Done:
    mask = mask_of(job)
    return pipeline.inpaint(job.image, mask, job.wanted, **job.told), None, mask


def restyle(pipeline: Any, job: Job) -> Done:
    return pipeline.restyle(job.image, job.wanted, **job.told), None, None


def text_diff(pipeline: Any, job: Job) -> Done:
    told = {key: value for key, value in job.told.items() if key not in ("n", "seed")}
    return pipeline.text_diff(job.image, job.caption, job.wanted, frames=2, **told)[1:], None, None


def variations(pipeline: Any, job: Job) -> Done:
    return pipeline.variations(job.image, **job.told), None, None


def noisy(image: Tensor, job: Job) -> Tensor:
    """With the noise that is asked for, if any is, as a file of 8 bits has it."""
    noise = job.settings.get("noise", 0.0)
    return from_uint8(to_uint8(image + noise * torch.randn(image.shape, generator=job.rng)))


def mask_of(job: Job) -> Bool[Tensor, "H W"]:
    """A box somewhere, the right half, or most pixels; true where it hides."""
    size, kind = job.image.shape[-1], job.settings["mask"]
    if kind == "pixels":
        return torch.rand(size, size, generator=job.rng) < LOST
    mask = torch.zeros(size, size, dtype=torch.bool)
    if kind == "half":
        mask[:, size // 2 :] = True
        return mask
    side = round(HOLE * size)
    y, x = torch.randint(size - side + 1, (2,), generator=job.rng).tolist()
    mask[y : y + side, x : x + side] = True
    return mask


@dataclass(frozen=True)
class Kind:
    """How an edit is measured.

    Args:
        do: spoils and edits a picture.
        takes: settings of `editing`. needs: those it cannot do without, alternatives with a |.
        repairs: what should come out is the original.
        changes: its caption says one thing otherwise than the picture's.
    """

    do: Callable[[Any, Job], Done]
    takes: tuple[str, ...] = ()
    needs: str = ""
    repairs: bool = False
    changes: bool = False


KINDS = {
    "denoise": Kind(denoise, ("noise", "prompted"), "noise", repairs=True),
    "restore": Kind(restore, ("blur", "mask", "noise", "prompted"), "blur|mask", repairs=True),
    "enhance": Kind(enhance, ("factor", "noise", "prompted"), repairs=True),
    "inpaint": Kind(inpaint, ("mask", "resamplings"), "mask"),
    "restyle": Kind(restyle, ("strength",), changes=True),
    "text_diff": Kind(text_diff, ("angle",), changes=True),
    "variations": Kind(variations, ("eta",)),
}


class Edited(Pipeline):
    """Real pictures, edited by a pipeline of a prior and a decoder."""

    metrics = ("clip_score", "judge", "speed")

    def __init__(self, config: dict[str, Any]) -> None:
        self.name, self.settings = config["edit"], checked(config)
        super().__init__(config)
        self.kind, self.seed = KINDS[self.name], config["seed"]
        self.judge = Judge()
        self.facts |= {"edit": self.name, "editing": self.settings}

    def captions(self, source: Source, n: int) -> list[str]:
        own = super().captions(source, n)
        if not self.kind.changes:
            return own
        if not isinstance(source, Shapes):
            raise UserError(
                f"edit={self.name} is measured on data=shapes, whose captions it changes by a word"
            )
        return [self.changed(caption, item) for item, caption in enumerate(own)]

    def changed(self, caption: str, item: int) -> str:
        """Another colour or shape of an object, whichever the caption has; else the first that it has."""
        ways = swaps(caption)
        named = [name for name in ("colour", "shape") if name in ways] or list(ways)
        rng = np.random.default_rng(mix(self.seed, item))
        return str(rng.choice(ways[named[rng.integers(len(named))]])) if named else caption

    def make(
        self, source: Source, items: list[int], captions: list[str]
    ) -> tuple[Float[Tensor, "B 3 H W"], Rows]:
        real, own = source.images(items), first_captions(source, items)
        stages = {name: self.options.get(name, {}) for name in EDITS["unclip"][self.name].stages}
        done = []
        for item, image, caption, wanted in zip(items, real, own, captions, strict=True):
            key = mix(self.seed, item)
            options = {**stages, "seed": key, "precision": self.recipe.precision}
            rng = torch.Generator().manual_seed(key % 2**63)
            job = Job(image, caption, wanted, rng, self.settings, options)
            done.append(self.kind.do(self.module, job))
        made = torch.cat([pictures for pictures, _, _ in done])
        clip: Any = self.module.clip
        device: Any = self.module.device
        asked = captions if captions and all(captions) else ()
        rows = similarities(clip, made.to(device), real.to(device), asked)
        rows |= {name: finite(values) for name, values in likeness(made, real).items()}
        if self.kind.repairs:
            spoilt = torch.stack([before for _, before, _ in done if before is not None])
            rows["before_psnr"] = finite(likeness(spoilt, real)["psnr"])
            rows["better"] = (
                (rows["psnr"] > rows["before_psnr"]).float().where(~rows["before_psnr"].isnan(), torch.nan)
            )
        masks = [mask for _, _, mask in done if mask is not None]
        if isinstance(source, Shapes):
            before, after = self.judge.read(real), self.judge.read(from_uint8(to_uint8(made)))
            if masks:
                rows |= kept_outside(before, after, torch.stack(masks))
            elif not self.kind.repairs:
                same = captions if self.kind.changes else [""] * len(items)
                rows |= kept_beside(before, after, own, same)
        return made, rows

    def figures(self, rows: Rows) -> dict[str, Figure]:
        shares = ("better", "kept/")
        found = {name: (of_share if name.startswith(shares) else of_mean)(v) for name, v in rows.items()}
        return {name: figure for name, figure in found.items() if figure.value == figure.value}


def finite(values: Tensor) -> Tensor:
    """nan, which is left out, for a picture that nothing has changed."""
    return values.where(values.isfinite(), torch.nan)


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are given.

    Raises:
        UserError: an edit that is not measured, of what is no decoder; a setting that is wrong, missing, or
            not of this edit.
    """
    name, settings = config["edit"], {k: v for k, v in config["editing"].items() if v is not None}
    if name not in KINDS:
        raise UserError(f"edit={name} is not measured; there are {', '.join(KINDS)}")
    if config["pipeline"].get("kind") != "unclip" or config["run"] or config["folder"]:
        raise UserError("edits are measured of pipeline=unclip; leave out run= and folder=")
    if config["upsamplers"]:
        raise UserError("edits are measured at the decoder's size; leave out upsamplers")
    hints, kind = get_type_hints(Editing, include_extras=True), KINDS[name]
    for key, value in settings.items():
        if key not in kind.takes:
            known = ", ".join(f"editing.{one}" for one in kind.takes)
            raise UserError(f"editing.{key} is no setting of edit={name}; its settings are {known}")
        check_value(value, hints[key], f"editing.{key}")
    ways = kind.needs.split("|") if kind.needs else []
    if ways and not any(way in settings for way in ways):
        raise UserError(f"edit={name} needs {' or '.join(f'editing.{way}=' for way in ways)}")
    if {"blur", "mask"} <= settings.keys():
        raise UserError(
            "edit=restore undoes one thing at a time: give editing.blur or editing.mask, not both"
        )
    return settings
