"""Low-rank adapters (Hu et al. 2021, LoRA) by the package peft: `init_from=RUN lora.rank=8`.

What the run's linear layers compute stays, and beside each a product of two thin matrices learns what is to
change. When the training ends they are merged into the layers: the run that is written is an ordinary one.
"""

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from annotated_types import Ge, Gt, Le
from torch import nn

from dalle.errors import UserError
from dalle.nets.blocks import StepLinear
from dalle.ranges import Dropout, Number, Text
from dalle.stages.base import Stage

LINEAR = (nn.Linear, StepLinear)  # not a table of logits, which is one, too


class Lora(TypedDict):
    """The settings `lora` of conf/train.yaml."""

    rank: Annotated[int, Ge(0), Le(2**16)]
    alpha: Annotated[Number, Gt(0), Le(1e6)] | None
    dropout: Dropout
    layers: list[Text] | None


def add(stage: Stage, settings: Mapping[str, Any], begun: bool) -> None:
    """Puts adapters beside the linear layers in the network's lists of layers; nothing else trains then.

    Args:
        begun: whether the network has weights of a run, by `init_from` or by resuming.

    Raises:
        UserError: peft is missing, no such layer, or the weights are new ones.
    """
    if not settings.get("rank"):
        return
    if not begun:
        raise UserError("lora.rank adapts the weights of a run; give it as init_from=RUN")
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise UserError("lora.rank needs the package peft: pip install 'dalle[lora]'") from error
    wanted, net = settings["layers"], stage.net
    parts = {name: name.split(".") for name, module in net.named_modules() if type(module) in LINEAR}
    linear = [name for name, part in parts.items() if any(map(str.isdigit, part))]
    names = [name for name in linear if wanted is None or {*wanted} & {*parts[name]}]
    if not names:
        last = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"lora.layers={wanted}: {type(net).__name__} has no such linear layers in its lists of layers; "
            f"those there are called {', '.join(last) or 'nothing'}"
        )
    config = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"] or settings["rank"],
        lora_dropout=settings["dropout"],
        target_modules=names,
    )
    stage.adapters = peft.LoraModel(net, config, "default").merge_and_unload
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"lora: {trained:,} numbers beside {len(names)} layers train; all else stays", flush=True)


def merge(stage: Stage) -> None:
    """Makes the network what it was before, with what the adapters have learned in its layers."""
    if stage.adapters is not None:
        stage.adapters()
        stage.net.requires_grad_(True)
        stage.adapters = None
