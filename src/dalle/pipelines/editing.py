"""Edits of a picture: what `sample.py edit=... image=...` asks for, checked, and done by a method of the
pipeline. A recipe names the pictures, and knows them by their digests.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

import torch
from annotated_types import Ge, Le, Len
from jaxtyping import Bool, Float
from torch import Tensor

from dalle.data.image_files import MAX_PIXELS, BadPicture, Look, inspect, read
from dalle.diffusion.samplers import DETERMINISTIC, METHODS, Resamplings
from dalle.errors import UserError, instead
from dalle.images import from_uint8
from dalle.pipelines.masks import MAX_SIDE, check_any, kept_psnr, pasted
from dalle.ranges import Fraction, NonNegativeInt, Positive, Share, Text, check_value, shown

Frames = Annotated[int, Ge(2), Le(1000)]
Pixels = Annotated[int, Ge(0), Le(MAX_SIDE)]
Dims = Annotated[Sequence[NonNegativeInt], Len(1, 1000)]
Figures = dict[str, float]
LINES = {  # what is said of figures
    "kept_psnr": "the kept part, as the image tokenizer gives it back: {:.1f} dB",
    "round_trip": "the picture, made again of its noise: {:.1f} dB",
    "codes_drawn": "codes drawn anew: {:.0%}",
}


class Settings(TypedDict):
    """The settings `editing` of conf/sample.yaml."""

    paste: bool
    left: Pixels
    right: Pixels
    top: Pixels
    bottom: Pixels
    noise: Positive
    blur: Positive
    strength: Share
    eta: Fraction
    frames: Frames
    fixed_noise: bool
    source: Text
    angle: Share
    resamplings: Resamplings
    dims: Dims


@dataclass(frozen=True)
class Job:
    """What an edit works with: pictures that were read, and further arguments of a pipeline's methods."""

    image: Float[Tensor, "3 H W"]
    mask: Bool[Tensor, "h w"] | None
    other: Float[Tensor, "3 H W"] | None
    prompt: str
    settings: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """An edit that a pipeline knows.

    Args:
        do: gives the pictures (N, 3, H, W), and figures about them.
        takes: the settings of `editing` that it knows.
        needs: what it cannot do without, alternatives with a |.
        stages: whose options its pipeline's method takes.
        small: the picture is read at its own size, not at the pipeline's.
        ddim: no other sampler will do.
        mute: it reads no prompt.
        sequence: it gives a sequence of pictures, not `n` of a kind.
        strip: what it draws comes about in one run of a sampler, which can be shown.
    """

    do: Callable[[Any, Job], tuple[Tensor, Figures]]
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    small: bool = False
    ddim: bool = False
    mute: bool = False
    sequence: bool = False
    strip: bool = True


