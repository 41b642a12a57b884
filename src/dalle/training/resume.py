"""Going on with a run as it was begun: what may change on the way, and what may not.

Weights and records of a run are those of its settings. On resuming, how long it trains and what it shows on
the way may change, and is noted with the step from which on it holds (`resumed` in config.yaml and
manifest.json). Whatever else differs is refused: it would be another run.
"""

import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

import lightning
import torch
import yaml

from dalle.errors import UserError
from dalle.machine import is_main_process
from dalle.run_dir import Run
from dalle.stages.base import Stage
from dalle.training.checkpoints import check_same_network, read_checkpoint
from dalle.training.restorable import check_restorable
from dalle.trust import composed

Config = dict[str, Any]
WHERE = re.compile(  # places and what is done, which say nothing of the training; inpaint: model.net does
    r"inpaint|(name|command|paths|logger|debug|trust|upstream|search|sweep|resume|resumed|overwrite|preflight)(\..*)?|"
    r".*\.(path|root|directory|cache_dir|num_workers)|trainer\.enable_.*"
)
FREE = re.compile(  # what may change, and is noted
    r"(callbacks|sampler)\..*|compile|stop_after_skipped|datamodule\.(val_items|test_items|cache_items|.*bytes)|"
    r"trainer\.(accelerator|strategy|devices|num_nodes|num_sanity_val_steps|log_every_n_steps|"
    r"(min|max)_(steps|epochs|time)|val_check_interval|check_val_every_n_epoch|limit_(val|test|predict)_batches|"
    r"deterministic|benchmark|profiler|inference_mode|barebones|plugins|model_registry|fast_dev_run)"
)

UNSAID = {"lora.rank": 0, "lora.dropout": 0.0}  # settings that came later: what runs without them had


def keep_threads(run: Run) -> None:
    """A run goes on with as many threads as it was begun with, on which the last bits depend."""
    saved = read_checkpoint(run.checkpoint)["callbacks"].get("LastCheckpoint", {}).get("threads")
    if (
        isinstance(saved, int)
        and 0 < saved <= torch.get_num_threads()
        and "OMP_NUM_THREADS" not in os.environ
    ):
        torch.set_num_threads(saved)


