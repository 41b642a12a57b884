"""LAION's prior, as DALLE2-pytorch keeps it: the file of its trainer, or weights beside prior_config.json.

That package changed under the same names of weights, which so do not say all: `VERSIONS` does.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dalle.data.embed_norm import EmbedNorm
from dalle.errors import UserError
from dalle.nets.laion import Unsaid
from dalle.ranges import Place
from dalle.run_dir import load_clip
from dalle.weights.diffusion import ancestral, denoiser, of_clip
from dalle.weights.reading import PublicWeights
from dalle.weights.writing import Imported, count, shape_of

WHAT = "prior of DALLE2-pytorch's"
OURS = ("net.", "causal_transformer.")  # by which its prior is known
BESIDE = ("clip.", "noise_scheduler.")  # what it keeps of CLIP and of the noise schedule


class Version(NamedTuple):
    """What the code did from a version on. null: the name of the learned pads."""

    since: tuple[int, ...]
    null: str
    cosine: bool
    unsaid: Unsaid


VERSIONS = (  # newest first; before the last, pads were masked, and the norms were others
    Version((1, 10, 4), "null_text_encodings", True, "all"),
    Version((1, 9, 0), "null_text_encodings", True, "states"),  # the caption's embedding stayed, by mistake
    Version((1, 4, 3), "null_text_embed", True, "ignored"),
    Version((0, 23, 3), "null_text_embed", False, "ignored"),
)


def import_laion(source: PublicWeights, clip: Place, version: str | None = None) -> Imported:
    """LAION's prior.

    Args:
        clip: the run of the CLIP whose embeddings it makes: ViT-L/14 of OpenAI's.
        version: of the package that it was trained with, where its file does not say.

    Raises:
        UserError: not such a prior, of another CLIP, or of a version of which this cannot be known.
    """
    path = source.path
    found = {name: value for name, value in source.without("module.").items() if not name.startswith(BESIDE)}
    if found and all(name.startswith("net.") for name in found):
        found = {name.removeprefix("net."): value for name, value in found.items()}
    code = _version(found, source, version)
    found["null_text_encodings"] = found.pop(code.null)
    steps, embed_dim = shape_of(found, "to_time_embeds.0.weight", 2, path, WHAT)
    first = "causal_transformer.layers.0."
    _, head_dim = shape_of(found, f"{first}0.null_kv", 2, path, WHAT)
    inside, _ = shape_of(found, f"{first}0.to_q.weight", 2, path, WHAT)
    doubled, _ = shape_of(found, f"{first}1.1.weight", 2, path, WHAT)
    _, length, _ = shape_of(found, "null_text_encodings", 3, path, WHAT)
    prediction = _prediction(source)
    net = {
        "_target_": "dalle.nets.laion.LaionPrior",
        "embed_dim": embed_dim,
        "depth": count(found, "causal_transformer.layers.{}.0.null_kv"),
        "heads": inside // head_dim,
        "head_dim": head_dim,
        "max_text_len": length,
        "inner": doubled // 2,
        "normformer": f"{first}1.3.g" in found,
        "norm_in": "causal_transformer.init_norm.g" in found,
        "norm_out": "causal_transformer.norm.g" in found,
        "final_proj": "causal_transformer.project_out.weight" in found,
        "rotary": f"{first}0.rotary_emb.freqs" in found,
        "cosine": code.cosine,
        "unsaid": code.unsaid,
        "steps": steps,
    }
    frozen = load_clip(clip)
    reads = {"embed_dim": embed_dim, "text_width": embed_dim}
    if length < frozen.context_length:
        reads["context_length"] = length
    facts, _ = of_clip(frozen, clip, reads, path)
    model = {
        "_target_": "dalle.stages.prior.PriorStage",
        "text_dropout": 0.0 if code.unsaid == "ignored" else 0.1,
        "guidance": 1.0,
        "candidates": 2,
        "sampler": ancestral(min(64, steps)),
        "denoiser": denoiser(prediction, steps=steps),
        "net": net,
    }
    facts |= {"image_embed_norm": EmbedNorm("unit_variance").to_dict()}
    return Imported("prior", "dalle2-pytorch", model, found, facts, clip=Path(clip), licence="MIT")


def _version(found: dict[str, Tensor], source: PublicWeights, version: str | None) -> Version:
    """What the code did that wrote these weights."""
    said, path = str(version or source.said.get("version") or ""), source.path
    fits = [code for code in VERSIONS if code.null in found]
    if not fits:
        raise UserError(
            f"{path} is a prior of DALLE2-pytorch before 0.23, which masked what it pads now; not imported"
        )
    if not said:
        asked = "; ".join(f"from {'.'.join(map(str, code.since))} on" for code in reversed(fits))
        raise UserError(
            f"{path} does not say which version of DALLE2-pytorch it was trained with, on which its meaning "
            f"depends ({asked}): give version=..."
        )
    numbers = tuple(int(part) for part in said.split(".") if part.isdigit())
    known = next((code for code in VERSIONS if numbers >= code.since), None)
    if known is None or known not in fits:
        raise UserError(f"{path} is not of version {said} of DALLE2-pytorch: it holds {fits[0].null}")
    return known


def _prediction(source: PublicWeights) -> str:
    """What the network predicts, as a configuration in the file or beside it says; x0 where there is none."""
    config: Any = {**source.config, **source.said.get("config", {})}
    config = config.get("prior", config)
    config = config if isinstance(config, dict) else {}
    net = config.get("net") if isinstance(config.get("net"), dict) else {}
    for where, key, wanted in (
        (net, "self_cond", False), (config, "beta_schedule", "cosine"),
        (config, "condition_on_text_encodings", True), (config, "sampling_clamp_l2norm", False),
    ):  # fmt: skip
        if where.get(key, wanted) != wanted:
            raise UserError(
                f"{source.path} is a prior with {key}={where[key]}, which this version does not know"
            )
    if config.get("predict_v"):
        return "v"
    return "x0" if config.get("predict_x_start", True) else "eps"
