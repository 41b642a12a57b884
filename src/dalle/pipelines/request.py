"""What is wanted of a pipeline: every one has a class of requests, which says what it can be told, how that
becomes the options of its stages, and how a recipe of it is drawn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.data.image_files import MAX_PIXELS, BadPicture, read
from dalle.errors import UserError
from dalle.images import from_uint8
from dalle.instantiate import check_arguments
from dalle.pipelines.editing import EDITS
from dalle.pipelines.load import (
    PUBLIC,
    Loaded,
    load_dalle,
    load_gan,
    load_unclip,
    load_vae,
    no_stages,
)
from dalle.pipelines.picture_folder import read_pictures, seen_pictures
from dalle.pipelines.recipe import SampleRecipe
from dalle.pipelines.strips import Estimates
from dalle.ranges import (
    Fraction,
    Guidance,
    NonNegative,
    PositiveInt,
    Seed,
    Share,
    Steps,
    Text,
    fits,
    misfit,
    shown,
)
from dalle.reading import read_text
from dalle.run_dir import Run
from dalle.schemas import Many

SAMPLER = "dalle.diffusion.samplers.Sampler"
PRIOR_TAKES = {  # by stage that makes image embeddings, what it can be told
    "prior": ("sampler", "guidance", "candidates"),
    "ar_prior": ("temperature", "top_k", "top_p", "dot_quantile", "guidance", "candidates"),
}
# that pipelines are made of
RUNS = ("clip", "prior", "decoder", "dalle", "image_tokenizer", "gan", "vae", "upsampler")
UPSAMPLER = "upsampler_{}"  # what the stages of `upsamplers` are called in recipes: 1, 2 ...
SIDES = re.compile(r"(\d{1,5})x(\d{1,5})")  # width and height


class Upsampling(TypedDict):
    """The settings `upsampling` of conf/sample.yaml."""

    steps: Steps | None
    noise_level: Fraction | None
    tile: PositiveInt | None


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What is wanted, of whatever pipeline: the settings of conf/sample.yaml, which says what each means."""

    pipeline: dict[str, Any]
    paths: dict[str, Any]
    name: str
    prompt: str | list[str | int | float] | None
    prompts: Text | None
    n: Many
    seed: Seed
    guidance: Guidance | None
    batch_size: Many
    precision: Literal["auto", "32-true", "bf16-mixed"]
    device: Literal["auto", "cpu", "cuda"]
    compile: Literal["auto", "none", "graphs", "full"]
    truncate: bool
    out: Text | None
    recipe: Text | None
    upsamplers: list[Text]
    upsampling: dict[str, Any]

    main: ClassVar[str]  # the stage that draws the pictures
    takes: ClassVar[Mapping[str, Sequence[str]]] = {}  # by stage, what it can be told

    @classmethod
    def of(cls, config: dict[str, Any]) -> "SamplingConfig":
        """Raises UserError for a setting of a wrong type."""
        settings = {field.name: config[field.name] for field in fields(cls)}
        check_arguments(cls, settings, "", partial_call=False)
        for name, path in settings["pipeline"].items():
            if name in RUNS and not fits(path, Text if name in (cls.main, "upsampler") else Text | None):
                raise UserError(f"pipeline.{name} must be the directory of a run, got {shown(path)}")
        for name, value in settings["upsampling"].items():
            hint = get_type_hints(Upsampling, include_extras=True).get(name)
            if hint is None:
                raise UserError(f"there is no setting upsampling.{name}; there are steps, noise_level, tile")
            if wrong := misfit(value, hint):
                raise UserError(f"upsampling.{name} must be {wrong.wanted}, got {shown(wrong.got)}")
        return cls(**settings)

    def prompts_read(self) -> list[str]:
        """The prompts themselves."""
        return read_prompts(self.prompt, self.prompts)

    def runs(self) -> dict[str, str | None]:
        """Where the stages are."""
        raise NotImplementedError

    def options(self) -> dict[str, dict[str, Any]]:
        """What the stages are told."""
        raise NotImplementedError

    def more_runs(self) -> dict[str, str]:
        """Where the upsamplers are: runs, or their names beside the other stages'."""
        beside = Path(self.paths["logs"], self.name)
        found = {}
        for number, given in enumerate(self.upsamplers, 1):
            usual = beside / given
            found[UPSAMPLER.format(number)] = str(usual if Run(usual).finished else given)
        return found

    def upsampler_options(self) -> dict[str, Any]:
        """What every upsampler is told."""
        steps = self.upsampling.get("steps")
        return {
            "sampler": {"method": "ddim", "steps": steps} if steps else None,
            "noise_level": self.upsampling.get("noise_level"),
            "tile": self.upsampling.get("tile"),
        }

    def all_options(self) -> dict[str, dict[str, Any]]:
        """Those of the upsamplers, too."""
        return self.options() | {name: self.upsampler_options() for name in self.more_runs()}

    def complete(self, recipe: SampleRecipe, loaded: Loaded) -> SampleRecipe:
        """Adds what is known only once the stages are there."""
        return recipe

    @staticmethod
    def load(runs: Mapping[str, str | None]) -> Loaded:
        """The pipeline of these stages."""
        raise NotImplementedError

    @staticmethod
    def draw(
        pipeline: Any, recipe: SampleRecipe, options: dict[str, dict[str, Any]], **more: Any
    ) -> Float[Tensor, "N F 3 H W"]:
        """The recipe's pictures, each as it came about: the last of F is the one that was asked for.

        `more` goes to the pipeline's method.
        """
        settings = {"n": recipe.n, "seed": recipe.seed, "batch_size": recipe.batch_size}
        images = pipeline.sample(
            recipe.prompts,
            **settings,
            precision=recipe.precision,
            truncate=recipe.truncate,
            **options,
            **more,
        )
        return images[:, None]


