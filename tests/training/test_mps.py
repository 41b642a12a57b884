"""Apple's GPUs have no float64: a training step of every stage, on the meta device in the place of one."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import untrained
from tiny import NETS, configure
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle import machine
from dalle.run_dir import Run
from dalle.training import fit
from dalle.training.checks import build_stage


class NoFloat64(TorchDispatchMode):
    """Refuses numbers of 64 bits there, as Apple's GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.dtype == torch.float64:
                raise TypeError(f"{func} makes float64")
        return made


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    for model in ("clip", "dvae"):
        untrained(model, logs)
    return logs


def step_on_meta(model: str, logs: Path) -> None:
    own = ("model.disc_start=0", "model.net.levels=[8,4]") if model == "vqgan" else ()
    config = configure(model, logs, f"paths.run='{logs / 'run' / model}'", *own)
    datamodule, _ = fit.prepare(config, Run(Path(config["paths"]["run"])))
    datamodule.prepare_data()
    datamodule.setup("fit")
    batch = datamodule.on_after_batch_transfer(next(iter(datamodule.train_dataloader())), 0)
    batch = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    stage: Any = build_stage(config["model"]).to("meta")
    stage.norm = getattr(datamodule, "norm", None)
    with NoFloat64(), torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on that device
        loss = stage.step(batch)["loss"]
        loss.backward()
    assert loss.is_meta


@pytest.mark.parametrize("model", NETS)
def test_no_stage_needs_float64(model, logs, monkeypatch):
    monkeypatch.setattr(machine, "WITHOUT_FLOAT64", {"meta"})
    step_on_meta(model, logs)


def test_what_needs_it_is_noticed(logs):
    with pytest.raises(TypeError, match="makes float64"):
        step_on_meta("prior", logs)


def test_fused_optimizers_are_there():
    """Presets ask for them."""
    assert "mps" in _get_fused_kernels_supported_devices()
