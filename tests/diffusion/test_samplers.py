"""Samplers on Gaussian data, where every step is affine and the samples' law exact; parity with diffusers."""

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.noise import per_sample
from dalle.diffusion.samplers import METHODS, Sampler, ddim, ddim_invert, ddpm, dpmpp, heun
from dalle.diffusion.schedule import Levels, Schedule, betas
from dalle.errors import UserError

KNOWN = json.loads(Path(__file__).with_name("known_values.json").read_text())
CASES = [
    (case, name, int(key.removeprefix("steps_")))
    for case, known in KNOWN["gaussian_data"].items()
    for name, runs in known["samplers"].items()
    for key in runs
    if key.startswith("steps_")
]


def exact(schedule: Schedule, mean: float, std: float):
    """The perfect denoiser for data N(mean, std^2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


class UnitNoise:
    """The k-th draw is 1 in row k + 2 and 0 elsewhere: row k + 2 of the result shows what that draw does."""

    def __init__(self):
        self.draws = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.draws += 1
        return torch.nn.functional.one_hot(torch.tensor(self.draws + 1), len(x)).to(x)


def affine(sampler, denoise, levels: Levels, **options) -> tuple[float, float, float]:
    """Sampling as x -> gain x + offset + N(0, noise): (gain, offset, noise)."""
    x = torch.zeros(len(levels) + 2, dtype=torch.float64)
    x[1] = 1
    out = sampler(denoise, x, levels, randn=UnitNoise(), **options)
    noise = (out[2:] - out[0]).square().sum()
    return (out[1] - out[0]).item(), out[0].item(), noise.item()


def check(run: tuple[float, float, float], expected: dict) -> None:
    """Started from N(0, 1)."""
    gain, offset, noise = run
    assert offset == pytest.approx(expected["mean"], abs=1e-8)
    assert gain**2 + noise == pytest.approx(expected["var"], rel=1e-8)


@pytest.mark.parametrize(("case", "name", "steps"), CASES)
def test_mean_and_variance_on_gaussian_data(case, name, steps):
    data, schedule = KNOWN["gaussian_data"][case], Schedule(name)
    known = data["samplers"][name][f"steps_{steps}"]
    denoise, levels = exact(schedule, data["m"], data["s"]), schedule.levels(steps, "strided")
    for eta in (0, 0.5, 1):
        check(affine(ddim, denoise, levels, eta=eta), known[f"ddim_eta{eta}"])
    for variance in ("small", "large"):
        check(affine(ddpm, denoise, levels, variance=variance), known[f"ddpm_fixed_{variance}"])
    eps_square = [s**2 / (a**2 * data["s"] ** 2 + s**2) for _, (_, a, s), _ in levels.steps()]
    analytic = affine(ddpm, denoise, levels, variance="analytic", eps_square=eps_square)
    check(analytic, known["ddpm_optimal"])
    check(affine(dpmpp, denoise, levels), known["dpmpp_2m"])


@pytest.mark.parametrize("case", "ABC")
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_dpmpp_on_levels_uniform_in_log_snr(case, name):
    data, schedule = KNOWN["gaussian_data"][case], Schedule(name)
    for key, expected in data["samplers"][name]["dpmpp_2m_lambda_floor_-5.1"].items():
        levels = schedule.levels(int(key.removeprefix("steps_")), "logsnr")
        gain, offset, noise = affine(dpmpp, exact(schedule, data["m"], data["s"]), levels)
        assert gain == pytest.approx(expected["gain_P"], rel=1e-8)
        assert offset == pytest.approx(expected["offset_Q"], rel=1e-8)
        assert noise == 0


def test_analytic_variance_is_exact():
    """From the true marginal, with noise on the last step too, any number of steps gives the data's law."""
    known, schedule = KNOWN["gaussian_exactness"], Schedule("cosine")
    mean, std = known["m"], math.sqrt(known["s2"])
    levels = schedule.levels(10, "strided")
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    marginal = alpha**2 * std**2 + sigma**2
    eps_square = (sigma**2 / marginal).tolist()
    run = affine(ddpm, exact(schedule, mean, std), levels, variance="analytic", eps_square=eps_square)
    gain, offset, noise = run
    last = std**2 * sigma[-1] ** 2 / marginal[-1]  # the variance of x0 given the last level
    assert gain * (alpha[0] * mean).item() + offset == pytest.approx(known["mean"], rel=1e-9)
    assert gain**2 * marginal[0].item() + noise + last.item() == pytest.approx(known["var"], rel=1e-9)


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_heun_and_euler_on_edm_levels(std):
    known, schedule = KNOWN["edm"][f"s={std}"], Schedule("linear")
    levels = schedule.levels(18, "edm")
    alpha = levels.alpha[0].item()  # EDM's samples are x / alpha, and 80 times their noise
    for sampler, name in ((heun, "heun"), (ddim, "euler")):
        gain, _, _ = affine(sampler, exact(schedule, 0.0, std), levels)
        assert gain * alpha == pytest.approx(known[f"{name}_gain"], rel=1e-8)
        assert gain * alpha * 80 == pytest.approx(known[f"{name}_output_std_when_x_T=80*z"], rel=1e-8)