@dataclass(frozen=True, kw_only=True)
class UnclipSamplingConfig(SamplingConfig):
    """DALL-E 2: conf/pipeline/unclip.yaml."""

    prior: Text | None
    sampler: dict[str, Any]
    size: Text | None
    steps: Steps | None
    text_guidance: Guidance | None
    progress_strip: bool

    main = "decoder"
    takes: ClassVar = {
        "prior": tuple(dict.fromkeys(key for some in PRIOR_TAKES.values() for key in some)),
        "decoder": ("sampler", "guidance", "text_guidance", "size"),
    }

    def runs(self) -> dict[str, str | None]:
        return {name: self.pipeline[name] for name in ("clip", "prior", "decoder")}

    def options(self) -> dict[str, dict[str, Any]]:
        sampler = {k: v for k, v in self.sampler.items() if not k.startswith("_")}
        if self.sampler.get("_target_", SAMPLER) != SAMPLER:
            raise UserError(
                f"sampler._target_={self.sampler['_target_']}: a sampler of your own is a function that is "
                "registered (dalle.diffusion.samplers.register) and named by sampler.method"
            )
        if self.steps is not None:
            sampler["steps"] = self.steps
        decoder: dict[str, Any] = {"sampler": sampler, "guidance": self.guidance}
        decoder["text_guidance"] = self.text_guidance
        if self.size is not None:
            decoder["size"] = sides(self.size)
        return {"prior": prior_options(self.pipeline) if self.pipeline["prior"] else {}, "decoder": decoder}

    @staticmethod
    def load(runs: Mapping[str, str | None]) -> Loaded:
        clip, decoder = runs.get("clip"), runs["decoder"]
        assert decoder
        # A recipe names a public CLIP by its name; that one is made from the decoder's config again.
        return load_unclip(decoder, runs.get("prior"), clip if clip and Path(clip).exists() else None)

    @staticmethod
    def draw(
        pipeline: Any, recipe: SampleRecipe, options: dict[str, dict[str, Any]], **more: Any
    ) -> Float[Tensor, "N F 3 H W"]:
        told, estimates = watched(recipe, options)
        return estimates.strip(SamplingConfig.draw(pipeline, recipe, told, **more)[:, 0])


def sides(size: str) -> list[int]:
    """Height and width of WIDTHxHEIGHT. Raises UserError."""
    if not (found := SIDES.fullmatch(size)) or min(map(int, found.groups())) < 1:
        raise UserError(f"size={size}: give width x height of the pictures, as size=80x48")
    return [int(found[2]), int(found[1])]


def watched(
    recipe: SampleRecipe, options: dict[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], Estimates]:
    """The options with which a decoder's estimates are kept, where the recipe asks for a strip of them."""
    estimates = Estimates()
    one_run = not recipe.edit or EDITS[recipe.pipeline][recipe.edit["kind"]].strip
    if not (recipe.progress_strip and one_run and "decoder" in options):
        return options, estimates
    return {**options, "decoder": {**options["decoder"], "on_step": estimates}}, estimates


