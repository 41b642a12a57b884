"""Noise by seed: the same in any batch, fresh at every draw."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.diffusion import noise
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


@pytest.mark.parametrize("shape", [(), (5,), (37,), (64,), (3, 8, 8)])
@pytest.mark.parametrize("room", [1, 200, 2**22])
def test_drawn_ahead_it_is_the_same(shape, room, monkeypatch):
    """As in so many calls, and as each generator alone gives; what is drawn afterwards, too."""
    monkeypatch.setattr(noise, "AHEAD", room)
    ahead, usual = per_sample([3, 4]), per_sample([3, 4])
    alone = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    many = list(ahead.ahead(shape, 7))
    assert len(many) == 7
    for one in many:
        assert torch.equal(one, usual.initial(shape))
        assert torch.equal(one, torch.stack([torch.randn(shape, generator=g) for g in alone]))
    assert torch.equal(ahead.initial(shape), usual.initial(shape))
    assert list(ahead.ahead(shape, 0)) == []


def test_threads_draw_ahead_also_while_gradients_are_off():
    with torch.inference_mode():
        many = list(per_sample([3, 4]).ahead((5,), 3))
    usual = per_sample([3, 4])
    assert all(torch.equal(one, usual.initial((5,))) for one in many)


def test_noise_is_like_x():
    x = torch.empty(2, 3, dtype=torch.float64)
    assert per_sample([1, 2])(x).dtype == torch.float64
    with pytest.raises(ValueError, match="2 seeds, but a batch of 3"):
        per_sample([1, 2])(torch.empty(3, 1))
