"""One sampling: from a resolved config, or a recipe, to pictures with the recipe that makes them again."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle.data.sources import mix
from dalle.errors import UserError
from dalle.files import check_writable, explained, write_json
from dalle.images import from_uint8, grid, save_gif, save_png, to_pil, to_uint8
from dalle.instantiate import instantiate
from dalle.machine import fast_in_bf16, pick_compile, pick_device
from dalle.pipelines import edit_report
from dalle.pipelines.editing import EDITS, LINES, Edit, Figures
from dalle.pipelines.load import Loaded, with_upsamplers
from dalle.pipelines.recipe import SampleRecipe
from dalle.pipelines.request import SAMPLER, UPSAMPLER, SamplingConfig, kind_of, watched
from dalle.ranges import (
    Fraction,
    Guidance,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    Share,
    Text,
    misfit,
    shown,
)
from dalle.run_lock import check_name, locked
from dalle.trust import listed, set_trusted

LOCK = ".lock"  # in the folder that a process fills
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
UPSAMPLING = ("sampler", "noise_level", "tile")  # what they can be told


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
    if pipeline.upsamplers is not None:
        pipeline.upsamplers.check(told)
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
    told = {name: node for name, node in options.items() if _is_upsampler(name)}
    if pipeline.upsamplers is not None:
        pipeline.upsamplers.check(told)
    images, figures = edit.draw(pipeline, recipe.pipeline, recipe.prompts[0], drawing, watching)
    if pipeline.upsamplers is not None:
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
    check_empty(out)
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
    with alone(out) if request.out else contextlib.nullcontext():
        loaded.pipeline.prepare(recipe.precision, recipe.compile)
        pipeline, figures = loaded.pipeline.to(recipe.device), {}
        if edit:
            frames, figures = edited(edit, pipeline, recipe, options)
        else:
            frames = draw(kind, pipeline, recipe, options)
        check_drawn(frames)
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


def check_empty(out: Path) -> None:
    """Raises UserError where something is in a folder already, or where there is a file."""
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise UserError(f"{out} is not empty; give another folder with out=")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Takes a folder that another process may have been told to fill, too; where nothing comes of it, nothing
    is left.

    Raises:
        UserError: one does, or has done so meanwhile.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out / LOCK) as free:
            if free is None:
                raise UserError(f"another process draws into {out}; give another folder with out=")
            try:
                check_empty(out)
                yield
            finally:
                (out / LOCK).unlink(missing_ok=True)
    finally:
        for folder in made:  # those that something is in by now stay
            with contextlib.suppress(OSError):
                folder.rmdir()


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


def check_drawn(frames: Tensor | list[Tensor]) -> None:
    """Raises UserError where a picture is no numbers, which a file of 8 bits would hide."""
    if bad := sum(not bool(frame.isfinite().all()) for frame in frames):
        raise UserError(
            f"{bad} of {len(frames)} pictures are no numbers (NaN), so nothing is written: a setting is far "
            "out (guidance, noise, blur), or the network is broken; precision=fp32 stands more"
        )


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
    taken = [int(p.name) for p in parent.glob("[0-9]*") if p.name.isdecimal()]
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
