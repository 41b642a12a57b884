"""Trains one stage: `python train.py model=prior data=folder data.root=PICTURES`; several in order: `-m model=clip,prior`.

The configuration is put together from conf/train.yaml; what happens then is dalle.training.
"""

import os
import signal
import subprocess
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dalle import cli, training

# What is about one stage alone; everything else also holds for a CLIP that has to be trained first.
OWN = ("model", "optimizer", "sampler", "datamodule", "batch_size", "stage", "resume", "overwrite", "paths.run", "hydra")


def run_job(overrides: list[str]) -> None:
    """Runs this script in a process of its own: no process group, environment or memory leaks into the next job."""
    job = subprocess.Popen([sys.executable, __file__, *overrides])
    previous = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the job itself; wait till it has saved
    code = job.wait()
    signal.signal(signal.SIGINT, previous)
    if code:
        sys.exit(code)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job([*overrides, f"paths.run='{cfg.paths.run}'"])
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if training.is_main_process() and (missing := training.missing_clip(config)):
        print(f"{missing}: training it first", flush=True)
        shared = [o for o in overrides if not o.lstrip("+~").startswith(OWN)]
        resume = ["resume=true"] if os.path.exists(missing.checkpoint) else []
        run_job([*shared, "model=clip", f"paths.run='{missing.path}'", *resume])
    training.train(config)


if __name__ == "__main__":
    cli.run(main)
