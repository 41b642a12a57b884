"""Pictures from trained stages: `python sample.py prompt="a small red circle" sampler=ddim steps=25`."""

from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from dalle.cli import entry


def main() -> None:
    configs: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path="conf", config_name="sample")
    def compose(cfg: DictConfig) -> None:
        configs.append(cfg)

    compose()
    for cfg in configs:
        from dalle.pipelines.sampling import sample  # torch: only once the configuration is right

        sample(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))


if __name__ == "__main__":
    entry.run(main)