@pytest.mark.parametrize("name", KNOWN["ddim_sigma"])
def test_ddim_noise_at_eta_1(name):
    levels = Schedule(name).levels(10, "strided")
    stds = []
    for k in range(9):  # one step at a time, from x = x0 = 0 with noise 1: what comes out is the deviation
        step = slice(k, k + 2)
        one = Levels(levels.t[step], levels.alpha[step], levels.sigma[step], levels.schedule)
        zero = torch.zeros(1, dtype=torch.float64)
        stds.append(ddim(lambda x, t: torch.zeros_like(x), zero, one, eta=1, randn=torch.ones_like).item())
    np.testing.assert_allclose(stds[::-1], KNOWN["ddim_sigma"][name]["sigma_eta1_strided_10"][1:], rtol=1e-9)


def test_learned_variance_spans_small_to_large():
    schedule = Schedule("cosine")
    levels, inner = schedule.levels(10, "strided"), exact(schedule, 0.3, 0.5)

    def learned(fraction: float):
        return lambda x, t: (inner(x, t), torch.full_like(x, fraction))

    for fraction, variance in ((0.0, "small"), (1.0, "large")):
        run = affine(ddpm, learned(fraction), levels, variance="learned")
        assert run == pytest.approx(affine(ddpm, inner, levels, variance=variance), rel=1e-9)
    half = affine(ddpm, learned(0.5), levels, variance="learned")[2]
    assert affine(ddpm, inner, levels)[2] < half < affine(ddpm, inner, levels, variance="large")[2]
    assert affine(ddim, learned(0.5), levels) == affine(ddim, inner, levels)  # others ignore it


def test_churn_adds_noise_and_keeps_the_law():
    schedule = Schedule("linear")
    denoise, levels = exact(schedule, 0.3, 0.5), schedule.levels(200, "edm")
    quiet, churned = affine(heun, denoise, levels), affine(heun, denoise, levels, churn=40.0)
    assert quiet[2] == 0
    assert churned[2] > 0.2  # nearly all of the variance is fresh noise
    for gain, offset, noise in (quiet, churned):
        assert offset == pytest.approx(0.3, abs=0.01)
        assert gain**2 + noise == pytest.approx(0.25, abs=0.003)
    louder = affine(heun, denoise, levels, churn=40.0, churn_noise=1.1)
    assert louder[2] > churned[2]


