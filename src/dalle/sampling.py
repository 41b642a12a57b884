"""One sampling: from a plain resolved config, or a recipe, to pictures with the recipe that makes them again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dalle.diffusion.samplers import Sampler
from dalle.errors import UserError
from dalle.pictures import grid, save_png, to_pil
from dalle.pipelines.load import load_unclip
from dalle.pipelines.recipe import Recipe
from dalle.training import fast_in_bf16

Config = dict[str, Any]


def sample(config: Config) -> Path:
    """Samples what `config` or its recipe asks for and writes grid.png, single PNGs and recipe.yaml into one folder."""
    again = Recipe.read(config["recipe"]) if config["recipe"] else None
    paths = {k: v["path"] for k, v in again.stages.items()} if again else config["pipeline"]
    device = again.device if again else pick_device(config["device"])
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for but PyTorch sees no GPU; use device=cpu")
    prompts = again.prompts if again else read_prompts(config)

    loaded = load_unclip(paths["decoder"], paths.get("prior"), _local(paths.get("clip")))
    stages = {name: {"path": loaded.paths[name], "weights": loaded.weights[name]} for name in loaded.paths}
    if again:
        again.check_stages(loaded.weights)
        for what, (then, now) in again.differences().items():
            print(f"note: the recipe was made with {what} {then}, this is {now}; the last bits may differ")
    recipe = replace(again, stages=stages) if again else make_recipe(config, prompts, stages, device)

    out = Path(config["out"]) if config["out"] else next_folder(Path(config["paths"]["logs"], config["name"], "samples"))
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another folder with out=")
    images = loaded.pipeline.to(device).sample(
        recipe.prompts,
        n=recipe.n,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        precision=recipe.precision,  # pyright: ignore[reportArgumentType]
        prior=options(recipe.prior),
        decoder=options(recipe.decoder),
        truncate=recipe.truncate,
    )
    for i, image in enumerate(images):
        save_png(to_pil(image), out / f"{i // recipe.n:03d}-{i % recipe.n:02d}.png")
    save_png(grid(images, recipe.prompts), out / "grid.png")
    recipe.write(out / "recipe.yaml")
    print(f"{len(images)} pictures in {out}, all of them in {out / 'grid.png'}")
    print(f"make them again: python sample.py recipe={out / 'recipe.yaml'}")
    return out


def read_prompts(config: Config) -> list[str]:
    """The prompts of `prompt` (one or a list) or of the file `prompts` (one a line)."""
    if config["prompt"] is not None and config["prompts"] is not None:
        raise UserError("give prompt= or prompts=, not both")
    if config["prompt"] is not None:
        prompt = config["prompt"]
        return [str(p) for p in prompt] if isinstance(prompt, list) else [str(prompt)]
    if config["prompts"] is None:
        raise UserError('give a prompt: prompt="a small red circle", or a file with a prompt on each line: prompts=FILE')
    path = Path(config["prompts"])
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read ({error}); give a text file with a prompt on each line") from None
    if not any(lines):
        raise UserError(f"{path} holds no prompt; write one on each line")
    return [line for line in lines if line]


def make_recipe(config: Config, prompts: list[str], stages: dict[str, dict[str, str]], device: str) -> Recipe:
    pipeline = config["pipeline"]
    sampler = {k: v for k, v in config["sampler"].items() if not k.startswith("_")}
    if config["steps"] is not None:
        sampler["steps"] = config["steps"]
    decoder = {"sampler": sampler, "guidance": config["guidance"], "text_guidance": config["text_guidance"]}
    prior = {
        "sampler": pipeline["prior_sampler"],
        "guidance": pipeline["prior_guidance"],
        "candidates": pipeline["prior_candidates"],
    }
    precision = config["precision"]
    if precision == "auto":
        precision = "bf16" if fast_in_bf16() else "fp32"
    elif precision not in ("fp32", "bf16"):
        raise UserError(f"precision={precision} is unknown; choose auto, fp32 or bf16")
    return Recipe(
        prompts=prompts,
        n=config["n"],
        seed=config["seed"],
        stages=stages,
        prior=prior if "prior" in stages else {},
        decoder=decoder,
        batch_size=config["batch_size"],
        precision=precision,
        device=device,
        truncate=config["truncate"],
    )


def options(node: Config) -> Config:
    """Arguments of a stage's `sample`: what is not null, the sampler built."""
    chosen = {key: value for key, value in node.items() if value is not None}
    return {k: Sampler(**v) if k == "sampler" else v for k, v in chosen.items()}


def pick_device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def next_folder(parent: Path) -> Path:
    """parent/001, or the number after the last one there."""
    taken = [int(p.name) for p in parent.glob("[0-9]*") if p.name.isdigit()]
    return parent / f"{max(taken, default=0) + 1:03d}"


def _local(clip: str | None) -> str | None:
    """A recipe names a public CLIP by its name; that one is made from the decoder's config again."""
    return clip if clip and Path(clip).exists() else None