def facts(described: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """What a run is made from, beside its settings: kept in its checkpoints.

    Args:
        described: `facts` of `dalle.training.fit.origins`.
    """
    data = described["data"]
    return {
        "data": f"{data['source']} {data['fingerprint']['train']}",
        **{f"upstream.{name}": weights for name, weights in described["upstream"].items()},
        "world_size": world_size,
    }


def check(
    run: Run, config: Config, stage: Stage, trainer: lightning.Trainer, made_from: Mapping[str, Any]
) -> None:
    """Refuses to go on with a run that would become another one, and notes in `config` what changes.

    Args:
        config: as resolved now; its ``resumed`` is filled.
        trainer: that will go on with it.
        made_from: see `facts`.

    Raises:
        UserError: a damaged checkpoint, metrics or configuration; another network; settings, data or networks
            that are not those the run was begun with, all of them named.
    """
    checkpoint = read_checkpoint(run.checkpoint)
    check_same_network(run.checkpoint, checkpoint["state_dict"], stage)
    run.metric_rows()
    before = run.config()
    history = before.get("resumed", [])
    if not isinstance(history, list):
        raise UserError(f"{run.path / 'config.yaml'} is damaged (resumed); restore it or train it again")
    added = one_sided(before, config)
    changed = differences(before, config) | added
    then = checkpoint["callbacks"].get("LastCheckpoint", {}).get("facts")
    then = then if isinstance(then, dict) else {}  # of another kind: refused below
    changed |= {k: (then[k], v) for k, v in made_from.items() if k in then and then[k] != v}
    noted = {k: v for k, v in changed.items() if FREE.fullmatch(k) or k == "world_size" or k in added}
    if refused := without_copies({k: v for k, v in changed.items() if k not in noted}):
        listed = "; ".join(f"{key} is {now}, it was {was}" for key, (was, now) in refused.items())
        raise UserError(
            f"{run} cannot go on with other settings: {listed}; resume it with those in "
            f"{run.path / 'config.yaml'}, or train another with name=other"
        )
    check_restorable(run.checkpoint, checkpoint, stage, trainer)
    check_end(run, checkpoint, trainer)
    config["resumed"] = history
    if "command" in before:  # with which it began
        config["command"] = before["command"]
    if noted := without_copies(noted):
        told = ", ".join(f"{key}={now} (was {was})" for key, (was, now) in noted.items())
        if is_main_process():
            print(f"{run} goes on with {told}")
            if "world_size" in noted:
                then_ranks, now_ranks = noted["world_size"]
                print(other_ranks(then_ranks, now_ranks, config["batch_size"]))
                if config["data"].get("buckets"):
                    print("batches of buckets are made up anew: in this epoch some items may come twice")
        entry = {"step": checkpoint["global_step"], "changed": {k: list(v) for k, v in noted.items()}}
        config["resumed"] = [*history, entry]


def check_end(run: Run, checkpoint: dict[str, Any], trainer: lightning.Trainer) -> None:
    """Raises UserError where a run is to end before the point at which it is."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    done = {"max_steps": checkpoint["global_step"], "max_epochs": epochs}
    for name, count in done.items():
        end = getattr(trainer, name)
        if end is not None and 0 <= end < count:
            raise UserError(
                f"{run} has done {count} {name.removeprefix('max_')} already, so trainer.{name}={end} is "
                f"over; trainer.{name}={count} ends it here, more goes on"
            )


def other_ranks(before: int, now: int, batch_size: int) -> str:
    """What is not as it would have been."""
    return (
        f"a step takes {now * batch_size} items now, it took {before * batch_size}: weights are no longer "
        "those of a run that was never stopped. The order of items goes on: none comes twice in this epoch, "
        "and fewer than a step's are left out; each rank draws noise of its own"
    )


def steps_behind(run: Run, stage: Stage) -> int:
    """Steps of a run that would be resumed. Raises UserError as `check` does of its checkpoint."""
    checkpoint = read_checkpoint(run.checkpoint)
    check_same_network(run.checkpoint, checkpoint["state_dict"], stage)
    return checkpoint["global_step"]


def keep_precision(run: Run, config: Config) -> None:
    """A run that chose its precision by itself keeps it, whatever this machine is good at."""
    if config["trainer"].get("precision") == "auto":
        trainer = run.config().get("trainer")
        if isinstance(trainer, dict) and isinstance(trainer.get("precision"), str):
            config["trainer"]["precision"] = trainer["precision"]


def differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that both have and that differ, by dotted name, as (then, now); not those of `WHERE`."""
    old, new = flat(before), flat(now)
    return {k: (old[k], v) for k, v in new.items() if k in old and old[k] != v and not WHERE.fullmatch(k)}


def one_sided(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that only one has: of another version, or added on the command line. What is not said is what
    the signature says.
    """
    old, new, usual = flat(before), flat(now), UNSAID | defaults(now)
    pairs = {
        k: (old.get(k, usual.get(k)), new.get(k, usual.get(k)))
        for k in sorted(old.keys() ^ new.keys())
        if not WHERE.fullmatch(k)
    }
    return {k: (then, now) for k, (then, now) in pairs.items() if then != now}


def defaults(node: Any, prefix: str = "") -> dict[str, Any]:
    """What everything in a configuration that is built takes where nothing is said, by dotted names."""
    if not isinstance(node, Mapping):
        return {}
    place, found = f"{prefix}." if prefix else "", {}
    if "_target_" in node:
        parameters = inspect.signature(composed(node["_target_"])).parameters.values()
        found = {f"{place}{p.name}": p.default for p in parameters if p.default is not p.empty}
    for key, value in node.items():
        found |= defaults(value, f"{place}{key}")
    return found


def without_copies(changed: dict[str, Any]) -> dict[str, Any]:
    """Without what only repeats another: `model.optimizer.lr` is `optimizer.lr`."""
    return {
        key: value
        for key, value in changed.items()
        if not any(key.endswith("." + other) and changed[other] == value for other in changed)
    }


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, as they read once written down."""
    if isinstance(tree, Mapping):
        leaves: dict[str, Any] = {}
        for key, value in tree.items():
            leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return leaves
    return {prefix: yaml.safe_load(yaml.safe_dump(tree)) if isinstance(tree, list | tuple) else tree}
