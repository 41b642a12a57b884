"""Whether stages that build upon one another and their data fit together, before the first one trains."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dalle.data.frozen import FROZEN, Frozen, FrozenCLIP, FrozenTokenizer
from dalle.run_dir import IMAGE_TOKENIZERS, Run
from dalle.training.checks import build_stage, check_config
from dalle.training.fit import check_least_batch, check_machine, prepare, ranks

Config = dict[str, Any]


def check(configs: Sequence[Config]) -> None:
    """Refuses what would stop one of several trainings, in the order in which they will be made.

    Networks have no memory here, neither those that train nor those of earlier trainings that they need. What
    only a public CLIP's weights could say is left for later.

    Raises:
        UserError: as the training itself would.
    """
    made: dict[Path, Frozen] = {}
    for config in map(copy.deepcopy, configs):
        run = Run(Path(config["paths"]["run"]))
        if config["resume"] is True and run.finished:
            continue
        check_config(config)
        check_machine(config)
        parts = {key: config["datamodule"].get(key) for key in FROZEN}
        places = {key: Path(part["path"]) for key, part in parts.items() if part and "path" in part}
        if any(part and key not in places for key, part in parts.items()) or any(
            place not in made and not Run(place).finished for place in places.values()
        ):
            continue
        frozen = {key: made[place] for key, place in places.items() if place in made}
        datamodule, _ = prepare(config, run, **frozen)
        datamodule.check_batch(ranks(config))
        with torch.device("meta"):
            stage = build_stage(config["model"])
        check_least_batch(config, stage)
        if config["stage"] == "clip":
            made[run.path] = FrozenCLIP(stage.net, datamodule.tokenizer)
        elif config["stage"] in IMAGE_TOKENIZERS:
            made[run.path] = FrozenTokenizer(stage.net)
