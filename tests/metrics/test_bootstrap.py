"""Intervals: of means as in closed form, bounded where nothing varies, the same on every call."""

import math

import pytest
import torch

from dalle.metrics.bootstrap import Figure, around, counts, of_mean


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    value, low, high = of_mean(values)
    error = values.std().item() / 20
    assert value == pytest.approx(values.mean().item())
    assert low == pytest.approx(value - 1.96 * error, abs=0.2 * error * 1.96)
    assert high == pytest.approx(value + 1.96 * error, abs=0.2 * error * 1.96)
    assert of_mean(values) == (value, low, high)


def test_what_was_not_measured_does_not_count():
    values = torch.tensor([1.0, math.nan, 0.0, math.nan])
    assert of_mean(values).value == 0.5
    assert all(math.isnan(number) for number in of_mean(values[1:2]))


def test_verdicts_that_are_all_the_same_are_bounded_by_the_rule_of_three():
    assert of_mean(torch.zeros(100)) == Figure(0.0, 0.0, 0.03)
    assert of_mean(torch.ones(100)) == Figure(1.0, 0.97, 1.0)
    assert of_mean(torch.ones(2)) == Figure(1.0, 0.0, 1.0)
    assert of_mean(torch.full((10,), 7.0)) == Figure(7.0, 7.0, 7.0)


def test_every_resample_is_as_large_as_the_whole():
    drawn = counts(30, 50)
    assert drawn.shape == (50, 30)
    assert (drawn.sum(1) == 30).all()
    assert len(drawn.unique(dim=0)) == 50


def test_around_is_symmetric():
    assert around(5.0, torch.tensor([7.0, 9.0])) == pytest.approx((5.0, 5 - 1.96 * 2**0.5, 5 + 1.96 * 2**0.5))
