"""Noise by seed: the same in any batch, fresh at every draw."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.diffusion.noise import per_sample

SEEDS = st.lists(st.integers(0, 2**40), min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(SEEDS, SEEDS)
def test_a_row_depends_on_its_own_seed_only(seeds, others):
    alone, among = per_sample(seeds), per_sample(others + seeds)
    assert torch.equal(alone.initial((3, 2)), among.initial((3, 2))[len(others) :])
    x = torch.empty(len(seeds), 5)
    assert torch.equal(alone(x), among(torch.empty(len(seeds) + len(others), 5))[len(others) :])


def test_draws_are_standard_normal_and_never_repeat():
    randn = per_sample(range(200))
    first, second = randn.initial((100,)), randn(torch.empty(200, 100))
    assert not torch.equal(first, second)
    both = torch.cat([first, second])
    assert both.mean().item() == pytest.approx(0, abs=0.02)
    assert both.std().item() == pytest.approx(1, abs=0.02)


def test_noise_is_like_x():
    x = torch.empty(2, 3, dtype=torch.float64)
    assert per_sample([1, 2])(x).dtype == torch.float64
    with pytest.raises(ValueError, match="2 seeds, but a batch of 3"):
        per_sample([1, 2])(torch.empty(3, 1))
