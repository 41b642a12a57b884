"""Intervals: of means as in closed form, bounded where nothing varies, the same on every call."""

import math

import pytest
import torch

from dalle.metrics.intervals import Figure, around, counts, jackknife, of_mean, of_share


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    value, low, high = of_mean(values)
    error = values.std().item() / 20
    assert value == pytest.approx(values.mean().item())
    assert low == pytest.approx(value - 1.96 * error, abs=0.2 * error * 1.96)
    assert high == pytest.approx(value + 1.96 * error, abs=0.2 * error * 1.96)
    assert of_mean(values) == (value, low, high)


@pytest.mark.parametrize("of", [of_mean, of_share])
def test_what_was_not_measured_does_not_count(of):
    values = torch.tensor([1.0, math.nan, 0.0, math.nan])
    assert of(values).value == 0.5
    assert all(math.isnan(number) for number in of(values[1:2]))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_wilsons(right, n, low, high):
    share = of_share(torch.arange(n) < right)
    assert share == pytest.approx((right / n, low, high), abs=5e-5)
    mirrored = of_share((torch.arange(n) >= right).float())
    assert mirrored == pytest.approx((1 - right / n, 1 - high, 1 - low), abs=5e-5)


def test_the_interval_of_a_small_share_holds_it_as_often_as_it_says():
    """Resampling is too narrow there: 90 % of intervals, not 95."""
    draws = torch.rand(1000, 500, generator=torch.Generator().manual_seed(0)) < 0.008
    found = {n: of_share(torch.arange(500) < n) for n in draws.sum(1).unique().tolist()}
    held = [found[n].low <= 0.008 <= found[n].high for n in draws.sum(1).tolist()]
    assert sum(held) / 1000 > 0.92


def test_shares_that_are_all_the_same_have_exact_ends():
    assert of_share(torch.zeros(100))[:2] == (0.0, 0.0)
    assert of_share(torch.ones(100))[::2] == (1.0, 1.0)
    assert 0.03 < of_share(torch.zeros(100)).high < 0.04
    assert of_mean(torch.full((10,), 7.0)) == Figure(7.0, 7.0, 7.0)


def test_only_verdicts_have_a_share():
    with pytest.raises(ValueError, match="0 or 1"):
        of_share(torch.tensor([0.0, 0.5]))


def test_the_jackknife_of_a_mean_is_that_of_the_normal_law():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    groups = torch.arange(2000) % 10
    without = torch.stack([values[groups != k].mean() for k in range(10)])
    value, low, high = jackknife(values.mean().item(), without)
    assert (high - low) / 2 == pytest.approx(2.262 * values.std().item() / 2000**0.5, rel=0.4)
    assert value - low == pytest.approx(high - value)


def test_every_resample_is_as_large_as_the_whole():
    drawn = counts(30, 50)
    assert drawn.shape == (50, 30)
    assert (drawn.sum(1) == 30).all()
    assert len(drawn.unique(dim=0)) == 50


def test_around_is_symmetric():
    assert around(5.0, torch.tensor([7.0, 9.0])) == pytest.approx((5.0, 5 - 1.96 * 2**0.5, 5 + 1.96 * 2**0.5))
