"""One sampling: from a resolved config, or a recipe, to pictures with the recipe that makes them again.

Every pipeline has a class of requests: what it can be told, how that becomes a recipe, and how the recipe is
carried out.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, get_type_hints

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle.data.image_files import MAX_PIXELS, BadPicture, read
from dalle.data.sources import mix
from dalle.errors import UserError
from dalle.files import check_writable, explained, write_json
from dalle.images import from_uint8, grid, save_gif, save_png, to_pil, to_uint8
from dalle.instantiate import check_arguments, instantiate
from dalle.machine import fast_in_bf16, pick_compile, pick_device
from dalle.pipelines import edit_report
from dalle.pipelines.editing import EDITS, LINES, Edit, Figures
from dalle.pipelines.load import (
    PUBLIC,
    Loaded,
    load_dalle,
    load_gan,
    load_unclip,
    load_vae,
    no_stages,
    with_upsamplers,
)
from dalle.pipelines.picture_folder import read_pictures, seen_pictures
from dalle.pipelines.recipe import SampleRecipe
from dalle.pipelines.strips import Estimates
from dalle.ranges import (
    Fraction,
    Guidance,
    NonNegative,
    NonNegativeInt,
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
from dalle.run_lock import check_name
from dalle.trust import listed, set_trusted

SAMPLER = "dalle.diffusion.samplers.Sampler"
OPTIONS: dict[str, Any] = {  # of stages, where they are given in words and numbers
    "guidance": Guidance,
    "text_guidance": Guidance,
    "temperature": NonNegative,
    "top_k": PositiveInt,
    "top_p": Share,
    "dot_quantile": Fraction,
    "candidates": PositiveInt,
    "prefix": list[NonNegativeInt],
    "noise_level": Fraction,
    "tile": PositiveInt,
    "folder": Text,
    "digests": list[Text],
    "size": list[PositiveInt],
}
PRIOR_TAKES = {  # by stage that makes image embeddings, what it can be told
    "prior": ("sampler", "guidance", "candidates"),
    "ar_prior": ("temperature", "top_k", "top_p", "dot_quantile", "guidance", "candidates"),
}
# that pipelines are made of
RUNS = ("clip", "prior", "decoder", "dalle", "image_tokenizer", "gan", "vae", "upsampler")
UPSAMPLER = "upsampler_{}"  # what the stages of `upsamplers` are called in recipes: 1, 2 ...
SIDES = re.compile(r"(\d{1,5})x(\d{1,5})")  # width and height
UPSAMPLING = ("sampler", "noise_level", "tile")  # what they can be told


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
    n: PositiveInt
    seed: Seed
    guidance: Guidance | None
    batch_size: PositiveInt
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


def load(kind: type[SamplingConfig], runs: Mapping[str, str | None]) -> Loaded:
    """The pipeline of these stages, upsamplers included."""
    names = (UPSAMPLER.format(number) for number in range(1, len(runs) + 1))
    return with_upsamplers(kind.load(runs), {name: path for name in names if (path := runs.get(name))})


def draw(
    kind: type[SamplingConfig],
    pipeline: Any,
    recipe: SampleRecipe,
    options: dict[str, dict[str, Any]],
    **more: Any,
) -> Tensor | list[Tensor]:
    """The recipe's pictures, enlarged by the upsamplers there are; `SamplingConfig.draw` has the rest."""
    told = {name: node for name, node in options.items() if _is_upsampler(name)}
    own = {name: node for name, node in options.items() if name not in told}
    frames = kind.draw(pipeline, recipe, own, **more)
    if pipeline.upsamplers is None:
        return frames
    settings = {"n": recipe.n, "seed": recipe.seed, "batch_size": recipe.batch_size}
    settings |= {"precision": recipe.precision, "options": told, **more}
    if isinstance(frames, Tensor):
        return pipeline.upsample(frames[:, -1], **settings)[:, None]
    return [
        pipeline.upsample(frame, **{**settings, "n": 1, "seed": mix(recipe.seed, j), "numbers": [i]})
        for k, frame in enumerate(frames)
        for i, j in [divmod(k, recipe.n)]
    ]


def edited(
    edit: Edit, pipeline: Any, recipe: SampleRecipe, options: dict[str, dict[str, Any]]
) -> tuple[Tensor, Figures]:
    """The recipe's pictures (N, F, 3, H, W), each as it came about, and figures about them."""
    drawing: dict[str, Any] = {"n": recipe.n, "seed": recipe.seed, "batch_size": recipe.batch_size}
    drawing["precision"] = recipe.precision
    watching, estimates = watched(recipe, options)
    images, figures = edit.draw(pipeline, recipe.pipeline, recipe.prompts[0], drawing, watching)
    if pipeline.upsamplers is not None:
        told = {name: node for name, node in options.items() if _is_upsampler(name)}
        images = pipeline.upsample(images, **drawing, options=told)
    return estimates.strip(images), figures


