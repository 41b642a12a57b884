"""What all stages share: the norm of gradients, and what cannot be sharded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from dalle.errors import UserError
from dalle.optim.factory import OptimizerFactory
from dalle.optim.muon import Muon
from dalle.stages.base import Stage


def stage_of(net: nn.Module, **trainer: Any) -> tuple[Any, dict[str, Any]]:
    """A stage beside a picture of a trainer, and what it logs."""
    stage: Any = Stage()
    stage.net = net
    stage._trainer = SimpleNamespace(**trainer)
    logged: dict[str, Any] = {}
    stage.log = logged.__setitem__
    return stage, logged


@pytest.mark.parametrize("algorithm", ["norm", None])  # None: what a Trainer says that was not told
@pytest.mark.parametrize(("limit", "left"), [(1.0, 1.0), (None, 5.0), (10.0, 5.0)])
def test_the_norm_is_logged_as_it_was_before_clipping(limit, left, algorithm):
    net = nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    stage, logged = stage_of(net, strategy=None)
    stage.guard.marked(torch.tensor(1.0))
    stage.configure_gradient_clipping(None, limit, algorithm)
    assert float(logged["train/grad_norm"]) == pytest.approx(5.0)
    assert float(net.weight.grad.norm()) == pytest.approx(left, rel=1e-5)


def test_a_scalar_weight_cannot_be_sharded():
    net = nn.Linear(1, 1)
    settings = {"accumulate_grad_batches": 1, "gradient_clip_algorithm": "norm", "precision": "32-true"}
    stage, _ = stage_of(net, **settings, strategy=ModelParallelStrategy())
    stage.check_trainer(stage.trainer)
    net.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(UserError, match="trainer=fsdp cannot shard a network with a scalar weight"):
        stage.check_trainer(stage.trainer)


def test_muon_cannot_be_sharded():
    settings = {"accumulate_grad_batches": 1, "gradient_clip_algorithm": "norm", "precision": "32-true"}
    stage, _ = stage_of(nn.Linear(1, 1), **settings, strategy=ModelParallelStrategy())
    stage.recipe = OptimizerFactory(torch.optim.AdamW, lr=1e-3, muon_lr=1e-2)
    stage.check_trainer(stage.trainer)
    stage.recipe = OptimizerFactory(Muon, lr=1e-3, muon_lr=1e-2)
    with pytest.raises(UserError, match="optimizer=muon needs whole matrices"):
        stage.check_trainer(stage.trainer)


def test_a_fused_optimizer_is_refused_under_fp16():
    settings = {"accumulate_grad_batches": 1, "gradient_clip_algorithm": "norm", "strategy": None}
    stage, _ = stage_of(nn.Linear(1, 1), **settings, precision="16-mixed")
    for fused in (False, True):
        stage.recipe = OptimizerFactory(torch.optim.AdamW, lr=1e-3, fused=fused)
        if fused:
            with pytest.raises(UserError, match=r"optimizer\.fused=true would clip gradients"):
                stage.check_trainer(stage.trainer)
        else:
            stage.check_trainer(stage.trainer)
