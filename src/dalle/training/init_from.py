"""Training that begins with the weights of a finished run: `init_from=RUN`, as for a decoder that learns to
inpaint, or to train imported weights further.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.data.embed_norm import EmbedNorm
from dalle.errors import UserError
from dalle.instantiate import check as check_node
from dalle.run_dir import Run
from dalle.stages.base import Stage
from dalle.trust import listed
from dalle.weight_names import as_today

NAMED = 3  # weights of a part that are new


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError where `init_from` is no finished run of the same stage."""
    if not config.get("init_from"):
        return
    found = Run(Path(config["init_from"])).manifest("stage")["stage"]
    if found != config["stage"]:
        raise UserError(f"init_from={config['init_from']} is a {found}, not a {config['stage']}; give one")


def settings(config: dict[str, Any]) -> None:
    """Imported weights bring their own `model`: no preset describes their network and what it predicts. The
    optimizer stays this run's.

    Raises:
        UserError: their config.yaml, which may be anybody's, names what a file may not, or a network that is
            shown no masks is to learn inpainting.
    """
    path = config.get("init_from")
    if not isinstance(path, str) or not (run := Run(Path(path))).finished:
        return  # `check` says so
    saved = run.config("model")
    if "origin" in saved and run.manifest().get("stage") == config["stage"]:
        check_node(saved["model"], f"{run.path / 'config.yaml'}: model", trust=listed)
        model = {**saved["model"], "optimizer": config["model"].get("optimizer")}
        if config.get("inpaint"):
            if "inpaint" not in model["net"]:
                raise UserError(
                    f"init_from={path} has a network that learns no inpainting; leave inpaint=true out"
                )
            model["net"] = {**model["net"], "inpaint": True}
        config["model"] = model


def keep_norm(datamodule: Any, path: str) -> None:
    """Image embeddings stay normalised as the weights know them, not by what the new data say, as long as
    they are the same CLIP's.
    """
    if not hasattr(datamodule, "norm"):
        return
    facts = Run(Path(path)).manifest()
    same = facts.get("clip", {}).get("weights") == datamodule.clip.weights_hash
    if same and "image_embed_norm" in facts:
        datamodule.norm = EmbedNorm.from_dict(facts["image_embed_norm"])


def load(stage: Stage, path: str) -> list[str]:
    """Puts the weights of a run into the stage's network. A layer that only this network has must be zero at
    birth, so that both compute the same. Gives a table of what was taken.

    Raises:
        UserError: another network.
    """
    weights, own = as_today(Run(Path(path)).weights(), stage.net), stage.net.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        there, here = (tuple(some[name].shape) if name in some else None for some in (weights, own))
        if there != here and (there is not None or own[name].any()):
            raise UserError(
                f"init_from={path} is of another network ({name} is {there} there, {here} here); give the "
                "same settings of model.net"
            )
    stage.net.load_state_dict({**own, **weights})
    return table(own, weights, path)


def table(own: Mapping[str, Tensor], taken: Mapping[str, Tensor], path: str) -> list[str]:
    """A line for each part of the network: its weights, how many of them come from the run, and those that do
    not.
    """
    parts: dict[str, list[str]] = {}
    for name in own:
        parts.setdefault(name.split(".")[0], []).append(name)
    lines = [f"init_from={path}:"]
    for part, names in parts.items():
        new = [name for name in names if name not in taken]
        numbers = sum(own[name].numel() for name in names)
        more = f"; new: {', '.join(new[:NAMED])}{' ...' if len(new) > NAMED else ''}" if new else ""
        whole = f"{len(names) - len(new)} of {len(names)} weights taken"
        lines.append(f"  {part:<28} {whole} ({numbers:,} numbers){more}")
    return lines
