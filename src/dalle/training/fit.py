"""One training run: from a plain resolved config to a finished run directory.

The order is: refuse what cannot work, claim the run directory, build, fit, test, write weights and manifest.
"""

import logging
import math
import platform
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger

import dalle
from dalle.compiler import keep_kernels
from dalle.data.datamodules import SourceDataModule
from dalle.data.frozen import frozen_of
from dalle.data.sources import source_of
from dalle.data.tokenizers import save_tokenizer
from dalle.errors import UserError
from dalle.files import write_text
from dalle.instantiate import instantiate
from dalle.machine import check_ranks, fast_in_bf16, is_main_process, settle_threads
from dalle.run_dir import Run
from dalle.run_lock import check_ours, check_place, claimed
from dalle.sharded import all_whole
from dalle.stages.base import Stage
from dalle.training import fsdp, init_from, loggers, lora, preflight, resume, slurm
from dalle.training.callbacks import Compile
from dalle.training.checkpoints import LastCheckpoint, read_checkpoint
from dalle.training.checks import build_stage, check_config
from dalle.training.defaults import fill_lengths, fill_sizes, said
from dalle.training.ema import Ema
from dalle.training.loggers import MetricsCsv
from dalle.trust import set_trusted

Config = dict[str, Any]


def train(config: Config) -> dict[str, float]:
    """Trains, tests and saves one stage; gives its test metrics (empty when the run was finished already)."""
    run = Run(Path(config["paths"]["run"]))
    if not may_start(config):
        return {}
    resuming = config["resume"] and run.checkpoint.exists()
    if config["resume"] and not resuming:
        print(f"nothing to resume in {run}; starting from the beginning")
    quiet()
    if resuming:
        resume.keep_threads(run)
    else:
        settle_threads()
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")

    keep_kernels(config["paths"]["cache"])
    datamodule, line = prepare(config, run)
    if line and is_main_process():
        print(line, flush=True)
    stage = build_stage(config["model"])
    datamodule.suit(stage.net)
    if config.get("init_from"):
        init_from.keep_norm(datamodule, config["init_from"])
    if config.get("init_from") and not resuming:
        taken = init_from.load(stage, config["init_from"])
        if is_main_process():
            print(*taken, sep="\n", flush=True)
    lora.add(stage, config.get("lora") or {}, begun=bool(config.get("init_from")))
    stage.patience = config["stop_after_skipped"]
    check_least_batch(config, stage)
    if config["preflight"]:
        behind = resume.steps_behind(run, stage) if resuming else 0
        preflight.report(config, stage, datamodule, behind)
        return {}
    trainer = make_trainer(config, run)
    stage.check_trainer(trainer)
    datamodule.trainer = trainer
    # refuses a batch larger than the data, while nothing has been touched
    keep_whole_steps(trainer, len(datamodule.train_dataloader()))
    described = origins(stage, datamodule)
    (saver, *_) = [c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
    saver.facts = resume.facts(described["facts"], trainer.world_size)
    if resuming:
        resume.check(run, config, stage, trainer, saver.facts)
    if not is_main_process():
        return fit_and_test(config, run, trainer, stage, datamodule, saver, resuming)
    print(preflight.outline(config, stage, datamodule, trainer.world_size), flush=True)
    for line in preflight.mismatched_runs(config, datamodule):
        print(f"careful: {line}", flush=True)
    with claimed(run, config["overwrite"]):
        if not is_free(run, config):
            return {}
        if "tokenizer" in config["datamodule"]:
            save_tokenizer(datamodule.tokenizer, run.tokenizer)
        write_text(run.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        loggers.begin(trainer.loggers, config, described, upstream(config))
        return fit_and_test(config, run, trainer, stage, datamodule, saver, resuming)


def fit_and_test(
    config: Config,
    run: Run,
    trainer: lightning.Trainer,
    stage: Stage,
    datamodule: Any,
    saver: LastCheckpoint,
    resuming: bool,
) -> dict[str, float]:
    """Gives the test metrics; on all ranks."""
    with ranks_together(trainer, run):
        checkpoint = run.checkpoint if resuming else None
        trainer.fit(stage, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        trainer.test(stage, datamodule=datamodule, verbose=False)
    metrics = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
    if (missing := [k for k, v in metrics.items() if not math.isfinite(v)]) and trainer.is_global_zero:
        print(f"careful: no number came out for {', '.join(missing)}", flush=True)
    if config["trainer"].get("fast_dev_run") or config["trainer"].get("overfit_batches"):
        if trainer.is_global_zero:
            print(f"everything ran; a debug run is no finished one, so there are no weights in {run}")
    else:
        finish(run, trainer, stage, facts(config, trainer, stage, datamodule, metrics, saver.seconds))
    return metrics


@contextmanager
def ranks_together(trainer: lightning.Trainer, run: Run) -> Iterator[None]:
    """One line where another rank has ended amid the training: why is in that one's own last lines.

    Raises:
        UserError: as far as the library for communication says so.
    """
    try:
        yield
    except RuntimeError as error:
        lost = ("closed by peer", "reset by peer", "broken pipe", "timed out", "connection", "remote process")
        if trainer.world_size == 1 or not any(sign in str(error).lower() for sign in lost):
            raise
        left = "go on with resume=true" if run.checkpoint.exists() else "there is no checkpoint yet"
        raise UserError(f"another process of this run has ended, so this one does; {left}") from error


def check_least_batch(config: Config, stage: Stage) -> None:
    """Refuses batches, over all processes, of which the stage would learn nothing."""
    if stage.least_batch > 1 and config["batch_size"] * ranks(config) < stage.least_batch:
        raise UserError(
            f"stage={config['stage']} needs batch_size={stage.least_batch} or more to learn at all"
        )


def keep_whole_steps(trainer: lightning.Trainer, batches: int) -> None:
    """Lets an epoch that `limit_train_batches` cuts short end with a whole accumulated step."""
    limit: Any = trainer.limit_train_batches
    debug = trainer.fast_dev_run or trainer.overfit_batches  # pyright: ignore[reportAttributeAccessIssue]  # set by a connector of Lightning's
    everything = isinstance(limit, float) and limit == 1.0
    if trainer.accumulate_grad_batches > 1 and not everything and not debug:
        whole = preflight.whole_batches(batches, limit, trainer.accumulate_grad_batches)
        trainer.limit_train_batches = whole


def quiet() -> None:
    """Lightning's advertisements and remarks about itself say nothing of the run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in ("LeafSpec", "does not have many workers", "srun", "smaller than the logging interval"):
        warnings.filterwarnings("ignore", f".*{message}.*")


def upstream(config: Config) -> list[Run]:
    """The runs whose networks this one's DataModule works with."""
    nodes = [node for node in config["datamodule"].values() if isinstance(node, dict)]
    return [Run(Path(n["path"])) for n in nodes if n.get("_target_", "").startswith("dalle.run_dir.load_")]


def missing_runs(config: Config, coming: Container[Path] = ()) -> dict[str, Run]:
    """The runs, by stage, that still have to be trained because this one's DataModule works with their
    networks. Those that are there, come from elsewhere, or are `coming` are not among them.

    Raises:
        UserError: another place was named, and there is no finished run in it; or nothing may be trained.
    """
    used, missing = upstream(config), {}
    for stage, path in config["upstream"].items():
        if Run(Path(path)) in used and not Run(Path(path)).finished and Path(path) not in coming:
            usual = Path(config["paths"]["logs"], config["name"], stage)
            if Path(path) != usual:
                raise UserError(
                    f"upstream.{stage}={path} holds no finished {stage} run; train one with model={stage}, "
                    "or leave it out"
                )
            if config["preflight"]:
                raise UserError(
                    f"{usual} holds no finished {stage}, and preflight trains none: train it first, "
                    f"or see what that takes with model={stage} preflight=true"
                )
            missing[stage] = Run(usual)
    return missing


def check_machine(config: Config) -> None:
    """What this machine cannot do is refused before anything is read or written."""
    check_ranks()
    trainer = config["trainer"]
    if trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            "a GPU was asked for (trainer.accelerator=gpu) but PyTorch sees none; "
            "use trainer=cpu, or trainer=auto"
        )
    if not config.get("preflight") and trainer.get("plugins") is None:
        slurm.check_started(trainer.get("num_nodes"))
    if trainer.get("precision") == "auto":
        trainer["precision"] = "bf16-mixed" if fast_in_bf16() else "32-true"
    fsdp.check(config)


def may_start(config: Config) -> bool:
    """Refuses, before anything is read or written, what cannot work; False when a finished run needs nothing
    more.

    Raises:
        UserError: a wrong type, a machine without what is asked for, or a directory that holds a run
            although neither resume nor overwrite was asked for.
    """
    for group in ("callbacks", "logger"):  # none of them may be wanted
        config[group] = config.get(group) or {}
    init_from.settings(config)
    check_config(config) if is_main_process() else set_trusted(config.get("trust"))
    run = Run(Path(config["paths"]["run"]))
    if not (config["resume"] is True and run.checkpoint.exists()):
        init_from.check(config)
    if config["resume"] is True and run.checkpoint.exists():
        resume.keep_precision(run, config)
    check_machine(config)
    if not is_main_process():  # the main process has looked, and the directory may already be its own
        return not (config["resume"] and run.finished)
    if config["overwrite"] and config["resume"]:
        raise UserError("resume=true and overwrite=true contradict each other; give one of them")
    if not config["preflight"]:
        check_place(config)
        check_ours(run.path, config["overwrite"])
    return is_free(run, config)


def is_free(run: Run, config: Config) -> bool:
    """False when a finished run needs nothing more.

    Raises:
        UserError: the directory holds a run, although neither resume nor overwrite was asked for, or a
            damaged one.
    """
    if config["resume"]:
        if run.finished:
            print(f"{run} is finished; nothing to resume (overwrite=true trains it again)")
            return False
        if run.checkpoint.exists():
            read_checkpoint(run.checkpoint)
    elif run.occupied and not config["overwrite"] and not config["preflight"]:
        raise UserError(
            f"{run} already holds a run; resume=true goes on with it, name=other trains beside it, "
            "overwrite=true deletes it and starts again "
            "(in a sweep, hydra=sweep gives every job its own directory)"
        )
    return True


def kept_tokenizer(config: Config, run: Run) -> Config:
    """A run that is resumed keeps its tokenizer, whatever has become of the captions it was trained on."""
    kept = "tokenizer" in config["datamodule"] and run.tokenizer.exists() and not config["overwrite"]
    return {"tokenizer": run.load_tokenizer()} if kept else {}


def prepare(config: Config, run: Run, **frozen: Any) -> tuple[Any, str | None]:
    """Puts all numbers that follow the pictures into the configuration; gives the DataModule and a line on
    them. A run that is resumed keeps its own.
    """
    saved = run.config() if config["resume"] and run.checkpoint.exists() else None
    source = source_of(config["datamodule"]["source"], "data", "train")
    items = min(len(source), config["datamodule"].get("train_items") or len(source))
    followed = fill_lengths(config, items, ranks(config), saved)
    datamodule = instantiate(config["datamodule"], "datamodule", **kept_tokenizer(config, run), **frozen)
    followed |= fill_sizes(config, datamodule.sizes, saved)
    return datamodule, said(config, items, followed)


def ranks(config: Config) -> int:
    """How many processes will train."""
    places = {key: config["trainer"][key] for key in ("accelerator", "strategy", "devices", "num_nodes")}
    if places["devices"] == places["num_nodes"] == 1:
        return 1
    return lightning_trainer(places, logger=False, enable_model_summary=False).world_size


def lightning_trainer(settings: Config, **more: Any) -> lightning.Trainer:
    if settings.get("plugins") is None and (place := slurm.environment()) is not None:
        settings = {key: value for key, value in settings.items() if key != "plugins"}
        more = {**more, "plugins": [place]}
    try:
        return instantiate({"_target_": "lightning.Trainer", **settings}, "trainer", **more)
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from error


def make_trainer(config: Config, run: Run) -> lightning.Trainer:
    nodes = {key: node for key, node in config["callbacks"].items() if node and "_target_" in node}
    if not config["trainer"].get("enable_progress_bar", True):
        nodes.pop("progress", None)
    callbacks = [instantiate(node, f"callbacks.{key}") for key, node in nodes.items()]
    if mode := config["compile"]:
        callbacks.append(Compile(None if mode is True else mode))
    if not any(isinstance(callback, LastCheckpoint) for callback in callbacks):
        callbacks.append(LastCheckpoint(run.path))
    made: list[Logger] = [instantiate(node, f"logger.{k}") for k, node in config["logger"].items() if node]
    if not any(isinstance(logger, MetricsCsv) for logger in made):
        made.append(MetricsCsv(run.path))
    arguments = {"callbacks": callbacks, "logger": made, "default_root_dir": str(run.path)}
    settings = dict(config["trainer"])
    every, accumulated = settings.get("val_check_interval"), settings.get("accumulate_grad_batches", 1)
    if isinstance(every, int) and settings.get("check_val_every_n_epoch") is None:
        settings["val_check_interval"] = every * accumulated  # of batches, to Lightning
    return lightning_trainer(settings, **arguments)


def finish(run: Run, trainer: lightning.Trainer, stage: Stage, manifest: dict[str, Any]) -> None:
    """Saves the averaged weights and the manifest (sharded weights are gathered first, on all ranks)."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  # set by a connector of Lightning's
        if isinstance(callback, Ema):
            callback.swap_in(stage)
    lora.merge(stage)
    weights = all_whole(stage.net.state_dict(), trainer.is_global_zero)
    if trainer.is_global_zero:
        run.save(weights, {**manifest, "parameters": preflight.count(stage.net)})
        loggers.end(trainer.loggers, run)
    trainer.strategy.barrier()


def origins(stage: Stage, datamodule: Any) -> dict[str, Any]:
    """What loggers are told of a run besides its configuration, before it begins."""
    return {
        "parameters": preflight.count(stage.net),
        "facts": {
            "data": SourceDataModule.describe(datamodule)["data"],
            "upstream": {name: net.weights_hash for name, net in frozen_of(datamodule).items()},
        },
    }


def facts(
    config: Config,
    trainer: lightning.Trainer,
    stage: Stage,
    datamodule: Any,
    metrics: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """What manifest.json says of a run besides its schema and the hash of its weights."""
    return {
        "stage": config["stage"],
        "parameters": preflight.count(stage.net),
        "steps": trainer.global_step,
        "seconds_training": round(seconds, 1),
        "metrics": dict(metrics),
        **({"resumed": config["resumed"]} if config.get("resumed") else {}),
        **datamodule.describe(),
        "versions": {
            "dalle": dalle.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }
