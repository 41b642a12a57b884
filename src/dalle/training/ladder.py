"""Stages that build upon one another, before the first one trains: whether they and their data fit together,
and how long they will take.
"""

import contextlib
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch

from dalle.data.frozen import FROZEN, Frozen, FrozenCLIP, FrozenTokenizer
from dalle.data.open_clip import without_weights
from dalle.instantiate import instantiate
from dalle.machine import settle_threads
from dalle.run_dir import IMAGE_TOKENIZERS, Run
from dalle.training.checkpoints import read_checkpoint
from dalle.training.checks import build_stage, check_config
from dalle.training.fit import check_least_batch, check_machine, prepare, quiet, ranks
from dalle.training.preflight import SHORT, average_of, in_time, total_steps

Config = dict[str, Any]
PUBLIC = "dalle.data.open_clip.load_open_clip"
WARM, TIMED = 2, 5  # steps of a rehearsal
SECONDS = 10.0  # no step of a rehearsal begins after so long
WORTH = 200  # trainings of fewer steps are not rehearsed


def check(configs: Sequence[Config]) -> list[Config]:
    """Refuses what would stop one of several trainings, in the order in which they will be made.

    Returns: the configurations of those that could be built, with the numbers that follow the pictures.

    Raises:
        UserError: as the training itself would.
    """
    checked = []
    for config, stage, datamodule in built(configs):
        datamodule.check_batch(ranks(config))
        check_least_batch(config, stage)
        checked.append(config)
    return checked


def built(configs: Sequence[Config], here: bool = True) -> Iterator[tuple[Config, Any, Any]]:
    """The stages and DataModules of several trainings, one after the other.

    Networks have no memory here, neither those that train nor those of earlier trainings that they need. What
    only a public CLIP's weights could say is left for later.

    Args:
        here: they are to be trained on this machine. Else a public CLIP does without its weights, too.
    """
    made: dict[Path, Frozen] = {}
    for config in map(copy.deepcopy, configs):
        run = Run(Path(config["paths"]["run"]))
        if config["resume"] is True and run.finished:
            continue
        check_config(config, here)
        check_machine(config)
        parts = {key: config["datamodule"].get(key) for key in FROZEN}
        places = {key: Path(part["path"]) for key, part in parts.items() if part and "path" in part}
        public = {key: part for key, part in parts.items() if part and part.get("_target_") == PUBLIC}
        public = {} if here else {key: without_weights(part["name"]) for key, part in public.items()}
        if any(part and key not in {**places, **public} for key, part in parts.items()) or any(
            place not in made and not Run(place).finished for place in places.values()
        ):
            continue
        frozen = {key: made[place] for key, place in places.items() if place in made}
        datamodule, _ = prepare(config, run, **frozen, **public)
        with torch.device("meta"):
            stage = build_stage(config["model"])
        datamodule.suit(stage.net)
        yield config, stage, datamodule
        if (frozen_net := as_frozen(config, stage, datamodule)) is not None:
            made[run.path] = frozen_net


def as_frozen(config: Config, stage: Any, datamodule: Any) -> Frozen | None:
    """A stage's network as the DataModules of later stages work with it; None where none does."""
    if config["stage"] == "clip":
        return FrozenCLIP(stage.net, datamodule.tokenizer)
    return FrozenTokenizer(stage.net) if config["stage"] in IMAGE_TOKENIZERS else None


class Clock(lightning.Callback):
    """Ends a training after a few steps and knows when each of its batches did."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > WARM + TIMED or self.ends[-1] - self.started > SECONDS:
            trainer.should_stop = True

    @property
    def seconds(self) -> float:
        """Of a batch, loading included: the median."""
        times = [self.started, *self.ends]
        return statistics.median([b - a for a, b in pairwise(times)][WARM:] or [times[-1] - times[0]])


def how_long(configs: Sequence[Config]) -> str | None:
    """A line on how long trainings on one CPU will take, from a few measured steps of each.

    Frozen networks of stages that are still to be trained have random weights meanwhile, and nothing is
    written to any run directory or kept.

    Args:
        configs: what `check` has built.

    Returns: None where there is nothing that is worth it, or nothing that could be measured here.
    """
    seconds: dict[str, float] = {}
    made: dict[Path, Frozen] = {}
    quiet()
    settle_threads()
    for config in map(copy.deepcopy, configs):
        trainer, run = config["trainer"], Run(Path(config["paths"]["run"]))
        cut_short = any(trainer.get(key) for key in ("fast_dev_run", "overfit_batches", "max_time"))
        device = trainer["accelerator"]
        if cut_short or ranks(config) > 1 or not (device == "cpu" or (device == "auto" and only_cpu())):
            return None
        parts = config["datamodule"]
        places = {key: Path(parts[key]["path"]) for key in FROZEN if "path" in (parts.get(key) or {})}
        frozen = {key: made[place] for key, place in places.items() if place in made}
        with tempfile.TemporaryDirectory() as folder, silence():
            whole = instantiate(parts, "datamodule", **frozen)
            few = instantiate({**parts, **rehearsed(config, whole, folder)}, "datamodule", **frozen)
            stage = build_stage(config["model"])
            steps = total_steps(config, whole, 1) or 0
            if config["resume"] and run.checkpoint.exists():
                steps -= read_checkpoint(run.checkpoint)["global_step"]
            if steps >= WORTH:
                seconds[config["stage"]] = steps * seconds_of_step(config, stage, few)
            if (frozen_net := as_frozen(config, stage, few)) is not None:
                made[run.path] = frozen_net
    if not seconds:
        return None
    return (
        f"about {in_time(sum(seconds.values()))} of training on this machine by a few steps just measured: "
        + ", ".join(f"{stage} {in_time(took)}" for stage, took in seconds.items())
        + "; starting, validating and testing come on top"
    )


def rehearsed(config: Config, whole: Any, folder: str) -> dict[str, Any]:
    """What a DataModule of a few batches does otherwise: keeps nothing but in `folder`, and embeds or encodes
    its pictures in every step where the whole would, too.
    """
    batches = (WARM + TIMED + 1) * config["trainer"]["accumulate_grad_batches"]
    items, parts = whole.items("train"), config["datamodule"]
    changes = {"train_items": min(items, batches * config["batch_size"]), "cache_dir": folder}
    if items > parts.get("cache_items", items):
        changes["cache_items"] = 0
    if config["stage"] == "ar_prior":  # as many as the network has: how many a random CLIP needs says nothing
        changes["dims"] = config["model"]["net"]["dims"]
    return {key: value for key, value in changes.items() if key in parts}


def seconds_of_step(config: Config, stage: Any, datamodule: Any) -> float:
    """A short training without validation, logs and checkpoints."""
    clock, ema = Clock(), average_of(config)
    settings = {**config["trainer"], **SHORT, "enable_model_summary": False}
    callbacks = [clock, *([instantiate(ema, "callbacks.ema")] if ema else [])]
    trainer = instantiate({"_target_": "lightning.Trainer", **settings}, "trainer", callbacks=callbacks)
    datamodule.trainer = trainer
    try:
        trainer.fit(stage, datamodule=datamodule)
    except SystemExit as left:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from left
    return clock.seconds * config["trainer"]["accumulate_grad_batches"]


def only_cpu() -> bool:
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """A rehearsal's lines and bars say nothing of the trainings."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
