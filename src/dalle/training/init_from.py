"""Training that begins with the weights of a finished run: `init_from=RUN`, as for a decoder that learns to
inpaint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle.errors import UserError
from dalle.run_dir import Run
from dalle.stages.base import Stage
from dalle.weight_names import as_today


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError where `init_from` is no finished run of the same stage."""
    if not config.get("init_from"):
        return
    found = Run(Path(config["init_from"])).manifest("stage")["stage"]
    if found != config["stage"]:
        raise UserError(f"init_from={config['init_from']} is a {found}, not a {config['stage']}; give one")


def load(stage: Stage, path: str) -> None:
    """Puts the weights of a run into the stage's network. A layer that only this network has must be zero at
    birth, so that both compute the same.

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
