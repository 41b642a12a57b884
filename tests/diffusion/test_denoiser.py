"""Predictions, losses and weights: known numbers, exact Gaussian data, and properties."""

import cmath
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dalle.diffusion.denoiser import Denoiser, discretized_gaussian, gaussian_kl, squared_error, vlb_bits
from dalle.diffusion.schedule import Schedule
from dalle.errors import UserError

KNOWN = json.loads(Path(__file__).with_name("known_values.json").read_text())
PAIRS = [(name, p) for name in ("linear", "cosine", "sigmoid") for p in ("eps", "x0", "v")]
PAIRS += [("flow", "velocity"), ("flow", "x0")]


def f64(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Outputs(nn.Module):
    """A network that returns what it was told to."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.out


class Exact(nn.Module):
    """The best network for data N(mean, std^2)."""

    def __init__(self, schedule: Schedule, prediction: str, mean: float, std: float):
        super().__init__()
        self.schedule, self.prediction, self.mean, self.std = schedule, prediction, mean, std

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c[:, None] for c in self.schedule.alpha_sigma(t))
        gap, variance = x_t - alpha * self.mean, alpha**2 * self.std**2 + sigma**2
        eps, x0 = sigma / variance * gap, self.mean + alpha * self.std**2 / variance * gap
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[self.prediction]


def target(schedule: Schedule, prediction: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = (c[:, None] for c in schedule.alpha_sigma(t))
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[prediction]


@pytest.mark.parametrize("name", KNOWN["conversions"])
def test_conversions(name):
    known, schedule = KNOWN["conversions"][name], Schedule(name)
    t, x_t = f64((known["index"] + 1) / 1000), f64([known["x_t"]])
    for prediction in ("eps", "x0", "v"):
        out = Denoiser(Outputs(f64([known[prediction]])), schedule, prediction)(x_t, t)
        assert out.item() == pytest.approx(known["x0"], rel=1e-9)
    x0, noise = f64([known["x0"]]), f64([known["eps"]])
    loss, _ = Denoiser(Outputs(f64([known["v"] + 0.5])), schedule, "v").losses(x0, t=t, noise=noise)
    assert loss.item() == pytest.approx(0.25, rel=1e-9)  # so the target was the known v


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(PAIRS), st.floats(1e-3, 0.999), st.integers(0, 2**31))
def test_a_perfect_prediction_gives_back_x0_and_no_loss(pair, moment, seed):
    schedule = Schedule(pair[0])
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).unbind()
    t = torch.full((3,), moment, dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in schedule.alpha_sigma(t))
    out = target(schedule, pair[1], x0, eps, t)
    denoiser = Denoiser(Outputs(out), schedule, pair[1], weighting="min_snr")
    torch.testing.assert_close(denoiser(alpha * x0 + sigma * eps, t), x0, rtol=1e-6, atol=1e-6)
    loss, at = denoiser.losses(x0, t=t, noise=eps)
    assert loss.abs().max() < 1e-20
    assert at is t


@pytest.mark.parametrize("case", "ABC")
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_exact_network_reaches_the_lowest_loss(case, name, prediction):
    known, schedule = KNOWN["gaussian_data"][case], Schedule(name)
    denoiser = Denoiser(Exact(schedule, prediction, known["m"], known["s"]), schedule, prediction)
    for index, expected in known["optimal_mse"][name][prediction].items():
        # the error is linear in the two independent normals: its mean square is the sum over unit vectors
        x0, noise = known["m"] + known["s"] * f64([1.0], [0.0]), f64([0.0], [1.0])
        loss, _ = denoiser.losses(x0, t=f64(*[(int(index) + 1) / 1000] * 2), noise=noise)
        assert loss.sum().item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_weights(name, prediction):
    known = KNOWN["schedules"][name]["min_snr_5_weight"][prediction]
    denoiser = Denoiser(nn.Identity(), Schedule(name), prediction, weighting="min_snr")
    weight = denoiser.weight((f64(*map(int, known)) + 1) / 1000)
    torch.testing.assert_close(weight, f64(*known.values()), rtol=1e-9, atol=0)


def test_min_snr_weights_without_signal_and_on_flow():
    silent = Schedule("linear", zero_terminal_snr=True)
    for prediction in ("x0", "v"):
        assert Denoiser(nn.Identity(), silent, prediction, "min_snr").weight(torch.ones(1)) == 1
    t = torch.tensor([0.0, 0.1, 0.5, 1.0])
    flow = Denoiser(nn.Identity(), Schedule("flow"), "velocity", "min_snr").weight(t)
    torch.testing.assert_close(flow, torch.tensor([0.0, 5 * 0.01, 0.25, 1.0]))  # min(SNR, 5) sigma^2


def test_losses_are_per_sample_and_loss_is_their_mean():
    denoiser = Denoiser(Outputs(torch.zeros(2, 3, 4)), Schedule("flow"), "velocity")
    x0, noise = torch.zeros(2, 3, 4), torch.stack([torch.ones(3, 4), 2 * torch.ones(3, 4)])
    loss, _ = denoiser.losses(x0, noise=noise)
    torch.testing.assert_close(loss, torch.tensor([1.0, 4.0]))
    assert denoiser.loss(x0, noise=noise) == 2.5


def test_a_generator_makes_losses_reproducible():
    denoiser = Denoiser(Exact(Schedule("cosine"), "v", 0, 1), Schedule("cosine"), "v")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, second, other = (denoiser.losses(torch.zeros(4, 6), generator=g) for g in generators)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_conditions_reach_the_network():
    class Conditioned(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, *, shift: Tensor) -> Tensor:
            return shift.expand_as(x_t)

    denoiser = Denoiser(Conditioned(), Schedule("cosine"), "x0")
    x0 = torch.zeros(2, 3)
    assert denoiser.loss(x0, shift=torch.full((2, 1), 2.0)) == 4
    assert (denoiser(x0, torch.ones(2), shift=torch.full((2, 1), 2.0)) == 2).all()


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_training_times(sampling):
    x0 = torch.zeros(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    options = {"time_sampling": sampling, "logit_mean": 0.5}
    discrete = Denoiser(nn.Identity(), Schedule("cosine", steps=50), "v", **options)
    t = discrete.times(x0, generator)
    torch.testing.assert_close(t * 50, (t * 50).round(), rtol=0, atol=1e-5)
    assert t.min() >= 1 / 50
    assert t.max() <= 1
    flow = Denoiser(nn.Identity(), Schedule("flow"), "velocity", **options)
    t = flow.times(x0, generator)
    assert t.unique().numel() > 15_000
    if sampling == "uniform":
        assert t.mean().item() == pytest.approx(0.5, abs=0.01)
        assert (discrete.times(x0, generator) * 50).round().long().bincount()[1:].min() > 300
    else:
        assert torch.logit(t).mean().item() == pytest.approx(0.5, abs=0.03)
        assert torch.logit(t).std().item() == pytest.approx(1.0, abs=0.03)


def test_autocast_output_comes_back_in_full_precision():
    denoiser = Denoiser(Outputs(torch.zeros(2, 3, dtype=torch.bfloat16)), Schedule("cosine"), "v")
    assert denoiser(torch.ones(2, 3), torch.rand(2)).dtype == torch.float32
    assert denoiser.losses(torch.ones(2, 3))[0].dtype == torch.float32


# ---------------------------------------------------------------- learned variance


@pytest.mark.parametrize("row", KNOWN["discretized_gaussian_nats"])
def test_discretized_gaussian(row):
    nats = discretized_gaussian(f64(row["x"]), f64(row["mean"]), f64(row["log_sd"]))
    assert nats.item() == pytest.approx(row["tanh_cdf"], rel=1e-9)


@pytest.mark.parametrize("row", KNOWN["gaussian_kl_nats"])
def test_gaussian_kl(row):
    assert gaussian_kl(*f64(*row["args"])).item() == pytest.approx(row["kl"], rel=1e-12)


@pytest.mark.parametrize("name", KNOWN["prior_bpd"])
def test_prior_term(name):
    alpha, sigma = Schedule(name).alpha_sigma(f64(1.0))
    for key, expected in KNOWN["prior_bpd"][name].items():
        x0 = float(key.removeprefix("x0="))
        bits = gaussian_kl(alpha * x0, 2 * sigma.log(), f64(0.0), f64(0.0)) / math.log(2)
        assert bits.item() == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("name", KNOWN["learned_range_log_variance"])
def test_learned_range(name):
    """With a perfect mean the bound's term is the KL of two variances, which gives the model's away."""
    log_variance = KNOWN["schedules"][name]["posterior_log_variance_clipped"]
    for index, row in KNOWN["learned_range_log_variance"][name].items():
        for key, expected in row.items():
            t, fraction = f64((int(index) + 1) / 1000), (f64([float(key.removeprefix("v="))]) + 1) / 2
            bits = vlb_bits(Schedule(name), f64([0.1]), f64([0.1]), fraction, t)
            if index == "0":
                nats = -discretized_gaussian(f64(0.1), f64(0.1), f64(expected / 2))
            else:
                nats = gaussian_kl(f64(0.0), f64(log_variance[index]), f64(0.0), f64(expected))
            torch.testing.assert_close(bits, nats / math.log(2), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", "ABC")
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_variational_bound_of_the_exact_network(case, name):
    known, schedule = KNOWN["gaussian_data"][case], Schedule(name)
    expected = known["vlb_terms_bits"][name]
    exact = Denoiser(Exact(schedule, "eps", known["m"], known["s"]), schedule, "eps")
    t = (torch.arange(1, 1000, dtype=torch.float64) + 1) / 1000
    alpha, sigma = (c[:, None] for c in schedule.alpha_sigma(t))
    total = torch.zeros_like(t)
    for z0, z in ((1.0, 0.0), (0.0, 1.0)):  # the error is linear in two normals
        x0 = torch.full((999, 1), known["m"] + known["s"] * z0, dtype=torch.float64)
        x0_hat = exact(alpha * x0 + sigma * z, t)
        total += vlb_bits(schedule, x0, x0_hat, torch.zeros_like(x0), t)
    assert total.sum().item() == pytest.approx(expected["sum_indices_1_to_999"], rel=1e-7)
    for index in (1, 99, 499, 999):
        assert total[index - 1].item() == pytest.approx(expected[f"L_index_{index}"], rel=1e-6)


class Learned(nn.Module):
    """Scale for the mean, one number for the variance channels."""

    def __init__(self):
        super().__init__()
        self.mean, self.variance = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.mean * x_t, self.variance.expand_as(x_t)], dim=1)


def test_hybrid_loss_adds_the_bound_and_keeps_it_off_the_mean():
    schedule, net = Schedule("cosine", steps=50), Learned()
    hybrid = Denoiser(net, schedule, "eps", learned_variance=True)
    x0, noise = torch.rand(3, 2, 4, 4) * 2 - 1, torch.randn(3, 2, 4, 4)
    t = torch.tensor([1.0, 25.0, 50.0]) / 50
    losses, _ = hybrid.losses(x0, t=t, noise=noise)
    alpha, sigma = (c.view(3, 1, 1, 1) for c in schedule.alpha_sigma(t))
    x_t = alpha * x0 + sigma * noise
    x0_hat, fraction = hybrid.with_variance(x_t, t)
    torch.testing.assert_close(x0_hat, (x_t - sigma * 0.3 * x_t) / alpha)
    torch.testing.assert_close(fraction, torch.full_like(x0, 0.25))
    simple = (0.3 * x_t - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, simple + 0.05 * vlb_bits(schedule, x0, x0_hat, fraction, t))
    losses.sum().backward()
    of_simple = (2 * (0.3 * x_t - noise) * x_t).flatten(1).mean(1).sum()
    torch.testing.assert_close(net.mean.grad, of_simple)
    assert net.variance.grad is not None
    assert net.variance.grad.abs() > 0


@pytest.mark.parametrize(
    ("schedule", "arguments", "says"),
    [
        ("cosine", {"prediction": "velocity"}, "needs schedule flow"),
        ("flow", {"prediction": "v"}, "take velocity"),
        ("flow", {"prediction": "eps"}, "pure noise"),
        ("cosine", {"prediction": "noise"}, "choose one of eps"),
        ("cosine", {"weighting": "snr"}, "choose one of none, min_snr, velocity, velocity_damped"),
        ("cosine", {"time_sampling": "sobol"}, "choose one of uniform"),
        ("cosine", {"prediction": "v", "learned_variance": True}, "needs prediction=eps"),
        ("flow", {"prediction": "x0", "learned_variance": True}, "needs prediction=eps"),
    ],
)
def test_what_does_not_fit_is_refused(schedule, arguments, says):
    with pytest.raises(UserError, match=says):
        Denoiser(nn.Identity(), Schedule(schedule), **arguments)


def test_eps_is_refused_with_zero_terminal_snr():
    with pytest.raises(UserError, match="take v or x0"):
        Denoiser(nn.Identity(), Schedule("linear", zero_terminal_snr=True), "eps")


@pytest.mark.parametrize("pair", [*PAIRS, ("flow", "eps")])
def test_velocity_weighting_is_the_squared_error_of_the_velocity_whatever_is_predicted(pair):
    name, prediction = pair
    schedule = Schedule(name)
    if prediction == "eps" and name == "flow":  # refused for pure noise alone
        schedule.ends_in_pure_noise = False
    x0, eps, error = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
    t = torch.tensor([0.2, 0.3, 0.4, 0.6], dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in schedule.alpha_sigma(t))
    x_t = alpha * x0 + sigma * eps
    out = target(schedule, prediction, x0, eps, t) + error
    denoiser = Denoiser(Outputs(out), schedule, prediction, "velocity")
    x0_hat = denoiser(x_t, t)
    eps_hat = (x_t - alpha * x0_hat) / sigma
    velocity = "velocity" if name == "flow" else "v"
    missed = target(schedule, velocity, x0_hat, eps_hat, t) - target(schedule, velocity, x0, eps, t)
    assert min(alpha.min(), sigma.min()) > 0.05
    torch.testing.assert_close(denoiser.losses(x0, t=t, noise=eps)[0], missed.square().mean(1))
    torch.testing.assert_close(denoiser.output_of(x_t, x0_hat, t), out)


def test_weights_of_the_velocity_where_it_is_held_and_damped():
    t = f64(0.01, 0.05, 0.5, 1.0)
    flow = Schedule("flow")
    of_x0 = Denoiser(nn.Identity(), flow, "x0", "velocity").weight(t)
    torch.testing.assert_close(of_x0, f64(400, 400, 4, 1))
    assert (Denoiser(nn.Identity(), flow, "velocity", "velocity").weight(t) == 1).all()
    of_eps = Denoiser(nn.Identity(), Schedule("cosine"), "eps", "velocity").weight(f64(1.0))
    torch.testing.assert_close(of_eps, f64(400))
    damped = 1 / (t.square() + 0.1)
    for prediction, gain in (("x0", 1.0), ("velocity", t.square())):
        weight = Denoiser(nn.Identity(), flow, prediction, "velocity_damped").weight(t)
        torch.testing.assert_close(weight, gain * damped)


@pytest.mark.parametrize("wave", [(1, 0), (0, 3), (2, 2), (4, 4)])
def test_frequency_weights_are_those_of_first_differences(wave):
    """Over a whole period; differences leave out the seam, so only their mean over shifts agrees."""
    n, (a, b) = 8, wave
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    shifts = torch.arange(64).view(-1, 1, 1, 1) * 2 * math.pi / 64
    error = torch.cos(2 * math.pi * (a * y + b * x) / n + shifts).double()
    weight = 1 + 0.7 * sum(abs(1 - cmath.exp(2j * math.pi * k / n)) ** 2 for k in wave)
    assert squared_error(error, 0.7).mean().item() == pytest.approx(weight * error.square().mean().item())


def test_frequency_weights_are_for_pictures_only():
    error = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(squared_error(error, 5.0), squared_error(error))


@pytest.mark.parametrize("weight", [0.0, 2.0, 16.0])
def test_frequency_weights_do_not_move_the_optimum(weight):
    """Of two pictures that one x_t may mean, the best estimate stays the mean: there the gradient is zero."""
    pictures = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = pictures.mean(0, keepdim=True).requires_grad_()
    squared_error(best - pictures, weight).mean().backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-15
    off = squared_error(best.detach() + 0.1 * torch.randn_like(best) - pictures, weight).mean()
    assert off > squared_error(best.detach() - pictures, weight).mean()
