"""One sampling: from a resolved config, or a recipe, to pictures with the recipe that makes them again."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.build import build, check_arguments, describe, fits
from dalle.errors import UserError
from dalle.pictures import grid, save_png, to_pil
from dalle.pipelines.load import load_unclip
from dalle.pipelines.recipe import Recipe
from dalle.training import fast_in_bf16


@dataclass(frozen=True)
class Request:
    """What is wanted: the settings of conf/sample.yaml, which says what each means."""

    pipeline: dict[str, Any]
    sampler: dict[str, Any]
    paths: dict[str, Any]
    name: str
    prompt: str | list[Any] | None
    prompts: str | None
    n: int
    seed: int
    steps: int | None
    guidance: float | int | None
    text_guidance: float | int | None
    batch_size: int
    precision: Literal["auto", "32-true", "bf16-mixed"]
    device: Literal["auto", "cpu", "cuda"]
    truncate: bool
    out: str | None
    recipe: str | None

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Request":
        """Raises UserError for a setting of a wrong type."""
        settings = {field.name: config[field.name] for field in fields(cls)}
        check_arguments(cls, settings, "", partial_call=False)
        return cls(**settings)


def sample(config: dict[str, Any]) -> Path:
    """Samples what `config` or its recipe asks for; grid.png, single PNGs and recipe.yaml go into one folder.

    Raises:
        UserError: a wrong setting, stages that are missing or do not fit together, an occupied folder.
    """
    request = Request.of(config)
    again = Recipe.read(request.recipe) if request.recipe else None
    recipe = again or make_recipe(request, read_prompts(request))
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for but PyTorch sees no GPU; use device=cpu")
    settings = {"prior": options(recipe.prior, "prior"), "decoder": options(recipe.decoder, "decoder")}
    usual = Path(request.paths["logs"], request.name, "samples")
    out = Path(request.out) if request.out else next_folder(usual)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give another folder with out=")

    paths = {k: v["path"] for k, v in again.stages.items()} if again else request.pipeline
    loaded = load_unclip(paths["decoder"], paths.get("prior"), _local(paths.get("clip")))
    if again:
        again.check_stages(loaded.weights)
        for what, (then, now) in again.differences().items():
            print(f"note: the recipe was made with {what} {then}, this is {now}; the last bits may differ")
    stages = {name: {"path": loaded.paths[name], "weights": loaded.weights[name]} for name in loaded.paths}
    recipe = replace(recipe, stages=stages)

    images = loaded.pipeline.to(recipe.device).sample(
        recipe.prompts,
        n=recipe.n,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        precision=recipe.precision,  # pyright: ignore[reportArgumentType]
        truncate=recipe.truncate,
        **settings,
    )
    write(images, recipe, out)
    return out


def write(images: Float[Tensor, "N 3 H W"], recipe: Recipe, out: Path) -> None:
    """The pictures one by one and as a grid, and their recipe."""
    for i, image in enumerate(images):
        save_png(to_pil(image), out / f"{i // recipe.n:03d}-{i % recipe.n:02d}.png")
    save_png(grid(images, recipe.prompts), out / "grid.png")
    recipe.write(out / "recipe.yaml")
    print(f"{len(images)} pictures in {out}, all of them in {out / 'grid.png'}")
    print(f"make them again: python sample.py recipe={out / 'recipe.yaml'}")


def read_prompts(request: Request) -> list[str]:
    """The prompts of `prompt` (one or a list) or of the file `prompts` (one a line)."""
    if request.prompt is not None and request.prompts is not None:
        raise UserError("give prompt= or prompts=, not both")
    if isinstance(request.prompt, list):
        return [str(prompt) for prompt in request.prompt]
    if request.prompt is not None:
        return [request.prompt]
    if request.prompts is None:
        raise UserError(
            'give a prompt: prompt="a small red circle", or a file with a prompt on each line: prompts=FILE'
        )
    try:
        lines = Path(request.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts={request.prompts} cannot be read ({error}); give a text file with a prompt on each line"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{request.prompts} holds no prompt; write one on each line")
    return prompts


def make_recipe(request: Request, prompts: list[str]) -> Recipe:
    """The recipe of a request; its stages are known once they are loaded."""
    pipeline = request.pipeline
    sampler = {k: v for k, v in request.sampler.items() if not k.startswith("_")}
    if request.steps is not None:
        sampler["steps"] = request.steps
    decoder = {"sampler": sampler, "guidance": request.guidance, "text_guidance": request.text_guidance}
    prior = {
        "sampler": pipeline["prior_sampler"],
        "guidance": pipeline["prior_guidance"],
        "candidates": pipeline["prior_candidates"],
    }
    half = request.precision == "bf16-mixed" or (request.precision == "auto" and fast_in_bf16())
    return Recipe(
        prompts=prompts,
        n=request.n,
        seed=request.seed,
        stages={},
        prior=prior if pipeline["prior"] else {},
        decoder=decoder,
        batch_size=request.batch_size,
        precision="bf16" if half else "fp32",
        device=pick_device(request.device),
        truncate=request.truncate,
    )


def options(node: dict[str, Any], stage: str) -> dict[str, Any]:
    """Arguments of a stage's `sample`: what is not null, checked, the sampler built.

    Raises:
        UserError: a wrong type, an unknown option, no steps.
    """
    chosen = {key: value for key, value in node.items() if value is not None}
    for key, hint in {"guidance": float, "text_guidance": float, "candidates": int}.items():
        if key in chosen:
            if not fits(chosen[key], hint):
                raise UserError(f"{key} of the {stage} must be {describe(hint)}, got {chosen[key]!r}")
            chosen[key] = hint(chosen[key])
    if "sampler" in chosen:
        node = {"_target_": "dalle.diffusion.samplers.Sampler", **chosen["sampler"]}
        chosen["sampler"] = build(node, f"the {stage}'s sampler")
    return chosen


def pick_device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def next_folder(parent: Path) -> Path:
    """parent/001, or the number after the last one there."""
    taken = [int(p.name) for p in parent.glob("[0-9]*") if p.name.isdigit()]
    return parent / f"{max(taken, default=0) + 1:03d}"


def _local(clip: str | None) -> str | None:
    """A recipe names a public CLIP by its name; that one is made from the decoder's config again."""
    return clip if clip and Path(clip).exists() else None
