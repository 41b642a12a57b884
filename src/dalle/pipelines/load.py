"""Puts trained runs together to a pipeline, after checking that they belong together."""

from dataclasses import dataclass
from pathlib import Path

from dalle.build import build
from dalle.data.frozen import FrozenCLIP
from dalle.data.norm import EmbedNorm
from dalle.pipelines.unclip import UnCLIP, check_fit
from dalle.runs import Run, load_clip, load_stage


@dataclass(frozen=True)
class Loaded:
    """A pipeline and, for every stage in it, where it came from, the hash and the number of its weights."""

    pipeline: UnCLIP
    paths: dict[str, str]
    weights: dict[str, str]
    parameters: dict[str, int]


def load_unclip(
    decoder: str | Path, prior: str | Path | None = None, clip: str | Path | None = None
) -> Loaded:
    """The pipeline of these finished runs, on the CPU. `clip` None is the one the decoder was trained with.

    Raises:
        UserError: a run is missing or unfinished, is of another stage, or does not fit the others.
    """
    stages = {"decoder": load_stage(decoder, "decoder")}
    if prior is not None:
        stages["prior"] = load_stage(prior, "prior")
    manifests = {name: manifest for name, (_, manifest) in stages.items()}
    check_fit(manifests)
    frozen, where = _clip_of(Path(decoder), clip)
    own = {"weights": frozen.weights_hash, "embed_dim": frozen.embed_dim}
    check_fit({"clip": {"clip": own}, **manifests})

    norms = {name: EmbedNorm.from_dict(manifest["image_embed_norm"]) for name, manifest in manifests.items()}
    modules = {name: stage for name, (stage, _) in stages.items()}
    pipeline = UnCLIP(frozen, modules.get("prior"), modules["decoder"], norms.get("prior"), norms["decoder"])
    paths = {
        "clip": where,
        **{name: str(path) for name, path in (("prior", prior), ("decoder", decoder)) if path},
    }
    weights = {"clip": frozen.weights_hash, **{name: m["weights"] for name, m in manifests.items()}}
    nets = {"clip": frozen.net, **{name: stage.net for name, stage in modules.items()}}
    return Loaded(
        pipeline, paths, weights, {k: sum(p.numel() for p in net.parameters()) for k, net in nets.items()}
    )


def _clip_of(decoder: Path, clip: str | Path | None) -> tuple[FrozenCLIP, str]:
    """The CLIP at `clip`, else the run beside the decoder, else what the decoder's config names."""
    node = Run(decoder).config()["clip"]
    if clip is None and node["_target_"] == "dalle.runs.load_clip":
        beside = decoder.parent / "clip"
        clip = beside if Run(beside).finished else node["path"]
    if clip is None:
        return build(node, "clip"), str(node.get("name", node["_target_"]))
    return load_clip(clip), str(clip)
