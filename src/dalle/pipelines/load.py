"""Puts trained runs together to a pipeline, after checking that they belong together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import nn

from dalle.data.embed_norm import EmbedNorm
from dalle.data.frozen import Frozen, FrozenCLIP, weights_hash
from dalle.data.open_clip import load_open_clip
from dalle.errors import UserError
from dalle.instantiate import instantiate
from dalle.pipelines.dalle import DallePipeline
from dalle.pipelines.unclip import UnCLIP, check_norms
from dalle.pipelines.unconditional import Unconditional
from dalle.pipelines.upsampling import PictureFolder, Upsamplers
from dalle.run_dir import Run, load_clip, load_image_tokenizer, load_stage
from dalle.stages.base import Stage
from dalle.trust import listed

PRIORS = ("prior", "ar_prior")  # stages that make an image embedding of a caption
PUBLIC = "open_clip/"  # a CLIP of the open_clip collection: open_clip/NAME/PRETRAINED


@dataclass(frozen=True)
class Loaded:
    """A pipeline and, for every stage in it, where it came from, the hash and the number of its weights."""

    pipeline: Any
    paths: dict[str, str]
    weights: dict[str, str]
    parameters: dict[str, int]


def load_unclip(
    decoder: str | Path, prior: str | Path | None = None, clip: str | Path | None = None
) -> Loaded:
    """DALL-E 2 of these finished runs, on the CPU. `clip` None is the one the decoder was trained with.

    Raises:
        UserError: a run is missing or unfinished, is of another stage, or does not fit the others.
    """
    stages = {"decoder": load_stage(decoder, "decoder")}
    if prior is not None:
        stages["prior"] = load_stage(prior, *PRIORS)
    manifests = {name: manifest for name, (_, manifest) in stages.items()}
    check_fit(manifests)
    frozen, where = _clip_of(Path(decoder), clip)
    check_fit(
        {"clip": {"clip": {"weights": frozen.weights_hash, "embed_dim": frozen.embed_dim}}, **manifests}
    )

    norms = {name: EmbedNorm.from_dict(manifest["image_embed_norm"]) for name, manifest in manifests.items()}
    modules = {name: stage for name, (stage, _) in stages.items()}
    pipeline = UnCLIP(frozen, modules.get("prior"), modules["decoder"], norms.get("prior"), norms["decoder"])
    paths = {"clip": where, "prior": str(prior), "decoder": str(decoder)}
    return _loaded(pipeline, paths, {"clip": frozen, **modules})


def load_prior(prior: str | Path, clip: str | Path | None = None) -> Loaded:
    """A prior alone, as `prior` beside its `clip`, on the CPU: image embeddings of captions.

    `clip` None is the one it was trained with. Raises UserError as the others do.
    """
    stage, manifest = load_stage(prior, *PRIORS)
    frozen, where = _clip_of(Path(prior), clip)
    own = {"weights": frozen.weights_hash, "embed_dim": frozen.embed_dim}
    check_fit({"clip": {"clip": own}, "prior": manifest})
    parts = {"clip": frozen, "prior": stage}
    return _loaded(nn.ModuleDict(parts), {"clip": where, "prior": str(prior)}, parts)


def load_dalle(
    dalle: str | Path, image_tokenizer: str | Path | None = None, clip: str | Path | None = None
) -> Loaded:
    """DALL-E of these finished runs, on the CPU.

    Args:
        image_tokenizer: None is the one the transformer was trained with.
        clip: chooses among candidates: a run, or open_clip/NAME/PRETRAINED; None goes without.

    Raises:
        UserError: a run is missing or unfinished, is of another stage, or does not fit the others.
    """
    stage, manifest = load_stage(dalle, "dalle")
    where = Path(image_tokenizer or _upstream(Path(dalle), "image_tokenizer"))
    frozen = load_image_tokenizer(where)
    facts = {"weights": frozen.weights_hash, "vocab_size": frozen.vocab_size, "grid": frozen.grid}
    check_fit({Run(where).manifest()["stage"]: {"image_tokenizer": facts}, "dalle": manifest})
    chooser = load_any_clip(str(clip)) if clip else None
    tokenizer = Run(Path(dalle)).load_tokenizer_of("DALL-E", stage.net.text_length, stage.net.text_vocab)
    pipeline = DallePipeline(stage, frozen, tokenizer, chooser)
    paths = {"image_tokenizer": str(where), "dalle": str(dalle), "clip": str(clip)}
    return _loaded(pipeline, paths, {"image_tokenizer": frozen, "dalle": stage, "clip": chooser})


def load_gan(gan: str | Path, clip: str | Path | None = None) -> Loaded:
    """A GAN, on the CPU: it draws from the caption alone, as a decoder without a prior does.

    `clip` None is the one it was trained with. Raises UserError as the others do.
    """
    stage, manifest = load_stage(gan, "gan")
    frozen, where = _clip_of(Path(gan), clip)
    own = {"weights": frozen.weights_hash, "embed_dim": frozen.embed_dim}
    check_fit({"clip": {"clip": own}, "gan": manifest})
    norm = EmbedNorm.from_dict(manifest["image_embed_norm"])
    pipeline = UnCLIP(frozen, None, stage, None, norm)
    return _loaded(pipeline, {"clip": where, "gan": str(gan)}, {"clip": frozen, "gan": stage})


def load_vae(vae: str | Path) -> Loaded:
    """A VAE, on the CPU, which draws without any caption. Raises UserError as the others do."""
    stage, _ = load_stage(vae, "vae")
    return _loaded(Unconditional(stage), {"vae": str(vae)}, {"vae": stage})


def with_upsamplers(loaded: Loaded, runs: Mapping[str, str | Path]) -> Loaded:
    """The same pipeline with these finished runs of `model=upsampler` after it, in this order.

    Raises:
        UserError: a run is missing or unfinished, is of another stage, or enlarges pictures of another size.
    """
    if not runs:
        return loaded
    stages = {name: load_stage(path, "upsampler")[0] for name, path in runs.items()}
    pipeline = loaded.pipeline
    pipeline.upsamplers = Upsamplers(stages, pipeline.image_size)
    paths = {**loaded.paths, **{name: str(path) for name, path in runs.items()}}
    more = _loaded(pipeline, paths, stages)
    return Loaded(pipeline, paths, loaded.weights | more.weights, loaded.parameters | more.parameters)


def no_stages() -> Loaded:
    """A pipeline for pictures that are there already."""
    return Loaded(PictureFolder().eval(), {}, {}, {})


def load_any_clip(path: str) -> FrozenCLIP:
    """The CLIP of a run, or a public one by open_clip/NAME/PRETRAINED."""
    if not path.startswith(PUBLIC):
        return load_clip(path)
    name, slash, pretrained = path.removeprefix(PUBLIC).partition("/")
    if not slash:
        raise UserError(f"{path} names no weights; give {PUBLIC}NAME/PRETRAINED, as {PUBLIC}ViT-B-32/openai")
    return load_open_clip(name, pretrained)


def _loaded(pipeline: Any, paths: dict[str, str], parts: Mapping[str, Stage | Frozen | None]) -> Loaded:
    """The facts of those of the parts that are there."""
    nets = {name: part.net for name, part in parts.items() if part is not None}
    weights = {name: weights_hash(net) for name, net in nets.items()}
    parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    return Loaded(pipeline, {name: paths[name] for name in nets}, weights, parameters)


def _upstream(run: Path, key: str) -> Path:
    """The run of a frozen network that `run` was trained with: the one beside it, else where it was then."""
    path = Path(_node_of(run, key, "path")["path"])
    beside = run.parent / path.name
    return beside if Run(beside).finished else path


def _node_of(run: Path, key: str, *needs: str) -> dict[str, Any]:
    """What a run's config says of a frozen network, with those of its facts that are needed."""
    node = Run(run).config().get(key)
    if not node or not all(isinstance(node.get(need), str) for need in needs):
        raise UserError(
            f"{run / 'config.yaml'}: {key} does not say where the {key} is ({', '.join(needs)}); "
            f"restore it, or give {key} yourself"
        )
    return node


