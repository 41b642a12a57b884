"""Figures of trained stages: `python evaluate.py name=demo sampler=ddim`; of several: `-m guidance=1,2,4`.

Hydra only puts the configuration together; what happens then is dalle.evaluation.
"""

from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dalle.cli import entry


def main() -> None:
    jobs: list[tuple[DictConfig, list[str], RunMode | None]] = []

    @hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
    def compose(cfg: DictConfig) -> None:
        jobs.append((cfg, list(HydraConfig.get().overrides.task), HydraConfig.get().mode))

    compose()
    configs: list[Any] = [OmegaConf.to_container(c, resolve=True, throw_on_missing=True) for c, _, _ in jobs]
    overrides = [given for _, given, _ in jobs]
    from dalle.evaluation import multirun  # torch: only once the configuration is right

    if jobs[0][2] == RunMode.MULTIRUN:
        multirun.sweep(__file__, configs, overrides)
    elif configs[0]["compare"]:
        multirun.compare(__file__, configs[0], overrides[0])
    else:
        multirun.one(configs[0])


if __name__ == "__main__":
    entry.run(main)