def prompts_for(request: SamplingConfig, edit: Edit | None) -> list[str]:
    """The prompts; an edit does with one, and some with none.

    Raises:
        UserError: there is none but must be, or there are too many.
    """
    if edit is None:
        return request.prompts_read()
    if request.prompt is None and request.prompts is None:
        return [""]  # where one is needed, the edit has said so
    prompts = request.prompts_read()
    if len(prompts) > 1:
        raise UserError(f"edit={edit.kind} takes one prompt, not {len(prompts)}; n= makes several pictures")
    return prompts


def sample(config: dict[str, Any]) -> Path:
    """Samples what `config` or its recipe asks for; grid.png, single PNGs and recipe.yaml go into one folder.

    Raises:
        UserError: a wrong setting, stages that are missing or do not fit together, an occupied folder.
    """
    set_trusted(config.get("trust"))
    request = kind_of(config["pipeline"].get("kind"), "pipeline.kind").of(config)
    again = SampleRecipe.read(request.recipe) if request.recipe else None
    edit = None if again else Edit.asked_for(config)
    recipe = again or make_recipe(request, prompts_for(request, edit), edit)
    kind = kind_of(recipe.pipeline, f"{request.recipe}: pipeline")
    if again:
        check_parts(again, kind, f"{request.recipe}")
    if again and again.edit:
        edit = Edit.of(again.edit, again.pipeline, f"{request.recipe}")
    pick_device(recipe.device)  # refuses one that is not here
    for stage, node in recipe.options.items():
        arguments(node, stage)  # refuses what is wrong before anything is loaded
    check_name(request.name, "name")
    usual = Path(request.paths["logs"], request.name, "samples")
    out = Path(request.out) if request.out else next_folder(usual)  # another process may take it meanwhile
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give another folder with out=")
    check_writable(out, "folder with out=")

    runs: Mapping[str, str | None] = request.runs() | request.more_runs()
    if again and request.recipe:
        runs = again.find_runs(Path(request.recipe), usual.parent, runs)
    loaded = load(kind, runs)
    if again:
        again.check_stages(loaded.weights)
        for what, (then, now) in again.differences().items():
            print(f"note: the recipe was made with {what} {then}, this is {now}; the last bits may differ")
    stages = {name: {"path": loaded.paths[name], "weights": loaded.weights[name]} for name in loaded.paths}
    recipe = (
        replace(recipe, stages=stages) if again else request.complete(replace(recipe, stages=stages), loaded)
    )

    options = {stage: arguments(node, stage) for stage, node in recipe.options.items()}
    loaded.pipeline.prepare(recipe.precision, recipe.compile)
    pipeline, figures = loaded.pipeline.to(recipe.device), {}
    if edit:
        frames, figures = edited(edit, pipeline, recipe, options)
    else:
        frames = draw(kind, pipeline, recipe, options)
    out = out if request.out else new_folder(usual)
    write(frames, recipe, out)
    for name, value in figures.items():
        print(LINES[name].format(value))
    if edit:
        judged = edit_report.drew_shapes(loaded.paths[kind.main])
        report = what_became(edit, pipeline, recipe, frames, figures, judged)
        write_json(out / edit_report.FILE, report)
        if line := edit_report.said(report):
            print(f"{line}; each picture's in {out / edit_report.FILE}")
    return out


def what_became(
    edit: Edit,
    pipeline: Any,
    recipe: SampleRecipe,
    frames: Tensor | list[Tensor],
    figures: Figures,
    judged: bool,
) -> dict[str, Any]:
    """The report of an edit, on the pictures as they are saved."""
    images = from_uint8(to_uint8(torch.stack([frame[-1] for frame in frames])))
    image, mask, _ = edit.pictures(recipe.pipeline, pipeline.image_size)
    prompt, source = recipe.prompts[0], edit.settings.get("source", "")
    clip = getattr(pipeline, "clip", None)
    rows = edit_report.rows_of(edit.kind, images, image, mask, prompt, source, clip, judged)
    names = [name_of(i, recipe.n) for i in range(len(images))]
    return edit_report.report(edit.kind, prompt, names, rows, figures)


def name_of(number: int, n: int) -> str:
    """The file of a picture, of which there are `n` of each prompt."""
    return f"{number // n:03d}-{number % n:02d}.png"


def kind_of(pipeline: Any, where: str) -> type[SamplingConfig]:
    """The requests of a pipeline that is called so."""
    if not isinstance(pipeline, str) or pipeline not in REQUESTS:
        raise UserError(f"{where} must be one of {', '.join(REQUESTS)}, got {shown(pipeline)}")
    return REQUESTS[pipeline]