def prior_options(pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """What the prior of these settings is told.

    Raises:
        UserError: something that is for the other kind of prior.
    """
    run = Run(Path(pipeline["prior"]))
    stage = run.manifest().get("stage", "") if run.finished else ""
    takes = PRIOR_TAKES.get(stage, PRIOR_TAKES["prior"])  # what is missing or no prior is said on loading
    for key in PRIOR_TAKES["ar_prior"]:
        if key not in takes and (value := pipeline.get(f"prior_{key}")) is not None:
            raise UserError(
                f"pipeline.prior_{key}={shown(value)} is for an autoregressive prior, which {run} is not; "
                "leave it out, or give prior=ar_prior"
            )
    return {key: pipeline.get(f"prior_{key}") for key in takes}


@dataclass(frozen=True, kw_only=True)
class DalleSamplingConfig(SamplingConfig):
    """DALL-E: conf/pipeline/dalle.yaml."""

    temperature: NonNegative | None
    top_k: PositiveInt | None
    top_p: Share | None
    candidates: PositiveInt
    init_image: Text | None
    init_rows: PositiveInt | None
    progress_strip: bool

    main = "dalle"
    takes: ClassVar = {
        "dalle": ("temperature", "top_k", "top_p", "guidance"),
        "clip": ("candidates",),
        "image_tokenizer": ("prefix",),
    }

    def runs(self) -> dict[str, str | None]:
        clip = self.pipeline["clip"] if self.candidates > 1 else None
        if clip and not clip.startswith(PUBLIC) and not Run(Path(clip)).finished:
            raise UserError(
                f"candidates={self.candidates} need a CLIP that chooses among them, and {clip} holds none; "
                f"train one with model=clip, or give pipeline.clip=RUN, or {PUBLIC}ViT-B-32/openai there"
            )
        return {
            "dalle": self.pipeline["dalle"],
            "image_tokenizer": self.pipeline["image_tokenizer"],
            "clip": clip,
        }

    def options(self) -> dict[str, dict[str, Any]]:
        keys = ("temperature", "top_k", "top_p", "guidance")
        return {"dalle": {key: getattr(self, key) for key in keys}, "clip": {"candidates": self.candidates}}

    def complete(self, recipe: SampleRecipe, loaded: Loaded) -> SampleRecipe:
        """The first codes of the picture to be completed: the recipe then does without the picture."""
        if self.init_image is None:
            return recipe
        path, size = Path(self.init_image), loaded.pipeline.image_tokenizer.image_size
        try:
            pixels = torch.from_numpy(read(path, size, 1, MAX_PIXELS).copy()) if path.is_file() else None
        except BadPicture as error:
            raise UserError(f"init_image={path} is {error}; give a picture") from None
        if pixels is None:
            raise UserError(f"there is no picture init_image={path}")
        prefix = loaded.pipeline.init_codes(from_uint8(pixels.permute(2, 0, 1))[None], self.init_rows)
        return replace(recipe, options={**recipe.options, "image_tokenizer": {"prefix": prefix}})

    @staticmethod
    def load(runs: Mapping[str, str | None]) -> Loaded:
        dalle = runs["dalle"]
        assert dalle
        return load_dalle(dalle, runs.get("image_tokenizer"), runs.get("clip"))

    @staticmethod
    def draw(
        pipeline: Any, recipe: SampleRecipe, options: dict[str, dict[str, Any]], **more: Any
    ) -> Float[Tensor, "N F 3 H W"]:
        return pipeline.frames(
            recipe.prompts,
            n=recipe.n,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            precision=recipe.precision,
            dalle=options["dalle"],
            frames=4 if recipe.progress_strip else 1,
            **options["clip"],
            **options.get("image_tokenizer", {}),
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class GanSamplingConfig(SamplingConfig):
    """A GAN: conf/pipeline/gan.yaml."""

    main = "gan"

    def runs(self) -> dict[str, str | None]:
        return {name: self.pipeline[name] for name in ("clip", "gan")}

    def options(self) -> dict[str, dict[str, Any]]:
        return _without_guidance(self)

    @staticmethod
    def load(runs: Mapping[str, str | None]) -> Loaded:
        clip, gan = runs.get("clip"), runs["gan"]
        assert gan
        return load_gan(gan, clip if clip and Path(clip).exists() else None)


@dataclass(frozen=True, kw_only=True)
class VaeSamplingConfig(SamplingConfig):
    """A VAE, which reads no prompts: conf/pipeline/vae.yaml."""

    main = "vae"

    def prompts_read(self) -> list[str]:
        if self.prompt is not None or self.prompts is not None:
            raise UserError("pipeline=vae reads no prompts; leave them out, n= says how many pictures")
        return [""]

    def runs(self) -> dict[str, str | None]:
        return {"vae": self.pipeline["vae"]}

    def options(self) -> dict[str, dict[str, Any]]:
        return _without_guidance(self)

    @staticmethod
    def load(runs: Mapping[str, str | None]) -> Loaded:
        vae = runs["vae"]
        assert vae
        return load_vae(vae)


@dataclass(frozen=True, kw_only=True)
class UpsamplerSamplingConfig(SamplingConfig):
    """An upsampler alone, on a folder of pictures: conf/pipeline/upsampler.yaml."""

    images: Text | None

    main = "upsampler_1"
    takes: ClassVar = {"images": ("folder", "digests")}

    def prompts_read(self) -> list[str]:
        """The pictures' names."""
        if self.prompt is not None or self.prompts is not None:
            raise UserError("pipeline=upsampler reads no prompts; leave them out, images= says what it reads")
        if self.images is None:
            raise UserError("say which pictures to enlarge: images=FOLDER")
        return list(seen_pictures(self.images))

    def runs(self) -> dict[str, str | None]:
        return {}

    def more_runs(self) -> dict[str, str]:
        own = self.pipeline["upsampler"]
        runs = [own, *super().more_runs().values()]
        return {UPSAMPLER.format(number): path for number, path in enumerate(runs, 1)}

    def options(self) -> dict[str, dict[str, Any]]:
        _without_guidance(self)
        seen = seen_pictures(self.images or "")
        return {"images": {"folder": self.images, "digests": list(seen.values())}}

    @staticmethod
    def load(runs: Mapping[str, str | None]) -> Loaded:
        return no_stages()

    @staticmethod
    def draw(
        pipeline: Any, recipe: SampleRecipe, options: dict[str, dict[str, Any]], **more: Any
    ) -> list[Tensor]:
        """Each picture at a size of its own."""
        folder, digests = options["images"]["folder"], options["images"]["digests"]
        pictures = read_pictures(folder, dict(zip(recipe.prompts, digests, strict=True)))
        return [picture[None] for picture in pictures for _ in range(recipe.n)]


def _without_guidance(request: SamplingConfig) -> dict[str, dict[str, Any]]:
    if request.guidance is not None:
        raise UserError(
            f"guidance={request.guidance}: pipeline={request.pipeline['kind']} knows none; leave it out"
        )
    return {}


REQUESTS: dict[str, type[SamplingConfig]] = {
    "unclip": UnclipSamplingConfig,
    "dalle": DalleSamplingConfig,
    "gan": GanSamplingConfig,
    "vae": VaeSamplingConfig,
    "upsampler": UpsamplerSamplingConfig,
}


def kind_of(pipeline: Any, where: str) -> type[SamplingConfig]:
    """The requests of a pipeline that is called so."""
    if not isinstance(pipeline, str) or pipeline not in REQUESTS:
        raise UserError(f"{where} must be one of {', '.join(REQUESTS)}, got {shown(pipeline)}")
    return REQUESTS[pipeline]


def read_prompts(prompt: str | list[Any] | None, file: str | None) -> list[str]:
    """The prompts themselves (one or a list), or those of a file, one a line."""
    if prompt is not None and file is not None:
        raise UserError("give prompt= or prompts=, not both")
    if prompt is not None:
        given = prompt if isinstance(prompt, list) else [prompt]
        return [readable(str(one)) for one in given] or [readable("")]
    if file is None:
        raise UserError(
            'give a prompt: prompt="a small red circle", or a file with a prompt on each line: prompts=FILE'
        )
    text = read_text(file, "give a text file with a prompt on each line: prompts=FILE")
    prompts = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompt; write one on each line")
    return prompts


def readable(prompt: str) -> str:
    """The prompt, if there is something in it to draw."""
    if not prompt.strip():
        raise UserError('the prompt is empty; say what to draw: prompt="a small red circle"')
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt is no text in UTF-8: {shown(prompt)}; write it anew") from None
    return prompt
