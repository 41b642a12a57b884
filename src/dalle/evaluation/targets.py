"""What can be evaluated: a pipeline, an image tokenizer, a CLIP, a prior, a folder of pictures.

The only place that knows how they differ. Each makes picture number i of a list, whatever part of the list a
process is given.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor, nn

from dalle.data.caption_files import CaptionFiles
from dalle.data.degradations import shrunk
from dalle.data.file_listing import list_files
from dalle.data.frozen import FrozenCLIP, FrozenTokenizer
from dalle.data.image_files import FILTER, MAX_PIXELS, SUFFIXES, BadPicture, inspect, read
from dalle.data.pictures import Pictures
from dalle.data.scenes import COLOURS, SHAPES
from dalle.data.shapes import Shapes
from dalle.data.sources import Source, first_captions, mix
from dalle.diffusion.noise import per_sample
from dalle.diffusion.samplers import Sampler
from dalle.errors import UserError
from dalle.evaluation.results import identity
from dalle.evaluation.seen_captions import captions_read
from dalle.images import from_uint8, to_uint8
from dalle.machine import fast_in_bf16
from dalle.metrics.clip_score import Classes
from dalle.metrics.codebook_usage import code_use
from dalle.metrics.fid import DISTANCES
from dalle.metrics.intervals import Figure, exact, of_mean, of_share
from dalle.metrics.judge import Judge
from dalle.metrics.metric import Rows
from dalle.metrics.reconstruction import Likeness, Perceptual, likeness
from dalle.metrics.upsampling import bicubic, upsampling_rows
from dalle.pipelines.load import PRIORS, load_any_clip, load_prior, no_stages, with_upsamplers
from dalle.pipelines.recipe import SampleRecipe
from dalle.pipelines.request import kind_of, prior_options
from dalle.pipelines.sampling import arguments, draw, load, make_recipe
from dalle.pipelines.unclip import PRIOR
from dalle.pipelines.unconditional import Unconditional
from dalle.run_dir import IMAGE_TOKENIZERS, Run, load_clip, load_image_tokenizer

NAMED = 3  # files named in a message


class Target:
    """What is measured.

    Attributes:
        home: the folder of evaluations.
        facts: what tells it and its settings apart, for the result; `paths` are for the reader alone.
        image_size: of its pictures; real ones are read at it.
        data: where the real pictures come from, as its run's config says; None: that must be given.
        clip: its own, to score it where no other is given.
        makes: whether it makes pictures. `captioned`: whether these belong to captions.
        prefix: of the names of distances: `rfid`.
        pictures: how many there are; None: as many as are asked for.
        metrics: what can be measured. `skipped`: broken pictures. `notes`: what to know of its figures.
        captions_read: gives the captions of `shapes` that its trainings read; None: that is not known.
    """

    home: Path
    facts: dict[str, Any]
    image_size: int
    data: dict[str, Any] | None = None
    clip: FrozenCLIP | None = None
    module: nn.Module
    parameters: dict[str, int]
    makes = captioned = True
    prefix = ""
    pictures: int | None = None
    metrics: tuple[str, ...] = DISTANCES
    skipped = 0
    captions_read: Callable[[], set[str]] | None = None
    notes: tuple[str, ...] = ()

    def captions(self, source: Source, n: int) -> list[str]:
        """Of the pictures 0 .. n-1: the first caption of each item of the split."""
        return first_captions(source, range(n)) if self.captioned else []

    def make(
        self, source: Source, items: list[int], captions: list[str]
    ) -> tuple[Float[Tensor, "B 3 H W"], Rows]:
        """These pictures in [-1, 1], and whatever else is measured on the way."""
        raise NotImplementedError

    def as_written(self) -> None:
        """Lets `make` run its operations one by one from now on, for those who count them."""

    def figures(self, rows: Rows) -> dict[str, Figure]:
        """Of what `make` measured on the way, and of the target itself."""
        return {}


class Pipeline(Target):
    """Text to image: any of `sampling.REQUESTS`."""

    metrics = (*Target.metrics, "clip_score", "retrieval", "hard_negatives", "judge", "speed", "flops")

    def __init__(self, config: dict[str, Any]) -> None:
        kind = config["pipeline"].get("kind")
        for setting in ("init_image", "progress_strip", "size"):
            if config.get(setting):
                raise UserError(
                    f"{setting} is for dalle sample; dalle evaluate draws whole squares from captions"
                )
        unused = {"prompt": None, "prompts": None, "n": 1, "device": "auto", "out": None, "recipe": None}
        if kind == "upsampler":
            raise UserError(
                "an upsampler alone is measured by run=RUN, beside plain bicubic; after a pipeline by "
                "upsamplers=[RUN]"
            )
        request = kind_of(kind, "pipeline.kind").of({**config, **unused})
        self.recipe = make_recipe(request, [])
        self.options = {stage: arguments(node, stage) for stage, node in self.recipe.options.items()}
        loaded = load(type(request), request.runs() | request.more_runs())
        self.draw = partial(draw, type(request))
        self.module, self.parameters = loaded.pipeline, loaded.parameters
        self.clip = getattr(loaded.pipeline, "clip", None)
        self.home = Path(config["paths"]["logs"], config["name"])
        main = Run(Path(loaded.paths[MAIN.get(kind, str(kind))]))
        drawn = loaded.pipeline.upsamplers or loaded.pipeline
        self.image_size, self.data = drawn.image_size, main.source()
        if not isinstance(loaded.pipeline, Unconditional):
            self.captions_read = partial(captions_read, loaded.paths)
        if isinstance(loaded.pipeline, Unconditional):
            self.notes = (f"{kind} reads no captions: what is said of them is how often chance has it right",)
        self.facts = {
            "kind": kind,
            "weights": loaded.weights,
            "paths": loaded.paths,
            "options": self.recipe.options,
            "precision": self.recipe.precision,
            "batch_size": self.recipe.batch_size,
        }
        if self.recipe.compile != "none":
            self.facts["compile"] = self.recipe.compile
        self.ready = False

    def as_written(self) -> None:
        self.module.prepare("fp32", "none")  # pyright: ignore[reportCallIssue]  # a pipeline's

    def make(
        self, source: Source, items: list[int], captions: list[str]
    ) -> tuple[Float[Tensor, "B 3 H W"], Rows]:
        if not self.ready:  # on its device by now
            self.ready = True
            self.module.prepare(self.recipe.precision, self.recipe.compile)  # pyright: ignore[reportCallIssue]  # a pipeline's
        recipe = replace(self.recipe, prompts=captions)
        frames = self.draw(self.module, recipe, self.options, numbers=items)
        return torch.stack([frame[-1] for frame in frames]), {}


MAIN = {"unclip": "decoder"}  # the stage that makes the pictures, where it is not called as the pipeline


class Tokenizer(Target):
    """A dVAE or VQGAN: pictures after their way through the codes."""

    metrics = (*Target.metrics, "judge", "reconstruction")
    prefix = "r"

    def __init__(self, path: str, perceptual: Perceptual | None = None) -> None:
        self.perceptual: Perceptual | None = Likeness(perceptual).perceptual
        self.module: FrozenTokenizer = load_image_tokenizer(path)  # pyright: ignore[reportIncompatibleVariableOverride]  # a kind of
        run = Run(Path(path))
        self.home, self.data = run.path.parent, run.source()
        self.image_size = self.module.image_size
        self.parameters = {run.manifest()["stage"]: sum(p.numel() for p in self.module.parameters())}
        stage = run.manifest()["stage"]
        self.facts = {"kind": stage, "weights": {stage: self.module.weights_hash}, "paths": {stage: path}}

    def make(
        self, source: Source, items: list[int], captions: list[str]
    ) -> tuple[Float[Tensor, "B 3 H W"], Rows]:
        device = next(self.module.parameters()).device
        real = source.images(items).to(device)
        codes = self.module.encode(real)
        made = self.module.decode(codes)
        return made, {**likeness(made, real, self.perceptual), "codes": codes}

    def figures(self, rows: Rows) -> dict[str, Figure]:
        means = {name: of_mean(values) for name, values in rows.items() if name != "codes"}
        use = code_use(torch.bincount(rows["codes"].flatten(), minlength=self.module.vocab_size))
        return means | {name: exact(value.item()) for name, value in use.items()}


class Upsampler(Target):
    """An upsampler on small pictures that are made from large ones, beside bicubic interpolation."""

    metrics = (*Target.metrics, "judge", "reconstruction")
    prefix = "r"

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        self.perceptual: Perceptual | None = Likeness(config["perceptual"]).perceptual
        self.loaded = with_upsamplers(no_stages(), {"upsampler_1": path})
        pipeline: Any = self.loaded.pipeline  # which has `upsample` now
        self.module, self.upsample, self.parameters = pipeline, pipeline.upsample, self.loaded.parameters
        run = Run(Path(path))
        self.home, self.data = run.path.parent, run.source()
        self.image_size: int = pipeline.upsamplers.image_size
        self.factor = run.manifest("factor")["factor"]
        self.judge, self.seed, self.told = Judge(), config["seed"], dict[str, Any]()
        given = config["upsampling"]
        if given["steps"]:
            self.told["sampler"] = Sampler("ddim", given["steps"])
        self.told |= {key: given[key] for key in ("noise_level", "tile") if given[key] is not None}
        self.facts = {
            "kind": "upsampler", "weights": self.loaded.weights, "paths": self.loaded.paths,
            "options": {"upsampler_1": dict(given)},
        }  # fmt: skip

    def make(
        self, source: Source, items: list[int], captions: list[str]
    ) -> tuple[Float[Tensor, "B 3 H W"], Rows]:
        real = source.images(items)
        low = from_uint8(to_uint8(shrunk(real, self.factor)))
        options = {"upsampler_1": self.told}
        settings = {"seed": self.seed, "batch_size": len(items), "numbers": items, "options": options}
        made = self.upsample(low, **settings)
        rows = upsampling_rows(made, real, low, self.perceptual)
        if isinstance(source, Shapes):
            for name, images in (("judge_small", low), ("judge_bicubic", bicubic(low, self.factor))):
                rows[name] = self.judge(images, captions)["all"]
        return made, rows

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {name: (of_share if "judge" in name else of_mean)(values) for name, values in rows.items()}


class Clip(Target):
    """A CLIP: nothing is made, real pictures are looked at."""

    makes = False
    metrics = ("retrieval", "zero_shot")

    def __init__(self, path: str) -> None:
        self.clip = self.module = load_clip(path)
        run = Run(Path(path))
        self.home, self.data = run.path.parent, run.source()
        self.image_size = run.manifest("image_size")["image_size"]
        self.parameters = {"clip": sum(p.numel() for p in self.module.parameters())}
        self.facts = {"kind": "clip", "weights": {"clip": self.clip.weights_hash}, "paths": {"clip": path}}


class Prior(Target):
    """A prior: no picture is made, but an image embedding for each caption, as a pipeline would have it."""

    makes = False
    metrics = ("cosines", "retrieval")
    clip: Any  # a FrozenCLIP, never None here

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        settings = {**config["pipeline"], "prior": path}
        options = prior_options(settings)
        self.options = arguments(options, "prior")
        loaded = load_prior(path, settings.get("clip"))
        self.module, (self.clip, self.stage) = loaded.pipeline, loaded.pipeline.values()
        run = Run(Path(path))
        self.home, self.data = run.path.parent, run.source()
        facts = run.manifest("stage", "image_size")
        self.image_size = facts["image_size"]
        self.parameters = {facts["stage"]: loaded.parameters["prior"]}
        self.half = config["precision"] == "bf16-mixed" or (config["precision"] == "auto" and fast_in_bf16())
        self.facts = {
            "kind": facts["stage"],
            "weights": loaded.weights,
            "paths": loaded.paths,
            "options": {"prior": options},
            "precision": "bf16" if self.half else "fp32",
            "batch_size": config["batch_size"],
        }

    def imagine(self, captions: list[str], items: list[int], seed: int) -> tuple[Tensor, Tensor]:
        """The captions' own embeddings (B, E) and those imagined for them, whose noise is the pipeline's."""
        assert self.clip is not None
        features = self.clip.embed_captions(captions)
        device = features["text"].device
        randn = per_sample([mix(seed, item, 0, PRIOR) for item in items], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            made = self.stage.sample(features, randn=randn, **self.options).float()
        return features["text_embed"], self.stage.norm.decode(made)


class Folder(Target):
    """Pictures from wherever, all of one size, read again as they are.

    Captions come from the recipe of sample.py, else as in a folder of training pictures; they are used where
    every picture has one. Broken pictures are left out, and counted.
    """

    metrics = (*Target.metrics, "clip_score", "retrieval", "hard_negatives", "judge")

    def __init__(self, folder: str, home: Path, image_size: int | None) -> None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"folder={folder} {'is not a folder' if root.exists() else 'does not exist'}")
        sizes: dict[str, tuple[int, int]] = {}
        digests: dict[str, str] = {}
        broken = []
        recipe = SampleRecipe.read(root / "recipe.yaml") if (root / "recipe.yaml").is_file() else None
        for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
            if recipe and not re.fullmatch(r"\d+-\d+", path.stem):
                continue  # a grid
            name = path.relative_to(root).as_posix()
            try:
                digests[name] = inspect(path, MAX_PIXELS).digest
                with Image.open(path) as image:
                    image.load()
                    sizes[name] = image.size
            except (BadPicture, OSError, SyntaxError, ValueError):
                digests.pop(name, None)
                broken.append(name)
        if not sizes:
            found = f"{len(broken)} pictures, all broken" if broken else "none"
            raise UserError(f"folder={folder} has no picture that can be read; found {found}")
        self.skipped = len(broken)
        if broken:
            names = ", ".join(broken[:NAMED]) + (", ..." if len(broken) > NAMED else "")
            rank_zero_warn(f"{root}: {len(sizes)} pictures are used; {len(broken)} are broken ({names})")
        self.root, self.names, self.pictures = root, list(sizes), len(sizes)
        self.image_size = image_size or self._one_size(sizes)
        self.texts = self._captions(recipe)
        self.captioned = bool(self.texts)
        self.home, self.module, self.parameters = home, nn.Module(), {}
        content = [
            [name, digests[name], self.texts[i] if self.texts else None] for i, name in enumerate(sizes)
        ]
        self.facts = {"kind": "folder", "content": identity(content), "paths": {"folder": folder}}
        if image_size:
            self.facts["resized"] = f"to {image_size} px, {FILTER.name.lower()}, middle square"

    @staticmethod
    def _one_size(sizes: dict[str, tuple[int, int]]) -> int:
        (first, (width, height)), *others = sizes.items()
        other = next(((name, size) for name, size in others if size != (width, height)), None)
        if other or width != height:
            what = f"{width}x{height} ({first})" + (
                f" and {other[1][0]}x{other[1][1]} ({other[0]})" if other else ""
            )
            raise UserError(
                f"the pictures are of {what}, and only squares of one size compare; "
                f"image_size={min(width, height)} resizes all of them"
            )
        return width

    def _captions(self, recipe: SampleRecipe | None) -> list[str]:
        if recipe:
            numbers = [int(Path(name).stem.split("-")[0]) for name in self.names]
            beyond = [name for name, k in zip(self.names, numbers, strict=True) if k >= len(recipe.prompts)]
            if beyond:
                raise UserError(
                    f"{self.root / beyond[0]} is none of the pictures of recipe.yaml, which has "
                    f"{len(recipe.prompts)} prompts; move it away"
                )
            return [recipe.prompts[k] for k in numbers]
        files = {name: size for name, size, _ in list_files(self.root).files}
        found = CaptionFiles()(self.root, self.names, files).captions
        return [found[name][0] for name in self.names] if all(found.get(name) for name in self.names) else []

    def captions(self, source: Source, n: int) -> list[str]:
        return self.texts[:n]

    def make(
        self, source: Source, items: list[int], captions: list[str]
    ) -> tuple[Float[Tensor, "B 3 H W"], Rows]:
        pixels = [read(self.root / self.names[i], self.image_size, 1, MAX_PIXELS) for i in items]
        return from_uint8(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)), {}


def target_of(config: dict[str, Any]) -> Target:
    """What `run`, `folder` or `pipeline` name.

    Raises:
        UserError: several of them, a run of a stage that is part of a pipeline only, runs that are missing.
    """
    run, folder = config["run"], config["folder"]
    if config["perceptual"] and not run:
        raise UserError("perceptual= is of run= of a dvae, vqgan or upsampler: give one, or leave it out")
    if run and folder:
        raise UserError("give run= or folder=, not both")
    if folder:
        home = Path(config["paths"]["logs"], config["name"])
        return Folder(folder, home, config["image_size"])
    if config["image_size"]:
        raise UserError("image_size is for a folder; trained networks have a size of their own")
    if not run:
        return Pipeline(config)
    stage = Run(Path(run)).manifest("stage")["stage"]
    if stage == "clip":
        return Clip(run)
    if stage in IMAGE_TOKENIZERS:
        return Tokenizer(run, config["perceptual"])
    if stage == "upsampler":
        return Upsampler(run, config)
    if stage in PRIORS:
        return Prior(run, config)
    raise UserError(
        f"run={run} holds a {stage}, which is measured as part of a pipeline: give pipeline= and name="
    )


def scorer_of(config: dict[str, Any], target: Target) -> FrozenCLIP | None:
    """The CLIP of `scorer`, else the target's own, else the one beside its runs; None without any."""
    if config["scorer"]:
        return load_any_clip(config["scorer"])
    beside = target.home / "clip"
    return target.clip or (load_clip(beside) if Run(beside).finished else None)


def classes_of(source: Source, items: range) -> Classes | None:
    """The classes of pictures, as sentences: of folders or labels, or a colour and a shape of `shapes`."""
    if isinstance(source, Shapes):
        scenes = source.scenes(items)
        sentences = [(f"a {colour} {shape}",) for colour in COLOURS for shape in SHAPES]
        label = scenes.colour[:, 0] * len(SHAPES) + scenes.shape[:, 0]
        return sentences, label.where(scenes.count == 1, -1)
    if isinstance(source, Pictures) and source.has_classes:
        captions = [tuple(source.captions(item)) for item in items]
        sentences = sorted(set(captions))
        return sentences, torch.tensor([sentences.index(caption) for caption in captions])
    return None
