"""The learning rate at every step, and what is decayed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dalle.optim.factory import OptimizerFactory


def recipe(**options) -> OptimizerFactory:
    return OptimizerFactory(
        torch.optim.AdamW, **({"lr": 1.0, "weight_decay": 0.0, "warmup": 0, "decay_start": 0.0} | options)
    )


def test_warmup_is_a_straight_line_that_never_is_zero():
    factor = recipe(warmup=4, decay="constant").factor
    assert [factor(step, 100) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert recipe(warmup=0, decay="constant").factor(0, 100) == 1


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, 1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2, 0]),
    ],
)
def test_falls_over_the_second_half(decay, expected):
    factor = recipe(decay=decay, decay_start=0.5).factor
    steps = [0, 40, 50, 60, 70, 80]
    assert [factor(step, 80) for step in steps[: len(expected)]] == pytest.approx(expected)


def test_falls_to_the_final_fraction_and_stays_there():
    factor = recipe(decay="linear", final=0.1).factor
    assert [factor(step, 10) for step in (0, 5, 10, 15)] == pytest.approx([1, 0.55, 0.1, 0.1])


def test_falls_only_after_the_warmup():
    factor = recipe(warmup=50, decay="linear").factor
    assert factor(49, 100) == pytest.approx(50 / 51)
    assert factor(50, 100) == 1
    assert factor(75, 100) == pytest.approx(0.5)


def test_without_an_end_nothing_falls():
    assert recipe(decay="cosine").factor(10**6, math.inf) == 1


@given(
    decay=st.sampled_from(["constant", "linear", "cosine"]), warmup=st.integers(0, 200),
    total=st.integers(1, 200), start=st.floats(0, 1), final=st.floats(0, 1), step=st.integers(0, 400),
)  # fmt: skip
def test_factors_lie_between_zero_and_one(decay, warmup, total, start, final, step):
    made = recipe(decay=decay, warmup=warmup, decay_start=start, final=final)
    assert 0 <= made.factor(step, total) <= 1
    if step >= max(warmup, start * total):
        assert made.factor(step + 1, total) <= made.factor(step, total) + 1e-12


def test_only_matrices_and_kernels_are_decayed():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2))
    net[2].weight.requires_grad_(False)
    optimizer, schedule = recipe(weight_decay=0.1, warmup=1, betas=(0.8, 0.9)).build(net, 10)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0
    assert [p is net[0].weight for p in decayed["params"]] == [True]
    assert {id(p) for p in free["params"]} == {
        id(p) for p in (net[0].bias, net[1].weight, net[1].bias, net[2].bias)
    }
    assert decayed["betas"] == (0.8, 0.9)
    assert schedule.get_last_lr() == [0.5, 0.5]


def test_a_net_without_matrices():
    optimizer, _ = recipe().build(nn.LayerNorm(3), 10)
    assert len(optimizer.param_groups) == 1


def test_options_of_another_algorithm_are_left_out():
    net = nn.Linear(2, 2)
    tuned = {"betas": (0.5, 0.9), "momentum": 0.9}
    sgd, _ = OptimizerFactory(torch.optim.SGD, lr=0.1, **tuned).build(net, 10)
    adam, _ = OptimizerFactory(torch.optim.AdamW, lr=0.1, **tuned).build(net, 10)
    assert sgd.defaults["momentum"] == 0.9
    assert adam.defaults["betas"] == (0.5, 0.9)


def test_another_pace_is_that_of_all_step_sizes_and_averages():
    made = recipe(lr=0.4, muon_lr=0.8, momentum=0.81, betas=(0.64, 0.25), eps=1e-3, weight_decay=0.1)
    half = made.scale_lr(0.5, 0.5)
    assert (half.lr, half.options["muon_lr"], half.options["momentum"]) == pytest.approx((0.2, 0.4, 0.9))
    assert half.options["betas"] == pytest.approx([0.8, 0.5])
    assert (half.options["eps"], half.weight_decay) == (1e-3, 0.1)
    assert (made.lr, made.options["betas"]) == (0.4, (0.64, 0.25))
    assert made.scale_lr(2).options["momentum"] == 0.81


def test_a_whole_number_among_the_betas():
    """torch itself refuses 0 beside 0.99."""
    optimizer, _ = recipe(betas=[0, 0.99]).build(nn.Linear(2, 2), 10)
    assert optimizer.param_groups[0]["betas"] == (0.0, 0.99)