def check_parts(recipe: SampleRecipe, kind: type[SamplingConfig], where: str) -> None:
    """Whether a recipe's stages and options are those of its pipeline, by their names."""
    if kind.main not in recipe.stages:
        raise UserError(f"{where}: stages name no {kind.main}, which draws the pictures; restore the recipe")
    upsamplers = dict.fromkeys((name for name in recipe.stages if _is_upsampler(name)), UPSAMPLING)
    takes = {**kind.takes, **upsamplers}
    for stage, node in recipe.options.items():
        if unknown := [key for key in node if key not in takes.get(stage, ())]:
            known = ", ".join(takes.get(stage, ())) or "none"
            raise UserError(f"{where}: {unknown[0]} is no option of the {stage}; its options are {known}")
        if stage not in kind.takes and stage not in recipe.stages:
            raise UserError(f"{where}: options are of {stage}, which is no stage of {recipe.pipeline}")
    if kind.main in kind.takes and kind.main not in recipe.options:
        raise UserError(f"{where}: options of the {kind.main} are missing; restore the recipe")


def _is_upsampler(name: str) -> bool:
    return re.fullmatch(UPSAMPLER.format(r"\d+"), name) is not None


def write(frames: Tensor | list[Tensor], recipe: SampleRecipe, out: Path) -> None:
    """The pictures one by one and as a grid, where asked for how they came about, and their recipe."""
    images = [frame[-1] for frame in frames]
    for i, image in enumerate(images):
        save_png(to_pil(image), out / name_of(i, recipe.n))
    save_png(grid(_of_one_size(images), recipe.prompts), out / "grid.png")
    if recipe.progress_strip:
        each = len(frames) // len(recipe.prompts)
        captions = [prompt for prompt in recipe.prompts for _ in range(each)]
        save_png(grid(torch.cat(list(frames)), captions), out / "progress_strip.png")
    if recipe.edit and EDITS[recipe.pipeline][recipe.edit["kind"]].sequence:
        save_gif(torch.stack(images), out / "sequence.gif")
    recipe.write(out / "recipe.yaml")
    print(f"{len(images)} pictures in {out}, all of them in {out / 'grid.png'}")
    print(f"make them again: dalle sample recipe={out / 'recipe.yaml'}")


def _of_one_size(images: list[Tensor]) -> Float[Tensor, "N 3 H W"]:
    """White beside and below those that are smaller."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    room = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
    return torch.stack([F.pad(image, more, value=1.0) for image, more in zip(images, room, strict=True)])


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


def make_recipe(request: SamplingConfig, prompts: list[str], edit: Edit | None = None) -> SampleRecipe:
    """The recipe of a request; its stages are known once they are loaded."""
    if edit and getattr(request, "init_image", None):
        raise UserError("init_image is not for edits; leave it out")
    kind = request.pipeline["kind"]
    if edit and getattr(request, "progress_strip", False) and not EDITS[kind][edit.kind].strip:
        raise UserError(f"progress_strip is not for edit={edit.kind} of pipeline={kind}; leave it out")
    if edit and getattr(request, "size", None):
        raise UserError("size is not for edits, which keep the picture's; leave it out")
    if request.upsamplers and getattr(request, "progress_strip", False):
        raise UserError("progress_strip shows pictures at the size they are drawn at; leave out upsamplers")
    device = pick_device(request.device)
    half = request.precision == "bf16-mixed" or (request.precision == "auto" and fast_in_bf16())
    return SampleRecipe(
        prompts=prompts,
        n=request.n,
        seed=request.seed,
        stages={},
        options=request.all_options(),
        batch_size=request.batch_size,
        precision="bf16" if half else "fp32",
        device=device,
        compile=pick_compile(request.compile, device),
        pipeline=kind,
        truncate=request.truncate,
        progress_strip=getattr(request, "progress_strip", False),
        edit=edit.to_dict() if edit else None,
    )


def arguments(node: dict[str, Any], stage: str) -> dict[str, Any]:
    """Arguments of a stage's `sample`: what is not null, checked, the sampler built.

    Raises:
        UserError: a wrong type, an unknown option, no steps.
    """
    chosen = {key: value for key, value in node.items() if value is not None}
    for key, hint in OPTIONS.items():
        if key in chosen and (wrong := misfit(chosen[key], hint)):
            raise UserError(
                f"{key}{wrong.place} of the {stage} must be {wrong.wanted}, got {shown(wrong.got)}"
            )
    if "sampler" in chosen:
        if not isinstance(node := chosen["sampler"], dict) or "_target_" in node:
            raise UserError(f"sampler of the {stage} must be method, steps and options, got {shown(node)}")
        node = {**node, "_target_": SAMPLER}
        chosen["sampler"] = instantiate(node, f"the {stage}'s sampler", listed)
    return chosen


def next_folder(parent: Path) -> Path:
    """parent/001, or the number after the last one there."""
    taken = [int(p.name) for p in parent.glob("[0-9]*") if p.name.isdigit()]
    return parent / f"{max(taken, default=0) + 1:03d}"


def new_folder(parent: Path) -> Path:
    """Makes `next_folder`, or a later one where other processes do the same.

    Raises:
        UserError: nothing can be written there.
    """
    while True:
        folder = next_folder(parent)
        with explained(folder), contextlib.suppress(FileExistsError):  # another process was as quick
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