@pytest.mark.parametrize("spacing", ["strided", "trailing", "uniform", "logsnr", "edm", "fast27"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "flow"])
def test_heun_on_any_levels_is_nearer_to_the_data_than_ddim(name, spacing):
    """A first step from g of hundreds to a few is Euler's: the mean of both ends' slopes spread too far."""
    schedule = Schedule(name)
    denoise, levels = exact(schedule, 0.3, 0.5), schedule.levels(27, spacing)
    first = (levels.alpha[0] ** 2 + levels.sigma[0] ** 2).item()

    def std(*run: float) -> float:
        return math.sqrt(run[0] ** 2 * first + run[2])

    quiet, euler = std(*affine(heun, denoise, levels)), std(*affine(ddim, denoise, levels))
    assert abs(quiet - 0.5) < 0.02 or abs(quiet - 0.5) < 0.6 * abs(euler - 0.5)
    churned = std(*affine(heun, denoise, levels, churn=10.0))
    assert abs(churned - 0.5) < 0.05


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_heun_is_of_second_order(name):
    """Twice the steps, a quarter of the error or less, the last step (to no noise, Euler's) included."""
    schedule = Schedule(name)
    denoise = exact(schedule, 0.3, 0.5)
    gains = [affine(heun, denoise, schedule.levels(n, "edm"))[0] for n in (20, 40, 80)]
    assert abs(gains[1] - gains[2]) < 0.3 * abs(gains[0] - gains[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", [None, "logsnr", "edm", "leading"])
def test_pure_noise_is_where_sampling_starts_if_the_schedule_ends_in_it(method, spacing):
    """Lin et al. 2024, sec. 3.3: a step from elsewhere takes noise for a picture of mean brightness."""
    seen: list[float] = []
    schedule = Schedule("linear", zero_terminal_snr=True)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return torch.full_like(x, 0.8)  # a bright picture

    out = Sampler(method, 5, spacing)(denoise, torch.randn(4, 3), schedule)
    assert seen[0] == 1.0
    torch.testing.assert_close(out, torch.full((4, 3), 0.8), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "zero_terminal_snr"), [("cosine", False), ("sigmoid", False), ("linear", True), ("flow", False)]
)
def test_every_sampler_tends_to_the_data_on_every_schedule(method, name, zero_terminal_snr):
    schedule = Schedule(name, zero_terminal_snr=zero_terminal_snr)
    spacing = None if method in ("dpmpp", "heun") else "uniform"
    levels = Sampler(method, 400, spacing).levels(schedule)
    gain, offset, noise = affine(METHODS[method], exact(schedule, 0.3, 0.5), levels)
    assert offset == pytest.approx(0.3, abs=0.01)
    assert gain**2 + noise == pytest.approx(0.25, abs=0.01)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(METHODS)), st.sampled_from(["cosine", "flow"]), st.integers(1, 12))
def test_a_denoiser_that_knows_x0_is_believed(method, name, steps):
    """A point as data: any number of steps of any sampler ends in it, from any noise."""
    schedule, x0 = Schedule(name), torch.randn(2, 3, 4)
    out = Sampler(method, steps)(lambda x, t: x0, torch.randn(2, 3, 4), schedule)
    torch.testing.assert_close(out, x0, rtol=1e-4, atol=1e-4)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_reported_and_levels_visited_in_order(method):
    seen, times = [], []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        times.append(t[0].item())
        return 0.5 * x

    sampler = Sampler(method, 5)
    out = sampler(denoise, torch.randn(2, 3), Schedule("cosine"), on_step=lambda *step: seen.append(step))
    assert len(sampler) == 5
    assert [(i, n) for i, n, _ in seen] == [(i, 5) for i in range(5)]
    torch.testing.assert_close(seen[-1][2], out)
    assert sorted(times, reverse=True) == times
    assert len(set(times)) == 5


def test_flow_starts_from_the_noise_itself_and_ddim_is_euler():
    schedule, velocity = Schedule("flow"), lambda x, t: torch.tanh(x + t[:, None])
    x = noise = torch.randn(4, 3, dtype=torch.float64)
    for k in range(10, 0, -1):
        x = x - 0.1 * velocity(x, torch.full((4,), k / 10, dtype=torch.float64))
    for method in ("ddim", "euler"):
        out = Sampler(method, 10)(lambda x, t: x - t[:, None] * velocity(x, t), noise, schedule)
        torch.testing.assert_close(out, x)


# ---------------------------------------------------------------- diffusers


