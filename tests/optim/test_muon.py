"""Muon beside torch's own, and AdamW, which does the rest of its work, beside AdamW."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dalle.optim.factory import OptimizerFactory
from dalle.optim.muon import Muon, orthogonalize


class Net(nn.Module):
    layers: Any

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Conv2d(8, 6, 3, bias=False)])
        self.head = nn.Linear(6, 5)


def recipe(**options) -> OptimizerFactory:
    return OptimizerFactory(
        Muon, **{"lr": 0.01, "muon_lr": 0.02, "weight_decay": 0.1, "warmup": 0, "decay": "constant"} | options
    )


def manual_step(optimizer, params, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def same(found: list[Any], expected: list[Any]) -> bool:
    return [id(p) for p in found] == [id(p) for p in expected]


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_orthogonalize_keeps_the_directions_and_evens_the_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    made = orthogonalize(matrices)
    inner = u.mT @ made @ vh.mT  # diagonal where directions are kept
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-4
    large = s > 0.05 * s.amax(dim=1, keepdim=True)
    assert values[large].min() > 0.6
    assert values.max() < 1.25


def test_matrices_move_as_under_torchs_muon():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((24, 16), (16, 48), (24, 16))]
    theirs = copy.deepcopy(ours)
    before = [p.detach().clone() for p in ours]
    manual_step(Muon([{"params": ours, "matrices": True}], lr=1.0, muon_lr=0.02, weight_decay=0.1), ours, 5)
    library = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    manual_step(library, theirs, 5)
    for a, b, start in zip(ours, theirs, before, strict=True):
        # torch's iterates in bf16, whose 8 bits are what is left between the two
        assert (a - b).norm() < 0.03 * (b - start).norm()


def test_a_kernel_is_a_matrix_of_its_outputs():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    for p in (kernel, matrix):
        manual_step(Muon([{"params": [p], "matrices": True}], lr=1.0, muon_lr=0.02), [p], 3)
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)


def test_the_rest_moves_as_under_adamw():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    manual_step(Muon([{"params": ours}], muon_lr=1.0, **options), ours, 5)
    manual_step(torch.optim.AdamW(theirs, **options), theirs, 5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_goes_on_from_its_state():
    torch.manual_seed(0)
    net = Net()
    straight, stopped = copy.deepcopy(net), copy.deepcopy(net)
    first, _ = recipe().build(straight, 10)
    manual_step(first, list(straight.parameters()), 2, seed=1)
    manual_step(first, list(straight.parameters()), 2, seed=2)
    before, _ = recipe().build(stopped, 10)
    manual_step(before, list(stopped.parameters()), 2, seed=1)
    after, _ = recipe().build(stopped, 10)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    manual_step(after, list(stopped.parameters()), 2, seed=2)
    for a, b in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_matrices_inside_the_network_are_muons_and_no_others():
    net = Net()
    net.layers[0].bias.requires_grad_(False)
    optimizer, schedule = recipe(warmup=1).build(net, 10)
    outer, free, inner = optimizer.param_groups
    assert same(inner["params"], [net.layers[0].weight, net.layers[1].weight])
    assert same(outer["params"], [net.embedding.weight, net.head.weight])
    assert same(free["params"], [net.head.bias])
    assert [g["matrices"] for g in optimizer.param_groups] == [False, False, True]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0, 0.1]
    assert schedule.get_last_lr() == [0.005, 0.005, 0.01]


def test_frozen_matrices_stay_out():
    net = Net()
    net.layers[1].weight.requires_grad_(False)
    optimizer, _ = recipe().build(net, 10)
    assert same(optimizer.param_groups[2]["params"], [net.layers[0].weight])
