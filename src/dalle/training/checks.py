"""Looks at a whole configuration before anything is claimed, made or started.

What an argument may be is said where it is declared (`dalle.ranges`); here is the rest: settings at the top
and of Lightning's Trainer, which classes stand in which group, and whether the network can be built: on the
meta device, where that takes neither memory nor time.
"""

import copy
import os
import re
from typing import Annotated, Any, Literal, TypedDict

import lightning
import torch
from annotated_types import Ge, Le
from lightning.pytorch.loggers import Logger

from dalle.data.datamodules import SourceDataModule
from dalle.data.encoded import read_manifest
from dalle.diffusion.samplers import Sampler
from dalle.errors import UserError
from dalle.instantiate import check, instantiate
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    Seed,
    Share,
    Text,
    check_values,
    shown,
)
from dalle.stages.base import Stage
from dalle.training.defaults import fill_lengths, fill_sizes, suit
from dalle.training.lora import Lora
from dalle.trust import set_trusted

Config = dict[str, Any]
Group = dict[str, Any]


class Needed(TypedDict):
    """The settings of conf/train.yaml that nothing works without."""

    name: Text
    stage: Text
    seed: Seed
    resume: bool
    overwrite: bool
    preflight: bool
    compile: bool | Literal["max-autotune", "reduce-overhead"]
    batch_size: PositiveInt | Literal["auto"]
    upstream: dict[str, Text]
    paths: dict[str, Text]
    trainer: Group
    optimizer: Group
    sampler: Group
    callbacks: Group
    logger: Group
    data: Group
    model: Group
    datamodule: Group


class Settings(Needed, total=False):
    """A resolved conf/train.yaml, with whatever its groups have put beside."""

    trust: list[Text]
    command: Text
    inpaint: bool
    init_from: Text | None
    lora: Group
    at_most: Group
    stop_after_skipped: PositiveInt
    resumed: Any
    clip: Group
    tokenizer: Group
    image_tokenizer: Group
    sweep: Group
    search: Group
    experiment: Any
    debug: Any
    hparams_search: Any


# The number of batches, or their share of all
Batches = PositiveInt | Share | None
BatchesOrNone = NonNegativeInt | Fraction | None
Endless = Literal[-1]


class TrainerNeeded(TypedDict):
    """What is asked of the trainer's settings beside Lightning."""

    strategy: Any
    accelerator: Text
    devices: Annotated[int, Ge(1), Le(1024)] | Endless | Text | list[NonNegativeInt]
    num_nodes: Annotated[int, Ge(1), Le(100_000)]
    max_epochs: PositiveInt | Endless | None
    max_steps: PositiveInt | Endless
    accumulate_grad_batches: PositiveInt


class TrainerSettings(TrainerNeeded, total=False):
    """Lightning's own signature gives types only."""

    fast_dev_run: bool | NonNegativeInt
    min_epochs: PositiveInt | None
    min_steps: PositiveInt | None
    limit_train_batches: Batches
    limit_val_batches: BatchesOrNone
    limit_test_batches: BatchesOrNone
    limit_predict_batches: BatchesOrNone
    overfit_batches: NonNegativeInt | Fraction
    val_check_interval: Batches
    check_val_every_n_epoch: PositiveInt | None
    num_sanity_val_steps: NonNegativeInt | Endless
    log_every_n_steps: NonNegativeInt
    gradient_clip_val: NonNegative | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    reload_dataloaders_every_n_epochs: NonNegativeInt


def check_config(config: Config, here: bool = True) -> None:
    """Whether these settings can be trained with, as far as that can be said without reading any data.

    Args:
        here: on this machine.

    Raises:
        UserError: the first setting that is wrong, by its name.
    """
    check_values(config, Settings)
    check_values(config.get("lora") or {}, Lora, "lora.")
    set_trusted(config.get("trust"))
    check_needed(config, Settings)
    check_needed(config["trainer"], TrainerSettings, "trainer.")
    check(config["optimizer"], "optimizer", OptimizerFactory)
    check(config["sampler"], "sampler", Sampler)
    for key in ("data", "tokenizer", "clip", "image_tokenizer"):
        check(config.get(key), key)
    check(config["datamodule"], "datamodule", SourceDataModule)
    check(config["model"], "model", Stage)
    for group, kind in (("callbacks", lightning.Callback), ("logger", Logger)):
        for key, node in (config.get(group) or {}).items():
            if node is not None and not (isinstance(node, dict) and "_target_" not in node):
                check(node, f"{group}.{key}", kind)
    given = {name: value for name, value in config["trainer"].items() if value != "auto"}
    check_values(given, TrainerSettings, "trainer.", complete=False)
    check_time(config["trainer"].get("max_time"))
    check({"_target_": "lightning.Trainer", **config["trainer"]}, "trainer")
    check_stage(config)
    rehearse(config, here)


