"""Trains one stage: `train.py model=prior data=folder data.root=PICTURES`; several: `-m model=clip,prior`.

Hydra only puts the configuration together, from conf/train.yaml and the command line, and all of it before
any work starts; what happens then is dalle.training.
"""

import signal
import subprocess
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dalle import cli

# What is about one stage alone; everything else also holds for those that have to be trained before it.
OWN = ("model", "optimizer", "sampler", "callbacks", "datamodule", "batch_size", "stage", "debug", "resume",
       "overwrite", "paths.run", "hydra")  # fmt: skip


def main() -> None:
    jobs: list[tuple[DictConfig, list[str], RunMode | None]] = []

    @hydra.main(version_base="1.3", config_path="conf", config_name="train")
    def compose(cfg: DictConfig) -> None:
        cfg.paths.run = str(cfg.paths.run)  # may name the job, which only Hydra knows
        jobs.append((cfg, list(HydraConfig.get().overrides.task), HydraConfig.get().mode))

    compose()
    configs: list[Any] = [OmegaConf.to_container(c, resolve=True, throw_on_missing=True) for c, _, _ in jobs]
    for config, (_, overrides, mode) in zip(configs, jobs, strict=True):
        if mode == RunMode.MULTIRUN:
            run_job([*overrides, f"paths.run='{config['paths']['run']}'"])
        else:
            train(config, overrides)


def train(config: dict, overrides: list[str]) -> None:
    from dalle import training  # torch and lightning: only once there is something to train

    if not training.may_start(config):
        return
    missing = training.missing_runs(config) if training.is_main_process() else {}
    for stage, run in missing.items():
        print(f"{run} holds no finished {stage}: training it first", flush=True)
        shared = [o for o in overrides if not o.lstrip("+~").startswith(OWN)]
        run_job([*shared, f"model={stage}", f"paths.run='{run}'", f"resume={str(run.occupied).lower()}"])
    training.train(config)


def run_job(overrides: list[str]) -> None:
    """Runs this script in a process of its own: no process group or environment leaks into the next job."""
    job = subprocess.Popen([sys.executable, __file__, *overrides])
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the job itself: wait till it has saved
    signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    code = job.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    cli.run(main)
