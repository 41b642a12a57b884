"""Trains one stage: `train.py model=prior data=folder data.root=PICTURES`; several: `-m model=clip,prior`.

Hydra only puts the configuration together, from conf/train.yaml and the command line, and all of it before
any work starts; what happens then is dalle.training.fit, and dalle.launch.sweeps for the jobs of
`-m hydra=sweep`.
"""

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from dalle.cli import entry
from dalle.errors import UserError
from dalle.launch.overrides import quote
from dalle.launch.processes import call, safe_path
from dalle.machine import is_main_process, started_by_others
from dalle.run_lock import only_one

# What is about one stage alone; everything else also holds for those that have to be trained before it.
OWN = ("model", "optimizer", "sampler", "callbacks", "datamodule", "batch_size", "at_most", "stage", "debug",
       "resume", "overwrite", "paths.run", "hydra")  # fmt: skip

CONF = str(Path(__file__).resolve().parent / "conf")


def main() -> None:
    composed: list[tuple[DictConfig, list[str], RunMode | None]] = []
    launcher = [a for a in sys.argv[1:] if a.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))]
    sys.argv = [a for a in sys.argv if a not in launcher]  # all jobs are put together here: see `launch`

    @hydra.main(version_base="1.3", config_path="conf", config_name="train")
    def compose(cfg: DictConfig) -> None:
        if isinstance(cfg.paths.run, str):
            cfg.paths.run = cfg.paths.run  # may name the job, which only Hydra knows
        composed.append((cfg, list(HydraConfig.get().overrides.task), HydraConfig.get().mode))

    compose()
    jobs: list[Any] = []
    for cfg, overrides, _ in composed:
        jobs.append((OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True), overrides))
    several = any(mode == RunMode.MULTIRUN for _, _, mode in composed)
    plain = not jobs or jobs[0][0].get("preflight") is not False
    special = set() if plain else {"sweep", "search"} & jobs[0][0].keys()
    if launcher and special != {"sweep"}:
        raise UserError("hydra/launcher is for -m hydra=sweep: other jobs build upon one another")
    if several:
        give_places(jobs)
    if "search" in special:
        sys.exit(max(search(*job) for job in jobs))
    if "sweep" in special and several:
        sys.exit(sweep(jobs, launcher))
    if several:
        from dalle.training.checks import check_config

        for config, _ in jobs:
            check_config(config)
        check(jobs)
    for config, overrides in jobs:
        run_job(overrides) if several else train(config, overrides)


def give_places(jobs: list[tuple[dict, list[str]]]) -> None:
    """A directory for each job, named by its command line; jobs of one are told apart by their settings.

    Raises:
        UserError: the settings are the same, too; or only hydra=sweep may make directories.
    """
    for run in {str(config["paths"]["run"]) for config, _ in jobs}:
        same = [job for job in jobs if str(job[0]["paths"]["run"]) == run]
        for config, overrides in same:
            own = [o for o in overrides if not all(o in others for _, others in same)]
            if len(same) > 1 and not config.get("preflight") and (not own or "sweep" not in config):
                raise UserError(
                    f"{len(same)} jobs would train in {run}; hydra=sweep gives every job its own directory, "
                    "by the settings in which they differ"
                )
            usual = run.rstrip("/") == str(Path(config["paths"]["logs"], config["name"], config["stage"]))
            words = ",".join(o.replace("/", "_") for o in own)
            place = f"{run.rstrip('/')}{'/' if usual else ','}{words}" if own else run
            config["paths"]["run"] = str(safe_path(place))
            overrides.append(f"paths.run={quote(config['paths']['run'])}")


def train(config: dict, overrides: list[str]) -> None:
    from dalle.training import fit  # torch and lightning: only once there is something to train

    if not fit.may_start(config):
        return
    missing = fit.missing_runs(config) if is_main_process() or started_by_others() else {}
    if missing and started_by_others():
        raise UserError(
            f"{', '.join(map(str, missing.values()))} must be trained first, by a command of its own: all "
            "processes that torchrun has started are for this run"
        )
    if missing:
        check([(config, overrides)])
    for stage, run in missing.items():
        with only_one(run.path) as lock:  # several jobs of a sweep may miss the same
            if run.finished:
                continue
            print(f"{run} holds no finished {stage}: training it first", flush=True)
            run_job(upstream(overrides, stage, run), lock)
    try:
        fit.train(config)
    except SystemExit as left:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from left


def upstream(overrides: list[str], stage: str, run: Any) -> list[str]:
    """The command that trains what a job needs first."""
    shared = [o for o in overrides if not o.lstrip("+~").startswith(OWN)]
    place, resume = quote(str(run)), str(run.occupied).lower()
    return [*shared, f"model={model_for(stage, overrides)}", f"paths.run={place}", f"resume={resume}"]


def model_for(stage: str, overrides: list[str]) -> str:
    """The model to train for a stage that is missing: of a paper's size where it is for a paper's."""
    asked = [o.partition("=")[2] for o in overrides if o.startswith("model=")]
    paper = Path(__file__).with_name("conf") / "model" / f"{stage}_paper.yaml"
    return paper.stem if asked and asked[-1].endswith(("_paper", "_1b")) and paper.exists() else stage


def check(jobs: list[Any]) -> None:
    """Refuses, before any of the jobs starts, what would stop one of them or of those they need first."""
    from dalle.training import fit, ladder

    configs: list[dict] = []
    for config, overrides in jobs:
        if config["preflight"]:  # trains nothing that others could need
            continue
        for stage, run in fit.missing_runs(config, [Path(c["paths"]["run"]) for c in configs]).items():
            with hydra.initialize_config_dir(CONF, version_base="1.3"):
                first: Any = hydra.compose("train", upstream(overrides, stage, run))
            configs.append(OmegaConf.to_container(first, resolve=True))  # pyright: ignore[reportArgumentType]
        configs.append(config)
    ladder.check(configs)


def run_job(overrides: list[str], lock: int | None = None) -> None:
    if code := call([sys.executable, __file__, *overrides], lock):
        sys.exit(code)


def sweep(jobs: list[tuple[dict, list[str]]], launcher: list[str]) -> int:
    from dalle.launch import sweeps

    about = jobs[0][0]["sweep"]
    made = [
        sweeps.Job(safe_path(c["paths"]["run"]), [sys.executable, __file__, *a], c["resume"], c["overwrite"])
        for c, a in jobs
    ]
    way = (lambda waiting: launch(waiting, launcher)) if launcher else None
    return sweeps.sweep(made, Path(about["folder"]), about["metric"], way)


def search(config: dict, overrides: list[str]) -> int:
    from dalle.instantiate import instantiate

    command = [sys.executable, __file__, *overrides]
    return instantiate(config["search"], "search").run(
        Path(config["paths"]["run"]), command, config["overwrite"]
    )


def launch(jobs: list[Any], launcher: list[str]) -> list[str]:
    """Has jobs done by one of Hydra's launchers, in parallel or on a cluster, and gives their states.

    Hydra itself would have the jobs put together over there, too: nobody would know which are finished
    already, or what came of them.
    """

    def work(_: DictConfig) -> str:
        from dalle.launch import sweeps

        return sweeps.perform(jobs[HydraConfig.get().job.num])

    overrides = [job.command[2:] for job in jobs]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        settings = [*overrides[0], *launcher, "hydra.job.name=train"]
        config = hydra.compose("train", settings, return_hydra_config=True)
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        plugin = Plugins.instance().instantiate_launcher(context, work, config)
        return [job.return_value for job in plugin.launch(overrides, initial_job_idx=0)]


if __name__ == "__main__":
    entry.run(main)
