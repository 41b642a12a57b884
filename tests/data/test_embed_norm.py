"""EmbedNorm: the paper's scale, and the ways there and back."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle.data.embed_norm import WHITE_FLOOR, EmbedNorm
from dalle.errors import UserError

# Ramesh et al. 2022: 17.2 at dimension 1024, so 17.2 * sqrt(D / 1024) at D.
SCALES = {64: 4.3, 128: 6.081118318204309, 512: 12.162236636408618, 768: 14.895636945092344, 1024: 17.2}


@pytest.mark.parametrize(("dim", "scale"), SCALES.items())
def test_the_papers_scale_at_any_dimension(dim, scale):
    norm = EmbedNorm("unit_times_sqrt_dim")
    assert norm.scale(dim) == pytest.approx(scale, rel=1e-12)
    encoded = norm.encode(torch.randn(4, dim) * 9)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((4,), scale))


def test_isotropic_embeddings_get_the_std_of_pixels_per_dimension():
    raw = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    assert EmbedNorm("unit_times_sqrt_dim").encode(raw).std().item() == pytest.approx(0.5375, abs=1e-3)


def test_the_scale_of_dalle2_pytorch_is_a_variance_of_1():
    encoded = EmbedNorm("unit_variance").encode(torch.randn(4, 768) * 9)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((4,), 768**0.5))  # 27.71


KINDS = ["none", "unit", "unit_times_sqrt_dim", "unit_variance", "standardized", "whitened"]


@given(st.sampled_from(KINDS), st.integers(0, 2**31))
def test_decode_gives_back_the_direction_and_for_two_kinds_the_length(kind, seed):
    raw = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    norm = EmbedNorm(kind).fit(raw)
    back = norm.decode(norm.encode(raw))
    expected = raw if kind in ("none", "standardized") else raw / raw.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(back, expected, atol=1e-5, rtol=1e-4)


def test_standardized_has_zero_mean_and_unit_variance_and_survives_a_constant_dimension():
    raw = torch.randn(500, 3) * torch.tensor([2.0, 0.1, 0.0]) + torch.tensor([5.0, -1.0, 7.0])
    encoded = EmbedNorm("standardized").fit(raw).encode(raw)
    torch.testing.assert_close(encoded.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(encoded.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


def test_whitened_makes_all_directions_equally_loud_but_those_of_noise():
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    spread = torch.tensor([1.0, 0.3, 0.1, 0.04, 1e-3, 0.0])
    raw = 9 * (torch.randn(4000, 6, generator=generator) * spread) @ turned
    norm, unit = EmbedNorm("whitened").fit(raw), raw / raw.norm(dim=1, keepdim=True)
    covariance = torch.cov(norm.encode(raw).T, correction=0)
    variances = torch.linalg.eigvalsh(torch.cov(unit.T.double(), correction=0)).flip(0)
    expected = variances / (variances + WHITE_FLOOR * variances[0])
    torch.testing.assert_close(covariance, expected.float().diag(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.encode(raw).mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    assert expected[2] > 0.9 > 0.1 > expected[4]
    assert torch.equal(norm.encode(raw * 2), norm.encode(raw))


def test_whitened_dot_products_are_those_of_unit_vectors():
    raw, text = torch.randn(30, 5) + 1, torch.randn(30, 5)
    norm = EmbedNorm("whitened").fit(raw)
    expected = torch.nn.functional.cosine_similarity(raw, text)
    torch.testing.assert_close(norm.dot(norm.encode(raw), text), expected, atol=1e-5, rtol=1e-4)


def test_what_leads_where_pictures_do_not_vary_is_left_out():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.5, 0.3, 0.0])  # of the last direction nothing is known
    raw = torch.randn(500, 4, generator=generator) * spread
    norm, start = EmbedNorm("whitened").fit(raw), torch.tensor([[1.0, 0.2, 0.1, 0.0]])
    unit = start / start.norm()
    aside = norm.shrink(start, start + torch.tensor([[0.0, 0.0, 0.0, 0.5]]))
    assert norm.encode(start + torch.tensor([[0.0, 0.0, 0.0, 0.5]])).abs().max() > 10
    assert torch.nn.functional.cosine_similarity(aside, unit).item() > 0.99
    along = torch.tensor([[0.2, 0.9, 0.1, 0.0]])
    assert torch.nn.functional.cosine_similarity(norm.shrink(start, along), along).item() > 0.99
    torch.testing.assert_close(norm.shrink(start, start), unit, atol=1e-5, rtol=1e-4)
    assert torch.equal(EmbedNorm("unit").shrink(start, along), along)


@pytest.mark.parametrize(
    ("kind", "damage", "whole"),
    [("whitened", {}, True), ("standardized", {}, True), ("unit", {}, True),
     ("whitened", {"components": None}, False), ("whitened", {"components": [[1.0] * 5] * 4}, False),
     ("whitened", {"mean": [0.0] * 4}, False), ("standardized", {"std": None}, False),
     ("standardized", {"std": [1.0] * 4 + [0.0]}, False),
     ("standardized", {"std": [float("nan")] * 5}, False), ("unit", {"mean": [0.0] * 5}, False)],
)  # fmt: skip
def test_a_state_is_whole_or_refused(kind, damage, whole):
    state = EmbedNorm(kind).fit(torch.randn(20, 5)).to_dict() | damage
    assert EmbedNorm.from_dict(state).fits(5) is whole
    assert kind == "unit" or not EmbedNorm.from_dict(state).fits(6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_survives_json_exactly(kind):
    raw = torch.randn(20, 6)
    norm = EmbedNorm(kind).fit(raw)
    again = EmbedNorm.from_dict(json.loads(json.dumps(norm.to_dict())))
    assert torch.equal(again.encode(raw), norm.encode(raw))


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(UserError, match=r"sqrt.*unit_times_sqrt_dim"):
        EmbedNorm("sqrt")


def test_standardized_refuses_to_guess():
    norm = EmbedNorm("standardized")
    assert norm.needs_fit
    with pytest.raises(UserError, match="not fitted"):
        norm.encode(torch.zeros(1, 2))


def test_what_was_measured_is_moved_to_a_device_once():
    norm = EmbedNorm("standardized").fit(torch.randn(20, 3))
    norm.encode(torch.randn(4, 3, device="meta"))
    assert norm.mean.device.type == norm.std.device.type == "meta"