def check_needed(values: Config, declared: Any, place: str = "") -> None:
    for key in sorted(declared.__required_keys__ - values.keys()):
        raise UserError(f"{place}{key} is needed: do not take it away")


def check_time(value: Any) -> None:
    """Of ``trainer.max_time``: days, hours, minutes and seconds, more than none."""
    if value is not None and not re.fullmatch(r"(?=.*[1-9])\d{1,5}(:\d{1,2}){3}", str(value)):
        raise UserError(f"trainer.max_time must be DD:HH:MM:SS, such as 00:12:00:00, got {shown(value)}")


def check_stage(config: Config) -> None:
    """`stage` names the directory and what others look for in it: it is that of the model."""
    model = config["model"]
    if model.get("optimizer") is None:
        raise UserError("model.optimizer=null trains nothing; leave it out, or give optimizer=adamw")
    home, _, own = model["_target_"].rpartition(".")[0].rpartition(".")
    if home == "dalle.stages" and config["stage"] != own:
        raise UserError(
            f"stage={config['stage']} does not go with model._target_={model['_target_']}: it is "
            f"set by model=, here to {own}"
        )


# Sizes that only the data, or networks that are trained before, can say: here it is enough that they might be
PLAUSIBLE = {
    "image_size": 64, "embed_dim": 64, "text_width": 64, "context_length": 32, "vocab_size": 512,
    "text_vocab": 512, "text_length": 32, "image_vocab": 2**16, "image_levels": None, "grid": 8,
    "dims": 8, "buckets": 1024,
}  # fmt: skip


def rehearse(config: Config, here: bool = True) -> None:
    """Builds the stage on the meta device, before networks that it needs are trained for hours.

    Raises:
        UserError: sizes that do not go together, or a network that this machine has no memory for.
    """
    config = copy.deepcopy(config)
    model, source = config["model"], config["datamodule"].get("source")
    net = model.get("net") or {}
    if isinstance(net.get("image_levels"), list) and net.get("image_vocab") == "auto":
        return  # its product: not to be guessed
    said = [place.get("image_size") for place in (source, net) if isinstance(place, dict)]
    if isinstance(source, dict) and source.get("_target_") == "dalle.data.encoded.Encoded":
        said = [read_manifest(source["path"])["image_size"]]
    size = next((size for size in said if isinstance(size, int)), PLAUSIBLE["image_size"])
    guessed = PLAUSIBLE.keys() - suit(net, size).keys()
    sizes = {key: PLAUSIBLE[key] for key, value in net.items() if value == "auto" and key in guessed}
    fill_lengths(config, items=10**9)
    fill_sizes(config, sizes | {"image_size": size})
    with torch.device("meta"):
        stage = build_stage(model)
    if stage.recipe is not None:
        stage.recipe.check(stage.net)
    count = sum(p.numel() for p in stage.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    if here and memory and 4 * count > memory:
        raise UserError(
            f"model.net has {count:,} parameters, {4 * count / 2**30:,.0f} GiB; this machine has "
            f"{memory / 2**30:,.0f} GiB of memory: make it smaller"
        )
    schedule = (model.get("denoiser") or {}).get("schedule")
    if schedule and model.get("sampler"):
        instantiate(model["sampler"], "sampler").levels(instantiate(schedule, "model.denoiser.schedule"))


def build_stage(model: Config) -> Stage:
    """As `instantiate`; what a network raises for sizes that it cannot have is a line, too."""
    try:
        stage = instantiate(model, "model")
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"model cannot be built with these sizes ({reason}); change model.net") from error
    if not isinstance(getattr(stage, "net", None), torch.nn.Module):
        raise UserError("model describes a stage without a network; leave its parts as a preset has them")
    return stage
