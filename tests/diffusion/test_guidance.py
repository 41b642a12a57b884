"""Guidance as an affine sum of denoisers in one batch, thresholding, rescaling."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.guidance import (
    dynamic_threshold,
    guide,
    match_spread,
    one_scale,
    stack,
    threshold,
    two_scales,
)
from dalle.diffusion.samplers import ddim
from dalle.diffusion.schedule import Schedule
from dalle.errors import UserError

KNOWN = json.loads(Path(__file__).with_name("known_values.json").read_text())


class Model:
    """x0 = its image + its text condition (with a curve in x), counting the rows it is given."""

    def __init__(self):
        self.rows = []

    def __call__(self, x: Tensor, t: Tensor, image: Tensor, text: Tensor, cache=None) -> Tensor:
        assert t.shape == image.shape == text.shape == (len(x),)
        self.rows.append(len(x))
        return torch.tanh(x) + (image + text + t)[:, None]


def condition(image: float, text: float, rows: int = 2) -> dict[str, Tensor]:
    return {"image": torch.full((rows,), image), "text": torch.full((rows,), text)}


NULL, IMAGE, BOTH = condition(0.0, 0.0), condition(1.0, 0.0), condition(1.0, 0.1)
X, T = torch.randn(2, 3), torch.tensor([0.2, 0.8])


def test_one_scale_is_u_plus_s_times_c_minus_u_in_one_call():
    model = Model()
    out = guide(model, one_scale(BOTH, NULL, 3.0))(X, T)
    assert model.rows == [4]
    u, c = model(X, T, **NULL), model(X, T, **BOTH)
    torch.testing.assert_close(out, u + 3 * (c - u))


def test_two_scales_for_image_and_text_in_one_call():
    model = Model()
    out = guide(model, two_scales(BOTH, IMAGE, NULL, image_scale=2.0, text_scale=5.0))(X, T)
    assert model.rows == [6]
    u, i, both = (model(X, T, **cond) for cond in (NULL, IMAGE, BOTH))
    torch.testing.assert_close(out, u + 2 * (i - u) + 5 * (both - i))


@pytest.mark.parametrize(
    ("image_scale", "text_scale", "rows"), [(1, 1, 2), (3, 3, 4), (1, 4, 4), (2, 0, 4), (0, 0, 2)]
)
def test_branches_that_do_not_count_are_not_evaluated(image_scale, text_scale, rows):
    model = Model()
    guide(model, two_scales(BOTH, IMAGE, NULL, image_scale, text_scale))(X, T)
    assert model.rows == [rows]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_scale_1_is_the_condition_exactly(seed, rescale):
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
    out = guide(Model(), one_scale(BOTH, NULL, 1.0), rescale=rescale)(x, T)
    assert torch.equal(out, Model()(x, T, **BOTH))


def test_weights_must_add_up():
    with pytest.raises(ValueError, match="add up to 1"):
        guide(Model(), [(0.5, NULL), (0.6, BOTH)])


def test_guided_sampling_between_gaussians_of_equal_spread():
    """It acts as the Gaussian with the extrapolated mean."""
    known, schedule = KNOWN["cfg_equal_variance"], Schedule("cosine")

    def denoise(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        return mean + alpha * known["s"] ** 2 / ((alpha * known["s"]) ** 2 + sigma**2) * (x - alpha * mean)

    cond, null = ({"mean": torch.full((2,), known[k], dtype=torch.float64)} for k in ("m_cond", "m_uncond"))
    guided = guide(denoise, one_scale(cond, null, known["scale"]))
    out = ddim(guided, torch.tensor([0.0, 1.0], dtype=torch.float64), schedule.levels(50, "strided"))
    expected = known["ddim_eta0_strided50_cosine"]
    assert out[0].item() == pytest.approx(expected["mean"], rel=1e-9)
    assert (out[1] - out[0]).item() ** 2 == pytest.approx(expected["var"], rel=1e-9)
    assert out[0].item() == pytest.approx(known["effective_mean"], abs=1e-3)


def test_learned_variance_comes_from_the_full_condition():
    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return torch.cat([x, c[:, None].expand_as(x)], dim=1)

    denoiser = Denoiser(Net(), Schedule("cosine"), "eps", learned_variance=True)
    branches = one_scale({"c": torch.ones(2)}, {"c": -torch.ones(2)}, 2.0)
    for rescale in (0.0, 0.7):
        guided = guide(denoiser.with_variance, branches, rescale, denoiser)
        x0, fraction = threshold(guided, "static")(X, T)
        assert fraction is not None
        assert (fraction == 1).all()
        assert x0.abs().max() <= 1


def test_rescale():
    model = Model()
    x = torch.randn(2, 500)
    c, g = model(x, T, **BOTH), 3 * torch.randn(2, 500)
    full = match_spread(g, c, 1.0)
    torch.testing.assert_close(full.std(1), c.std(1))
    torch.testing.assert_close(match_spread(g, c, 0.7), 0.7 * full + 0.3 * g)

    def scaled(x: Tensor, t: Tensor, by: Tensor) -> Tensor:
        return x * by[:, None]

    guided = guide(scaled, one_scale({"by": torch.full((2,), 2.0)}, {"by": torch.ones(2)}, 4.0), rescale=1.0)
    torch.testing.assert_close(guided(x, T), 2 * x)  # (1 + 4) x, brought back to the spread of 2 x
    assert match_spread(torch.zeros(2, 4), torch.ones(2, 4), 1.0).isfinite().all()


@pytest.mark.parametrize(
    ("name", "prediction"), [("cosine", "eps"), ("cosine", "v"), ("cosine", "x0"), ("flow", "velocity")]
)
def test_rescale_is_that_of_diffusers_for_every_prediction(name, prediction):
    """It acts on what the network predicts; the same on x0 would be another picture."""

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return torch.tanh(x + c[:, None, None, None]) * (1 + c[:, None, None, None])

    denoiser = Denoiser(Net(), Schedule(name), prediction)
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.7])
    cond, null = {"c": torch.ones(2)}, {"c": torch.zeros(2)}
    told, untold = denoiser.net(x, t, **cond), denoiser.net(x, t, **null)
    theirs = rescale_noise_cfg(untold + 3.0 * (told - untold), told, guidance_rescale=0.7)
    ours = guide(denoiser, one_scale(cond, null, 3.0), 0.7, denoiser)(x, t)
    torch.testing.assert_close(ours, denoiser.x0_of(x, theirs, t), rtol=1e-4, atol=1e-4)
    of_x0 = guide(denoiser, one_scale(cond, null, 3.0), 0.7)(x, t)
    assert (prediction == "x0") == torch.allclose(ours, of_x0, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- thresholds


def test_dynamic_threshold():
    known = KNOWN["dynamic_threshold"]
    x = torch.tensor([known["input"]], dtype=torch.float64)
    for key, of in (("p=0.9", x), ("p=0.995", x), ("p=0.9_small_input_(x/4)", x / 4)):
        percentile = float(key.removeprefix("p=").split("_")[0])
        out = dynamic_threshold(of, percentile)
        expected = torch.tensor([known[key]["out"]], dtype=torch.float64)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.floats(0.5, 1.0), st.integers(0, 2**31))
def test_dynamic_threshold_takes_the_interpolated_quantile(size, percentile, seed):
    x = 3 * torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s = torch.quantile(x.abs(), percentile, dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(dynamic_threshold(x, percentile), x.clamp(-s, s) / s)


def test_dynamic_threshold_is_that_of_diffusers():
    x = 2 * torch.randn(2, 3, 8, 8)
    theirs = diffusers.DDIMScheduler(thresholding=True, sample_max_value=1e9)
    torch.testing.assert_close(dynamic_threshold(x), theirs._threshold_sample(x))


def test_dynamic_threshold_of_a_large_picture():
    x = torch.zeros(1, 2**24 + 1)  # more numbers than torch.quantile takes
    x[:, : 2**22] = 4.0
    assert dynamic_threshold(x, 0.9)[0, 0] == 1


def test_thresholds_of_a_denoiser():
    def doubled(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        return 2 * x + shift

    x, t = torch.tensor([[0.2, -0.9]]), torch.ones(1)
    assert threshold(doubled, "none") is doubled
    torch.testing.assert_close(threshold(doubled, "static")(x, t), torch.tensor([[0.4, -1.0]]))
    torch.testing.assert_close(threshold(doubled, "static")(x, t, shift=0.2), torch.tensor([[0.6, -1.0]]))
    torch.testing.assert_close(threshold(doubled, "dynamic", 1.0)(x, t), torch.tensor([[0.4 / 1.8, -1.0]]))
    with pytest.raises(UserError, match="choose one of none, static, dynamic"):
        threshold(doubled, "soft")


# ---------------------------------------------------------------- stacking conditions


def test_nests_of_conditions_are_stacked():
    keys = [(torch.zeros(2, 4), torch.zeros(2, 4)), (torch.zeros(2, 4), torch.zeros(2, 4))]
    trees = [
        {"cache": keys, "mask": None, "flag": True, "text": torch.full((2,), float(k))} for k in range(3)
    ]
    stacked = stack(trees)
    assert stacked["mask"] is None
    assert stacked["flag"] is True
    assert stacked["text"].tolist() == [0, 0, 1, 1, 2, 2]
    assert isinstance(stacked["cache"], list)
    assert isinstance(stacked["cache"][0], tuple)
    assert all(part.shape == (6, 4) for pair in stacked["cache"] for part in pair)


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ({"a": torch.ones(1)}, {"a": None}, "differ in kind"),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, "differ in keys"),
        ({"a": 1}, {"a": 2}, "no tensor"),
    ],
)
def test_conditions_that_do_not_stack(one, other, says):
    with pytest.raises(ValueError, match=says):
        stack([one, other])