class Curved(torch.nn.Module):
    """Some network."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.7 * x + t.view(-1, 1, 1, 1)) - 0.2


NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "velocity": "flow_prediction"}


def library(scheduler: type, name: str, prediction: str, **options):
    if name == "scaled_linear":
        options |= {"beta_start": 0.00085, "beta_end": 0.012}
    return scheduler(beta_schedule=NAMES[name], prediction_type=PREDICTIONS[prediction], **options)


def run_library(scheduler, x: Tensor, **options) -> Tensor:
    for t in scheduler.timesteps:
        at = torch.full((len(x),), (t.item() + 1) / 1000)
        x = scheduler.step(Curved()(x, at), t, x, return_dict=False, **options)[0]
    return x


def run_ours(sampler: Sampler, schedule: Schedule, prediction: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(Curved(), schedule, prediction)
    return sampler(denoiser, start(), schedule, randn=lambda x: torch.randn(x.shape, generator=generator))


def start() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddim_is_that_of_diffusers(name, prediction):
    theirs = library(diffusers.DDIMScheduler, name, prediction, clip_sample=False, timestep_spacing="leading")
    theirs.set_timesteps(50)
    expected = run_library(theirs, start(), eta=0.5, generator=torch.Generator().manual_seed(0))
    out = run_ours(Sampler("ddim", 50, "leading", eta=0.5), Schedule(name), prediction)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_ddim_from_zero_terminal_snr_is_that_of_diffusers():
    theirs = library(
        diffusers.DDIMScheduler,
        "linear",
        "v",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    theirs.set_timesteps(10)
    out = run_ours(Sampler("ddim", 10, "trailing"), Schedule("linear", zero_terminal_snr=True), "v")
    torch.testing.assert_close(out, run_library(theirs, start()), rtol=1e-3, atol=1e-3)


def test_dpmpp_from_zero_terminal_snr_is_that_of_diffusers():
    theirs = library(
        diffusers.DPMSolverMultistepScheduler,
        "linear",
        "v",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    theirs.set_timesteps(10)
    out = run_ours(Sampler("dpmpp", 10, "trailing"), Schedule("linear", zero_terminal_snr=True), "v")
    torch.testing.assert_close(out, run_library(theirs, start()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_resampling_is_repaints_of_diffusers(name):
    """Where nothing is kept: theirs puts what is kept into the noisy picture, ours into the estimate."""
    steps, resamplings = 20, 3
    theirs = diffusers.RePaintScheduler(
        steps, trained_betas=betas(name, steps).float().numpy(), eta=1.0, clip_sample=False
    )
    theirs.set_timesteps(steps)
    drawn, unused = torch.Generator().manual_seed(0), torch.Generator()
    x = start()
    nothing = torch.zeros_like(x)
    for t in reversed(range(steps)):
        for number in range(resamplings):
            if number:
                x = theirs.undo_step(x, t, drawn)
            eps = Curved()(x, torch.full((len(x),), (t + 1) / steps))
            noise = drawn if t else unused  # the last step draws noise and leaves it out
            x = theirs.step(eps, t, x, nothing, nothing, noise, return_dict=False)[0]
    sampler = Sampler("ddim", steps, eta=1.0, resamplings=resamplings)
    out = run_ours(sampler, Schedule(name, steps), "eps")
    torch.testing.assert_close(out, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_that_of_diffusers(variance):
    theirs = library(
        diffusers.DDPMScheduler,
        "cosine",
        "x0",
        clip_sample=False,
        timestep_spacing="leading",
        variance_type=f"fixed_{variance}",
    )
    theirs.set_timesteps(50)
    expected = run_library(theirs, start(), generator=torch.Generator().manual_seed(0))
    out = run_ours(Sampler("ddpm", 50, "leading", variance=variance), Schedule("cosine"), "x0")
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_is_that_of_diffusers(name, steps):
    theirs = library(diffusers.DPMSolverMultistepScheduler, name, "v", timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    out = run_ours(Sampler("dpmpp", steps, "trailing"), Schedule(name), "v")
    torch.testing.assert_close(out, run_library(theirs, start()), rtol=1e-3, atol=1e-3)


def test_euler_on_flow_is_that_of_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    x = start()
    for t in theirs.timesteps:
        x = theirs.step(Curved()(x, torch.full((2,), t.item() / 1000)), t, x, return_dict=False)[0]
    out = run_ours(Sampler("euler", 12), Schedule("flow"), "velocity")
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- noise of its own


@pytest.mark.parametrize("method", ["ddpm", "ddim", "heun"])
def test_a_sample_does_not_depend_on_its_batch(method):
    schedule = Schedule("cosine")
    sampler = Sampler(method, 6, **{"ddim": {"eta": 1.0}, "heun": {"churn": 10.0}}.get(method, {}))

    def run(seeds: list[int]) -> Tensor:
        noise = per_sample(seeds)
        return sampler(lambda x, t: torch.tanh(x), noise.initial((3, 4)), schedule, randn=noise)

    together = run([5, 6, 7])
    torch.testing.assert_close(run([7, 5]), together[[2, 0]], rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "plms"}, "choose one of ddpm, ddim"),
        ({"steps": 0}, "at least 1"),
        ({"method": "ddim", "churn": 1.0}, "no option 'churn': its options are: eta"),
        ({"method": "dpmpp", "eta": 1.0}, "its options are: none"),
    ],
)
def test_samplers_that_do_not_exist(arguments, says):
    with pytest.raises(UserError, match=says):
        Sampler(**arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"spacing": "even"}, "unknown spacing"),
        (
            {"method": "ddpm", "variance": "huge"},
            "must be one of auto, small, large",
        ),
        ({"method": "ddpm", "variance": "learned"}, "learned_variance=true"),
        ({"method": "ddpm", "variance": "analytic"}, "25 numbers"),
    ],
)
def test_sampling_that_cannot_be(arguments, says):
    with pytest.raises(UserError, match=says):
        Sampler(**arguments)(lambda x, t: x, torch.randn(1, 2), Schedule("cosine"))


@pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
def test_inversion_of_a_gaussian_is_what_the_probability_flow_gives(name):
    schedule, mean, std = Schedule(name), 0.3, 0.5
    x0 = torch.tensor([-0.7, 0.1, 1.4], dtype=torch.float64)
    off = []
    for steps in (25, 100, 400):
        sampler = Sampler("ddim", steps=steps)
        levels = sampler.levels(schedule)
        alpha, sigma = levels.alpha[0].item(), levels.sigma[0].item()
        x_T = sampler.invert(exact(schedule, mean, std), x0, schedule, refinements=0)
        flow = alpha * mean + math.sqrt((alpha * std) ** 2 + sigma**2) * (x0 - mean) / std
        off.append((x_T * math.hypot(alpha, sigma) - flow).abs().max().item())
    assert off[0] > 2 * off[1] > 4 * off[2] > 0
    assert off[2] < 0.03


@pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
def test_inversion_undoes_ddim_the_better_the_more_steps_and_refinements(name):
    schedule = Schedule(name)
    denoise, x0 = exact(schedule, 0.3, 0.5), torch.tensor([-0.7, 0.1, 1.4], dtype=torch.float64)

    def error(steps: int, refinements: int) -> float:
        sampler = Sampler("ddim", steps=steps)
        x_T = sampler.invert(denoise, x0, schedule, refinements)
        return (sampler(denoise, x_T, schedule) - x0).abs().max().item()

    errors = [error(steps, 0) for steps in (10, 40, 160)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert error(10, 3) < 0.2 * errors[0]
    assert error(10, 100) < 1e-9


def test_only_ddim_is_undone_and_its_own_noise_is_left_out():
    schedule = Schedule("cosine")
    denoise, x0 = exact(schedule, 0.3, 0.5), torch.ones(2, dtype=torch.float64)
    noisy, plain = Sampler("ddim", steps=5, eta=1.0), Sampler("ddim", steps=5)
    assert torch.equal(noisy.invert(denoise, x0, schedule), plain.invert(denoise, x0, schedule))
    by_hand = ddim_invert(denoise, x0, plain.levels(schedule))
    torch.testing.assert_close(plain.invert(denoise, x0, schedule), by_hand)
    with pytest.raises(UserError, match="done by DDIM alone, not by heun; take sampler=ddim"):
        Sampler("heun").invert(denoise, x0, schedule)


def test_resampling_keeps_the_law():
    schedule, count = Schedule("cosine"), 5_000
    denoise, noise = exact(schedule, 0.3, 0.5), torch.randn(count, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    calls = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return denoise(x, t)

    again = Sampler("ddim", steps=400, eta=1.0, resamplings=3)
    x = again(counted, noise, schedule)
    assert len(calls) == 1200
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)