def inpaint(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    settings = dict(job.settings)
    paste = settings.pop("paste", True)
    drawn = pipeline.inpaint(job.image, job.mask, job.prompt, paste=False, **settings, **job.options)
    assert job.mask is not None
    figures = {}
    if hasattr(pipeline, "known_codes"):
        codes = torch.tensor(pipeline.known_codes(job.image, job.mask))
        figures = {
            "kept_psnr": kept_psnr(drawn, job.image, job.mask).mean().item(),
            "codes_drawn": (codes < 0).float().mean().item(),
        }
    return pasted(drawn, job.image, job.mask) if paste else drawn, figures


def outpaint(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    return pipeline.outpaint(job.image, job.prompt, **job.settings, **job.options), {}


def denoise(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    return pipeline.denoise(job.image, job.prompt or None, **job.settings, **job.options), {}


def restore(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    settings = dict(job.settings)
    if job.mask is not None:
        return pipeline.fill(job.image, job.mask, job.prompt or None, **settings, **job.options), {}
    settings["blur_sigma"] = settings.pop("blur")
    return pipeline.deblur(job.image, job.prompt or None, **settings, **job.options), {}


def enhance(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    return pipeline.enhance(job.image, job.prompt or None, **job.settings, **job.options), {}


def restyle(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    return pipeline.restyle(job.image, job.prompt, **job.settings, **job.options), {}


def variations(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    known = pipeline.invert(job.image, job.options.get("decoder"), job.options["precision"])
    images = pipeline.variations(job.image, inverted=known, **job.settings, **job.options)
    return images, {"round_trip": decibels(known.error)}


def interpolate(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    options = sequence_options(job)
    if job.settings.get("fixed_noise"):
        options["seed"] = job.options["seed"]
        return pipeline.interpolate(job.image, job.other, **job.settings, **options), {}
    both = [pipeline.invert(one, options["decoder"], options["precision"]) for one in (job.image, job.other)]
    images = pipeline.interpolate(job.image, job.other, inverted=tuple(both), **job.settings, **options)
    return images, {"round_trip": decibels(max(known.error for known in both))}


def text_diff(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    options, settings = sequence_options(job), dict(job.settings)
    known = pipeline.invert(job.image, options["decoder"], options["precision"])
    source = settings.pop("source", "")
    images = pipeline.text_diff(job.image, source, job.prompt, inverted=known, **settings, **options)
    return images, {"round_trip": decibels(known.error)}


def reconstruct(pipeline: Any, job: Job) -> tuple[Tensor, Figures]:
    options = {key: value for key, value in job.options.items() if key != "n"}
    return pipeline.reconstruct(job.image, **job.settings, **options), {}


def sequence_options(job: Job) -> dict[str, Any]:
    """Without what only several pictures of a kind need."""
    return {"decoder": {}, **{key: value for key, value in job.options.items() if key not in ("n", "seed")}}


def decibels(error: float) -> float:
    """PSNR of a root mean square error in units of [-1, 1]."""
    return 20 * math.log10(2 / error) if error else math.inf


SIDES = ("left", "right", "top", "bottom")
EDITS: dict[str, dict[str, Kind]] = {
    "dalle": {
        "inpaint": Kind(inpaint, ("paste",), ("mask", "prompt"), ("dalle", "clip"), strip=False),
        "outpaint": Kind(outpaint, SIDES, ("|".join(SIDES), "prompt"), ("dalle", "clip"), strip=False),
    },
    "unclip": {
        "inpaint": Kind(
            inpaint, ("paste", "resamplings"), ("mask", "prompt"), ("prior", "decoder"), ddim=True
        ),
        "outpaint": Kind(
            outpaint,
            (*SIDES, "resamplings"),
            ("|".join(SIDES), "prompt"),
            ("prior", "decoder"),
            ddim=True,
            strip=False,
        ),
        "denoise": Kind(denoise, ("noise",), (), ("decoder",)),
        "restore": Kind(restore, ("noise", "blur"), ("blur|mask",), ("decoder",)),
        "enhance": Kind(enhance, ("noise",), (), ("decoder",), small=True),
        "restyle": Kind(restyle, ("strength",), ("prompt",), ("prior", "decoder")),
        "variations": Kind(variations, ("eta",), (), ("decoder",), ddim=True, mute=True),
        "interpolate": Kind(
            interpolate,
            ("frames", "fixed_noise"),
            ("other",),
            ("decoder",),
            ddim=True,
            mute=True,
            sequence=True,
        ),
        "text_diff": Kind(
            text_diff, ("source", "angle", "frames"), ("prompt",), ("decoder",), ddim=True, sequence=True
        ),
        "reconstruct": Kind(reconstruct, ("dims",), (), ("decoder",), ddim=True, mute=True, sequence=True),
    },
}


@dataclass(frozen=True)
class Edit:
    """What is done to which pictures (path and digest of `image`, `mask`, `other`). Plain data."""

    kind: str
    files: dict[str, dict[str, str]]
    settings: dict[str, Any]

    @classmethod
    def asked_for(cls, config: Mapping[str, Any]) -> "Edit | None":
        """The edit of conf/sample.yaml's settings; None: pictures are drawn from nothing.

        Raises:
            UserError: one that the pipeline does not know; what it takes is wrong, missing or not for it;
                pictures that are missing or unreadable; a mask of another size, or of one colour.
        """
        name = config["edit"]
        check_value(config["editing"], dict, "editing")
        settings = {key: value for key, value in config["editing"].items() if value is not None}
        paths = {key: config[key] for key in ("image", "mask", "other") if config[key] is not None}
        if name is None:
            for word in [*paths, *(f"editing.{key}" for key in settings)]:
                raise UserError(f"{word} is of an edit: say which with edit=")
            return None
        kind = kind_of(name, config["pipeline"]["kind"])
        check_settings(settings, kind, name)
        method = config["sampler"].get("method") if kind.ddim else None
        if method in METHODS and method not in DETERMINISTIC:
            raise UserError(f"edit={name} is done by DDIM alone, not by {method}; take sampler=ddim")
        if kind.sequence and config["n"] != 1:
            what = (
                "editing.frames= pictures"
                if "frames" in kind.takes
                else "a picture for each of editing.dims="
            )
            raise UserError(f"edit={name} gives one sequence, of {what}; leave out n")
        check_needs({**settings, **paths, "prompt": config["prompt"] or config["prompts"]}, kind, name)
        looks = {key: look(path, key) for key, path in paths.items()}
        check_alike(looks, paths)
        files = {key: {"path": paths[key], "digest": found.digest} for key, found in looks.items()}
        if "mask" in files:
            check_both(read_mask(**files["mask"], size=None))
        return cls(name, files, settings)

    @classmethod
    def of(cls, facts: Mapping[str, Any], pipeline: str, where: str) -> "Edit":
        """What a recipe says. Raises UserError for what is no edit of its pipeline."""
        edit = cls(**facts)
        kind = kind_of(edit.kind, pipeline)
        check_settings(edit.settings, kind, edit.kind)
        needed = {"image", *{"mask", "other"}.intersection(kind.needs)}
        if needed - edit.files.keys():
            raise UserError(f"{where}: edit.files say too little; restore the recipe")
        return edit

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def draw(
        self, pipeline: Any, kind: str, prompt: str, drawing: Mapping[str, Any], stages: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "N 3 H W"], Figures]:
        """The pictures, and figures about them.

        Args:
            kind: of the pipeline.
            drawing: n, seed, batch_size, precision. stages: options of the stages by name.
        """
        edit = EDITS[kind][self.kind]
        image, mask, other = self.pictures(kind, pipeline.image_size)
        options = {name: stages.get(name, {}) for name in edit.stages}
        chooser = options.pop("clip", {})  # the pipeline itself takes `candidates`
        options = {**drawing, **options, **chooser}
        images, figures = edit.do(pipeline, Job(image, mask, other, prompt, self.settings, options))
        return images, {name: value for name, value in figures.items() if math.isfinite(value)}

    def pictures(
        self, kind: str, size: int
    ) -> tuple[Float[Tensor, "3 H W"], Bool[Tensor, "h w"] | None, Float[Tensor, "3 h w"] | None]:
        """Image, mask and the other picture, as far as there are any, read for a pipeline of this kind and
        size.
        """
        small = EDITS[kind][self.kind].small
        image = read_picture("image", **self.files["image"], size=None if small else size)
        mask = other = None
        if found := self.files.get("mask"):
            mask = read_mask(**found, size=size)
        if found := self.files.get("other"):
            other = read_picture("other", **found, size=size)
        return image, mask, other


def kind_of(name: Any, pipeline: str) -> Kind:
    """Raises UserError for an edit that the pipeline does not know."""
    known = EDITS.get(pipeline, {})
    if isinstance(name, str) and name in known:
        return known[name]
    if others := [other for other, edits in EDITS.items() if isinstance(name, str) and name in edits]:
        raise UserError(f"edit={name} is of pipeline={' or '.join(others)}, not of pipeline={pipeline}")
    raise UserError(f"pipeline={pipeline} has no edit={shown(name)}{instead(str(name), known, 'edit=')}")


def check_settings(settings: Mapping[str, Any], kind: Kind, name: str) -> None:
    """Raises UserError for a setting of a wrong type, or one that this edit does not know."""
    hints = get_type_hints(Settings, include_extras=True)
    for key, value in settings.items():
        if key not in kind.takes:
            known = ", ".join(f"editing.{one}" for one in kind.takes) or "none"
            raise UserError(f"editing.{key} is no setting of edit={name}; its settings are {known}")
        check_value(value, hints[key], f"editing.{key}")


def check_needs(given: Mapping[str, Any], kind: Kind, name: str) -> None:
    """Raises UserError where something is missing, or there is a mask too many."""
    for need in ("image", *kind.needs):
        ways = need.split("|")
        if not any(given.get(way) for way in ways):
            named = [f"editing.{way}=" if way in kind.takes else f"{way}=" for way in ways]
            raise UserError(f"edit={name} needs {' or '.join(named)}")
    if kind.mute and given["prompt"]:
        raise UserError(f"edit={name} reads no prompt; leave it out")
    if "mask" in given and not any("mask" in need for need in kind.needs):
        raise UserError(f"edit={name} takes no mask; leave it out")
    if "other" in given and "other" not in kind.needs:
        raise UserError(f"edit={name} takes one picture; leave out other")
    if "mask" in given and "blur" in given:
        raise UserError(f"edit={name} undoes one thing at a time: give editing.blur or mask, not both")


def look(path: Any, name: str) -> Look:
    """Raises UserError for what is no picture."""
    if not isinstance(path, str):
        raise UserError(f"{name} must be a file, got {shown(path)}")
    if not Path(path).expanduser().is_file():
        raise UserError(f"there is no picture {name}={path}")
    try:
        return inspect(Path(path).expanduser(), MAX_PIXELS)
    except BadPicture as error:
        raise UserError(f"{name}={path} is {error}; give a picture") from None


def check_alike(looks: Mapping[str, Look], paths: Mapping[str, str]) -> None:
    """Raises UserError for a mask of another size than the picture's."""
    if "mask" in looks:
        sizes = {name: f"{seen.width} x {seen.height}" for name, seen in looks.items()}
        if sizes["mask"] != sizes["image"]:
            raise UserError(
                f"mask={paths['mask']} has {sizes['mask']} px, but the picture {sizes['image']}; give one of "
                "its size"
            )


def check_both(mask: Bool[Tensor, "h w"]) -> None:
    """Raises UserError for a mask by which nothing would change, or nothing stay."""
    check_any(mask)
    if mask.all():
        raise UserError(
            "the mask is white all over: nothing of the picture would stay; paint black what is to, or draw "
            "without edit="
        )


def read_mask(path: str, digest: str, size: int | None) -> Bool[Tensor, "h w"]:
    """True where it is lighter than middle gray; otherwise as `read_picture`."""
    return read_picture("mask", path, digest, size).mean(0) > 0


def read_picture(name: str, path: str, digest: str, size: int | None) -> Float[Tensor, "3 H W"]:
    """Its central square at this size, in [-1, 1]; None: at its own size.

    Raises:
        UserError: it is gone, cannot be read, or is another than its digest says.
    """
    seen = look(path, name)
    if seen.digest != digest:
        raise UserError(f"{path} is another picture than it was; give the one that the recipe is of")
    pixels = read(Path(path).expanduser(), size or min(seen.width, seen.height), 1, MAX_PIXELS)
    return from_uint8(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
