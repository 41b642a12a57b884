"""Schedules, respacing and posteriors against numbers computed elsewhere (known_values.json)."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.diffusion.schedule import SCHEDULES, Schedule, betas, even_sections, kept_indices, posterior
from dalle.errors import UserError

KNOWN = json.loads(Path(__file__).with_name("known_values.json").read_text())
DISCRETE = ("linear", "scaled_linear", "cosine", "sigmoid")


def times(values: dict, steps: int = 1000, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The times of the indices that are the keys."""
    return ((torch.tensor([int(i) for i in values], dtype=torch.float64) + 1) / steps).to(dtype)


def f64(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def close(got: torch.Tensor, values, rtol: float = 1e-9, atol: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), f64(values), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_discrete_levels_have_the_known_alpha_bar(name, dtype, rtol):
    expected = KNOWN["schedules"][name]["alpha_bar"]
    alpha, sigma = Schedule(name).alpha_sigma(times(expected, dtype=dtype))
    assert alpha.dtype == sigma.dtype == dtype
    close(alpha**2, expected.values(), rtol)
    close(sigma**2, [1 - a for a in expected.values()], max(rtol, 1e-8))


@pytest.mark.parametrize("name", DISCRETE)
def test_posterior_and_log_snr(name):
    known, schedule = KNOWN["schedules"][name], Schedule(name)
    t = times(known["beta"])
    now, before = schedule.alpha_sigma(t), schedule.alpha_sigma(t - 1e-3)
    c0, ct, beta, variance = posterior(*now, *before)
    close(c0, known["posterior_coef_x0"].values())
    close(ct, known["posterior_coef_xt"].values(), atol=1e-12)
    close(beta, known["beta"].values())
    close(betas(name, 1000)[(t * 1000).round().long() - 1], known["beta"].values())
    close(variance, known["posterior_variance"].values())
    close((now[0] / now[1]).log(), known["half_log_snr_lambda"].values())
    below = (schedule.alpha_sigma(torch.arange(1, 1001).double() / 1000)[0] ** 2 < 0.5).nonzero()[0].item()
    assert below == known["first_index_with_ab_below_half"]


@pytest.mark.parametrize("key", KNOWN["schedules_other_T"])
def test_other_numbers_of_levels(key):
    name, steps, _ = key.split("_", 2)
    expected = KNOWN["schedules_other_T"][key]
    alpha, _ = Schedule(name, steps=int(steps[1:])).alpha_sigma(times(expected, int(steps[1:])))
    close(alpha**2, expected.values())


@pytest.mark.parametrize("name", KNOWN["zero_terminal_snr"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_terminal_snr(name, dtype):
    expected = KNOWN["zero_terminal_snr"][name]["alpha_bar"]
    schedule = Schedule(name, zero_terminal_snr=True)
    alpha, sigma = schedule.alpha_sigma(times(expected, dtype=dtype))
    close(alpha**2, expected.values(), 1e-9 if dtype == torch.float64 else 1e-6)
    assert alpha[-1] == 0
    assert sigma[-1] == 1
    assert schedule.ends_in_pure_noise


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(SCHEDULES), st.integers(2, 300), st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_noise_grows_with_time(name, steps, moments):
    schedule = Schedule(name, steps=steps)
    t = f64(sorted([0.0, *moments, 1.0]))
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() <= 0).all()
    assert (sigma.diff() >= 0).all()
    if schedule.variance_preserving:
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    else:
        torch.testing.assert_close(alpha + sigma, torch.ones_like(t))


def test_log_alpha_is_linear_between_levels():
    alpha, _ = Schedule("cosine").alpha_sigma(f64([0.499, 0.4993, 0.5]))
    torch.testing.assert_close(
        alpha[1].log(), 0.7 * alpha[0].log() + 0.3 * alpha[2].log(), rtol=1e-12, atol=0
    )


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(SCHEDULES), st.booleans(), st.floats(-2.5, 8))
def test_t_at_inverts_log_snr(name, zero_terminal_snr, logsnr):
    schedule = Schedule(name, zero_terminal_snr=zero_terminal_snr)
    alpha, sigma = schedule.alpha_sigma(schedule.t_at(f64([logsnr])))
    torch.testing.assert_close((alpha / sigma).log(), f64([logsnr]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_alpha_sigma_keeps_the_shape_of_t(shape):
    alpha, sigma = Schedule("cosine").alpha_sigma(torch.rand(shape))
    assert alpha.shape == sigma.shape == shape


SPACED = [("strided", n) for n in (7, 10, 15, 25, 27, 50, 64)] + [("leading", n) for n in (10, 15, 27, 50)]


@pytest.mark.parametrize(("spacing", "steps"), [*SPACED, ("trailing", 10), ("fast27", 27)])
def test_respacing(spacing, steps):
    key = {"strided": f"strided_{steps}", "leading": f"ddim{steps}", "trailing": f"hf_trailing_{steps}"}
    expected = sorted(KNOWN["respacing"][key.get(spacing, spacing)])
    assert kept_indices(1000, steps, spacing) == expected
    levels = Schedule("cosine").levels(steps, spacing)
    assert len(levels) == steps
    torch.testing.assert_close(levels.t, f64([*((i + 1) / 1000 for i in reversed(expected)), 0.0]))


@pytest.mark.parametrize(
    ("key", "spacing", "steps"),
    [("hf_trailing_50", "trailing", 50), ("hf_trailing_27", "trailing", 27), ("strided_250", "strided", 250)],
)
def test_long_respacing_at_both_ends(key, spacing, steps):
    expected = sorted(KNOWN["respacing"][f"{key}_head_tail"])
    kept = kept_indices(1000, steps, spacing)
    assert len(kept) == steps
    assert sorted(set(kept[: len(expected) // 2] + kept[-len(expected) // 2 :])) == expected


def test_sections():
    assert even_sections(300, [10, 15, 20]) == KNOWN["respacing"]["docstring_300_10_15_20"]
    assert kept_indices(300, 45, "10,15,20") == KNOWN["respacing"]["docstring_300_10_15_20"]
    assert kept_indices(1000, 1, "strided") == [999]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_respaced_levels_make_the_known_betas(name):
    levels = Schedule(name).levels(10, "strided")
    known = KNOWN["respaced_betas_strided_10"][name]
    close(levels.alpha[:-1].flip(0) ** 2, known["alpha_bar"])
    beta = [posterior(now.alpha, now.sigma, to.alpha, to.sigma)[2] for _, now, to in levels.steps()]
    close(f64(beta[::-1]), known["beta"])


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(SCHEDULES),
    st.booleans(),
    st.sampled_from(["strided", "trailing", "uniform", "logsnr", "edm", None]),
    st.integers(1, 60),
)
def test_levels_lose_noise_and_end_clean(name, zero_terminal_snr, spacing, steps):
    levels = Schedule(name, zero_terminal_snr=zero_terminal_snr).levels(steps, spacing)
    assert len(levels) == steps
    assert levels.t.shape == (steps + 1,)
    assert (levels.t.diff() < 0).all()
    assert (levels.sigma.diff() < 0).all()
    assert (levels.t[-1], levels.alpha[-1], levels.sigma[-1]) == (0, 1, 0)


def test_edm_levels_are_the_known_sigmas():
    levels = Schedule("linear").levels(18, "edm")
    close(levels.sigma / levels.alpha, KNOWN["edm"]["sigmas_18"], atol=1e-15)
    short = Schedule("scaled_linear").levels(18, "edm")  # this schedule ends before sigma/alpha = 80
    assert short.t[0] == 1


def test_logsnr_levels_are_evenly_spaced_above_the_floor():
    levels = Schedule("cosine").levels(20, "logsnr")
    logsnr = (levels.alpha / levels.sigma)[:-1].log()
    torch.testing.assert_close(logsnr.diff(), logsnr.diff()[:1].expand(19), rtol=1e-6, atol=0)
    assert logsnr[0] == pytest.approx(-5.1)
    assert logsnr[-1] == pytest.approx(KNOWN["schedules"]["cosine"]["half_log_snr_lambda"]["0"])


@pytest.mark.parametrize(
    ("steps", "spacing", "says"),
    [
        (0, "strided", "at least 1"),
        (1001, "strided", "only 1000"),
        (1001, "trailing", "only 1000"),
        (64, "leading", "spacing=strided"),
        (50, "fast27", "set steps=27"),
        (50, "10,10,3,2,2", "set steps=27"),
        (10, "even", "unknown spacing 'even'"),
        (3, "3,0", "cannot keep 0"),
        (501, "501,0", "cannot keep 501"),
    ],
)
def test_impossible_levels(steps, spacing, says):
    with pytest.raises(UserError, match=says):
        Schedule("cosine").levels(steps, spacing)


def test_impossible_schedules():
    with pytest.raises(UserError, match="choose one of linear"):
        Schedule("cubic")
    with pytest.raises(UserError, match="at least 2"):
        Schedule("cosine", steps=1)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_alpha_sigma_compiles_to_one_graph(name):
    schedule, t = Schedule(name), torch.rand(8)
    compiled = torch.compile(schedule.alpha_sigma, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(t), schedule.alpha_sigma(t), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_shift_multiplies_the_ratio_of_noise_to_signal(name):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    plain, shifted = Schedule(name), Schedule(name, shift=3.0)
    # VP tables are read between levels log-linearly in alpha, exactly so only on the levels themselves
    on_levels = (t * 1000).round() / 1000
    (a, s), (b, r) = plain.alpha_sigma(on_levels), shifted.alpha_sigma(on_levels)
    torch.testing.assert_close(r / b, 3.0 * s / a)
    torch.testing.assert_close(shifted.t_at((b / r).log()), on_levels)


def test_tables_are_the_hosts_whatever_device_a_network_is_made_on():
    with torch.device("meta"):
        made = Schedule("cosine", 50)
    torch.testing.assert_close(made.levels(5).alpha, Schedule("cosine", 50).levels(5).alpha, rtol=0, atol=0)