def _clip_of(decoder: Path, clip: str | Path | None) -> tuple[FrozenCLIP, str]:
    """The CLIP at `clip`, else the run beside the decoder, else what the decoder's config names."""
    node = _node_of(decoder, "clip", "_target_") if clip is None else {}
    if clip is None and node["_target_"] != "dalle.run_dir.load_clip":
        made = instantiate(node, f"{decoder / 'config.yaml'}: clip", listed)
        if not isinstance(made, FrozenCLIP):
            raise UserError(f"{decoder / 'config.yaml'}: clip is no CLIP; restore it, or give clip yourself")
        return made, str(node.get("name", node["_target_"]))
    where = clip or _upstream(decoder, "clip")
    return load_clip(where), str(where)


def check_fit(manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether stages were trained to work together, by their manifests.

    Args:
        manifests: of `clip`, `prior`, `decoder`, or of `dvae`, `dalle` ..., as far as they are used.

    Raises:
        UserError: naming the two stages that do not fit, and why.
    """
    facts = {name: dict(_facts(manifest)) for name, manifest in manifests.items()}
    for (a, of_a), (b, of_b) in combinations(facts.items(), 2):
        for key in of_a:
            if key in of_b and of_a[key] != of_b[key]:
                shared = "image tokenizer" if "image tokenizer" in key else "CLIP"
                raise UserError(
                    f"{a} and {b} do not fit together: {key} is {of_a[key]} in {a}, but {of_b[key]} in {b}; "
                    f"stages must share one {shared}: give the one they were trained with, or train {b} again"
                )
    kinds = {name: m["image_embed_norm"]["kind"] for name, m in manifests.items() if "image_embed_norm" in m}
    if "prior" in kinds and "decoder" in kinds:
        check_norms(kinds["prior"], kinds["decoder"])


def _facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What all stages must agree on, under names a user understands."""
    clip, images = manifest.get("clip", {}), manifest.get("image_tokenizer", {})
    for name, value in (
        ("the embedding dimension", clip.get("embed_dim")),
        ("the tokenizer", manifest.get("tokenizer", {}).get("hash")),
        ("the CLIP (hash of its weights)", clip.get("weights")),
        ("the image tokenizer's vocabulary", images.get("vocab_size")),
        ("the image tokenizer's grid", images.get("grid")),
        ("the image tokenizer (hash of its weights)", images.get("weights")),
    ):
        if value is not None:
            yield name, value
