"""What imported priors and decoders have in common: settings of diffusion, and the CLIP they work with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.data.tokenizers import tokenizer_facts
from dalle.errors import UserError
from dalle.ranges import Place


def ancestral(steps: int) -> dict[str, Any]:
    return {"_target_": "dalle.diffusion.samplers.Sampler", "method": "ddpm", "steps": steps}


def denoiser(prediction: str, learned_variance: bool = False, steps: int = 1000) -> dict[str, Any]:
    return {
        "_target_": "dalle.diffusion.denoiser.Denoiser",
        "_partial_": True,
        "prediction": prediction,
        "learned_variance": learned_variance,
        "schedule": {"_target_": "dalle.diffusion.schedule.Schedule", "name": "cosine", "steps": steps},
    }


def of_clip(
    frozen: Any, clip: Place, net: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a manifest says of the CLIP, and what this makes of the empty caption.

    Raises:
        UserError: the network reads what another CLIP makes.
    """
    for name in ("embed_dim", "text_width", "context_length"):
        if name in net and net[name] != (has := getattr(frozen, name)):
            raise UserError(f"{path} works with a CLIP of {name}={net[name]}, but {clip} has {has}")
    empty = frozen.embed_captions([""])
    facts = {
        "clip": {"weights": frozen.weights_hash, "embed_dim": frozen.embed_dim},
        "tokenizer": tokenizer_facts(frozen.tokenizer),
    }
    return facts, {"empty_embed": empty["text_embed"][0], "empty_hidden": empty["text_hidden"][0]}
