"""Trains one stage: `train.py model=prior data=folder data.root=PICTURES`; several: `-m model=clip,prior`.

Hydra only puts the configuration together, from conf/train.yaml and the command line, and all of it before
any work starts; what happens then is dalle.training, and dalle.sweeps for the jobs of `-m hydra=sweep`.
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

from dalle import cli
from dalle.errors import UserError
from dalle.processes import call, fitting, is_main_process, only_one

# What is about one stage alone; everything else also holds for those that have to be trained before it.
OWN = ("model", "optimizer", "sampler", "callbacks", "datamodule", "batch_size", "stage", "debug", "resume",
       "overwrite", "paths.run", "hydra")  # fmt: skip


def main() -> None:
    composed: list[tuple[DictConfig, list[str], RunMode | None]] = []
    launcher = [a for a in sys.argv[1:] if a.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))]
    sys.argv = [a for a in sys.argv if a not in launcher]  # all jobs are put together here: see `launch`

    @hydra.main(version_base="1.3", config_path="conf", config_name="train")
    def compose(cfg: DictConfig) -> None:
        cfg.paths.run = str(cfg.paths.run)  # may name the job, which only Hydra knows
        composed.append((cfg, list(HydraConfig.get().overrides.task), HydraConfig.get().mode))

    compose()
    jobs: list[Any] = []
    for cfg, overrides, mode in composed:
        config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        run = [f"paths.run='{fitting(config['paths']['run'])}'"] if mode == RunMode.MULTIRUN else []
        jobs.append((config, [*overrides, *run]))
    several = any(mode == RunMode.MULTIRUN for _, _, mode in composed)
    special = {"sweep", "search"} & jobs[0][0].keys() if jobs and jobs[0][0]["preflight"] is False else set()
    if launcher and special != {"sweep"}:
        raise UserError("hydra/launcher is for -m hydra=sweep: other jobs build upon one another")
    if "search" in special:
        sys.exit(max(search(*job) for job in jobs))
    if "sweep" in special and several:
        sys.exit(sweep(jobs, launcher))
    for config, overrides in jobs:
        run_job(overrides) if several else train(config, overrides)


def train(config: dict, overrides: list[str]) -> None:
    from dalle import training  # torch and lightning: only once there is something to train

    if not training.may_start(config):
        return
    missing = training.missing_runs(config) if is_main_process() else {}
    for stage, run in missing.items():
        with only_one(run.path) as lock:  # several jobs of a sweep may miss the same
            if run.finished:
                continue
            print(f"{run} holds no finished {stage}: training it first", flush=True)
            shared = [o for o in overrides if not o.lstrip("+~").startswith(OWN)]
            upstream = [
                f"model={model_for(stage, overrides)}",
                f"paths.run='{run}'",
                f"resume={str(run.occupied).lower()}",
            ]
            run_job([*shared, *upstream], lock)
    training.train(config)


def model_for(stage: str, overrides: list[str]) -> str:
    """The model to train for a stage that is missing: of a paper's size where it is for a paper's."""
    asked = [o.partition("=")[2] for o in overrides if o.startswith("model=")]
    paper = Path(__file__).with_name("conf") / "model" / f"{stage}_paper.yaml"
    return paper.stem if asked and asked[-1].endswith(("_paper", "_1b")) and paper.exists() else stage


def run_job(overrides: list[str], lock: int | None = None) -> None:
    if code := call([sys.executable, __file__, *overrides], lock):
        sys.exit(code)


def sweep(jobs: list[tuple[dict, list[str]]], launcher: list[str]) -> int:
    from dalle import sweeps

    about = jobs[0][0]["sweep"]
    made = [
        sweeps.Job(fitting(c["paths"]["run"]), [sys.executable, __file__, *a], c["resume"], c["overwrite"])
        for c, a in jobs
    ]
    way = (lambda waiting: launch(waiting, launcher)) if launcher else None
    return sweeps.sweep(made, Path(about["folder"]), about["metric"], way)


def search(config: dict, overrides: list[str]) -> int:
    from dalle.build import build

    command = [sys.executable, __file__, *overrides]
    return build(config["search"], "search").run(Path(config["paths"]["run"]), command, config["overwrite"])


def launch(jobs: list[Any], launcher: list[str]) -> list[str]:
    """Has jobs done by one of Hydra's launchers, in parallel or on a cluster, and gives their states.

    Hydra itself would have the jobs put together over there, too: nobody would know which are finished
    already, or what came of them.
    """

    def work(_: DictConfig) -> str:
        from dalle import sweeps

        return sweeps.perform(jobs[HydraConfig.get().job.num])

    overrides = [job.command[2:] for job in jobs]
    with hydra.initialize_config_dir(str(Path(__file__).resolve().parent / "conf"), version_base="1.3"):
        settings = [*overrides[0], *launcher, "hydra.job.name=train"]
        config = hydra.compose("train", settings, return_hydra_config=True)
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        plugin = Plugins.instance().instantiate_launcher(context, work, config)
        return [job.return_value for job in plugin.launch(overrides, initial_job_idx=0)]


if __name__ == "__main__":
    cli.run(main)
