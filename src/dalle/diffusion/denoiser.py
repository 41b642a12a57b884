"""Denoiser: makes a network that predicts eps, x0, v or velocity an estimator of the clean x0; its losses.

Ho et al. 2020 (eps), Salimans & Ho 2022 (v), Liu et al. 2022 (velocity of rectified flow), Hang et al. 2023
(min-SNR weights), Nichol & Dhariwal 2021 (learned variance, hybrid loss), Esser et al. 2024 (logit-normal
times).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle.diffusion.schedule import Schedule, expand, posterior
from dalle.errors import UserError
from dalle.graphs import Recorded
from dalle.machine import precise
from dalle.ranges import Exponent, NonNegative, Positive

MIN_SNR_GAMMA = 5.0
VELOCITY_FLOOR = 0.05  # of what errors are divided by (Li & He 2025)
DAMPING = 0.1  # keeps the last, nearly clean times from outweighing all others

WEIGHTINGS = ("none", "min_snr", "velocity", "velocity_damped")


class Denoiser(nn.Module):
    """Wraps `net(x_t, t, **cond) -> (B, C, ...)`, where t is the continuous time in [0, 1].

    prediction: what the network's output means: `eps`, `x0`, `v` (variance-preserving schedules only) or
    `velocity` (flow only). weighting: `none`, `min_snr`, `velocity` (the squared error of the velocity,
    whatever is predicted) or `velocity_damped`: see `weight`. time_sampling: `uniform` or `logit_normal`
    (`logit_mean`, `logit_std`); rounded up to a discrete level where the schedule has them.
    frequency_weight: how much more than the coarse the fine counts in pictures: see `squared_error`.
    learned_variance: the network emits 2C channels, the second half the variance (eps prediction on a
    variance-preserving schedule only). Raises UserError for combinations that do not exist.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        prediction: str = "x0",
        weighting: str = "none",
        time_sampling: str = "uniform",
        learned_variance: bool = False,
        logit_mean: Exponent = 0.0,
        logit_std: Positive = 1.0,
        frequency_weight: NonNegative = 0.0,
    ):
        super().__init__()
        _check(schedule, prediction, weighting, time_sampling, learned_variance)
        self.net, self.schedule, self.prediction = net, schedule, prediction
        self.weighting, self.time_sampling, self.learned_variance = weighting, time_sampling, learned_variance
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.frequency_weight = frequency_weight
        self.recorded: Recorded | None = None

    def speed_up(self, how: str) -> None:
        """Of estimates, not of losses: `graphs`, `full` or `none`, as `Stage.speed_up` says."""
        net = torch.compile(self.net, dynamic=False) if how == "full" else self.net
        self.recorded = None if how == "none" else Recorded(partial(self._estimate, net))

    def forward(self, x_t: Float[Tensor, "B *S"], t: Float[Tensor, "B"], **cond) -> Float[Tensor, "B *S"]:
        """The estimate of x0 from the noised x_t at times t."""
        return self.with_variance(x_t, t, **cond)[0]

    def with_variance(
        self, x_t: Float[Tensor, "B *S"], t: Float[Tensor, "B"], **cond
    ) -> tuple[Float[Tensor, "B *S"], Float[Tensor, "B *S"] | None]:
        """The estimate of x0; if learned, where ln variance lies between the posterior's (0) and beta (1)."""
        return self.recorded(x_t, t, **cond) if self.recorded else self._estimate(self.net, x_t, t, **cond)

    def _estimate(
        self, net: Callable[..., Tensor], x_t: Tensor, t: Tensor, **cond
    ) -> tuple[Tensor, Tensor | None]:
        out, fraction = self._split(net(x_t, t, **cond), x_t)
        return self.x0_of(x_t, out, t), fraction

    def losses(
        self,
        x0: Float[Tensor, "B *S"],
        *,
        t: Float[Tensor, "B"] | None = None,
        noise: Float[Tensor, "B *S"] | None = None,
        generator: torch.Generator | None = None,
        **cond,
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """The loss of every sample and the times it was taken at.

        For a reproducible value give `t` and `noise`, or a `generator`, which draws them on its own device.
        """
        t = self.times(x0, generator) if t is None else t
        noise = _draw(torch.randn, x0.shape, x0, generator).to(x0.dtype) if noise is None else noise
        alpha, sigma = (expand(c, x0) for c in self.schedule.alpha_sigma(t))
        x_t = (alpha * x0 + sigma * noise).to(x0.dtype)
        out, fraction = self._split(self.net(x_t, t, **cond), x_t)
        target = {
            "eps": noise,
            "x0": x0,
            "v": alpha * noise - sigma * x0,  # Salimans & Ho 2022, sec. 4
            "velocity": noise - x0,  # d x_t / dt of the straight path
        }[self.prediction]
        loss = squared_error(out - target, self.frequency_weight) * self.weight(t)
        if fraction is not None:  # the hybrid loss: Nichol & Dhariwal 2021, eq. 16, rescaled by T/1000
            x0_hat = self.x0_of(x_t, out, t).detach()
            loss = loss + self.schedule.steps / 1000 * vlb_bits(self.schedule, x0, x0_hat, fraction, t)
        return loss, t

    def loss(self, x0: Float[Tensor, "B *S"], **cond) -> Float[Tensor, ""]:
        """The mean of `losses`, which takes the same arguments."""
        return self.losses(x0, **cond)[0].mean()

    def times(
        self, x0: Float[Tensor, "B *S"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B"]:
        """One training time per sample of x0."""
        if self.time_sampling == "uniform":
            t = _draw(torch.rand, x0.shape[:1], x0, generator)
        else:  # Esser et al. 2024, eq. 19
            normal = _draw(torch.randn, x0.shape[:1], x0, generator)
            t = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        if self.schedule.variance_preserving:
            t = (t * self.schedule.steps).ceil().clamp(min=1) / self.schedule.steps
        return t

    def weight(self, t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The factor on the squared error of the network's own output at times t.

        velocity: where x_t is given, an error of the velocity, v or noise - x0, is one of x0 over sigma, or
        one of eps over alpha; the divisor is held above 0.05. So an x0 prediction weighs
        1 / max(sigma, 0.05)^2, an eps prediction 1 / max(alpha, 0.05)^2, and v and velocity predictions 1.
        velocity_damped: an error of x0 weighs 1 / (sigma^2 + 0.1), whatever is predicted.
        """
        if self.weighting == "none":
            return torch.ones_like(t)
        alpha, sigma = self.schedule.alpha_sigma(t)
        if self.weighting == "velocity":
            divisor = {"x0": sigma, "eps": alpha}.get(self.prediction, torch.ones_like(t))
            return divisor.clamp(min=VELOCITY_FLOOR) ** -2
        snr = (alpha / sigma).square()
        # the error of x0 is this many times that of the output
        gain = {"eps": 1 / snr, "x0": torch.ones_like(snr)}.get(self.prediction, sigma.square())
        if self.weighting == "velocity_damped":
            return gain / (sigma.square() + DAMPING)
        return torch.where(snr > 0, snr.clamp(max=MIN_SNR_GAMMA) * gain, 1.0)  # Hang et al. 2023

    def x0_of(
        self, x_t: Float[Tensor, "B *S"], out: Float[Tensor, "B *S"], t: Float[Tensor, "B"]
    ) -> Float[Tensor, "B *S"]:
        """The estimate of x0 that an output of the network means."""
        if self.prediction == "x0":
            return out
        alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(t))
        if self.prediction == "eps":
            return (x_t - sigma * out) / alpha
        return (alpha * x_t if self.prediction == "v" else x_t) - sigma * out

    def output_of(
        self, x_t: Float[Tensor, "B *S"], x0: Float[Tensor, "B *S"], t: Float[Tensor, "B"]
    ) -> Float[Tensor, "B *S"]:
        """The inverse: the output that means this estimate."""
        if self.prediction == "x0":
            return x0
        alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(t))
        if self.prediction == "eps":
            return (x_t - alpha * x0) / sigma
        return ((alpha * x_t if self.prediction == "v" else x_t) - x0) / sigma

    def _split(self, out: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean channels and the fraction of the learned range, in x_t's precision despite autocast."""
        if not self.learned_variance:
            return out.to(x_t.dtype), None
        mean, variance = out.to(x_t.dtype).chunk(2, dim=1)
        return mean, (variance + 1) / 2


def squared_error(error: Float[Tensor, "B *S"], frequency_weight: float = 0.0) -> Float[Tensor, "B"]:
    """The mean square of each sample's error, and of its first differences along height and width.

    A wave of w radians a pixel counts 1 + frequency_weight |1 - exp(iw)|^2, in each direction: pictures have
    most of their energy in coarse waves, and what makes a shape in fine ones. Every positive quadratic form
    of the error is least at the conditional mean, so schedules, samplers and guidance hold as they are.
    """
    loss = error.square().flatten(1).mean(1)
    if frequency_weight and error.ndim == 4:
        for axis in (2, 3):
            loss = loss + frequency_weight * error.diff(dim=axis).square().flatten(1).mean(1)
    return loss


def vlb_bits(
    schedule: Schedule,
    x0: Float[Tensor, "B *S"],
    x0_hat: Float[Tensor, "B *S"],
    fraction: Float[Tensor, "B *S"],
    t: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """The variational bound's term at discrete levels t, in bits/dim (Nichol & Dhariwal 2021, eq. 4-7).

    ln variance of the model = fraction ln beta + (1 - fraction) ln posterior variance (eq. 15).
    """
    steps = schedule.steps
    level = (precise(t) * steps).round()

    def at(level: Tensor) -> tuple[Tensor, ...]:
        now, before = schedule.alpha_sigma(level / steps), schedule.alpha_sigma((level - 1) / steps)
        return tuple(expand(c, x0).to(x0.dtype) for c in posterior(*now, *before))

    c0, _, beta, _ = at(level)
    posterior_log = at(level.clamp(min=2))[3].log()  # 0 at the first level: take the second's
    model_log = fraction * beta.log() + (1 - fraction) * posterior_log
    kl = gaussian_kl(c0 * x0, posterior_log, c0 * x0_hat, model_log)  # both means' ct x_t cancels
    nll = -discretized_gaussian(x0, x0_hat, model_log / 2)
    return torch.where(expand(level, x0) == 1, nll, kl).flatten(1).mean(1) / math.log(2)


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, e^log_var1) || N(mean2, e^log_var2)) in nats, elementwise."""
    gap = (mean1 - mean2).square() * torch.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 - 1 + torch.exp(log_var1 - log_var2) + gap)


def discretized_gaussian(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln probability, in nats, of 8-bit values x scaled to [-1, 1] (Ho et al. 2020, eq. 13).

    With the tanh approximation of the normal distribution function, as the improved-diffusion code has it.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = cdf((x - mean + 1 / 255) * torch.exp(-log_std))
    lower = cdf((x - mean - 1 / 255) * torch.exp(-log_std))
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()


def _draw(draw, shape, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers for `like`, at least float32, drawn on the generator's device if one is given."""
    device = like.device if generator is None else generator.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    return draw(shape, generator=generator, device=device, dtype=dtype).to(like.device)


def _check(
    schedule: Schedule, prediction: str, weighting: str, time_sampling: str, learned_variance: bool
) -> None:
    for name, value, known in (
        ("prediction", prediction, ("eps", "x0", "v", "velocity")),
        ("weighting", weighting, WEIGHTINGS),
        ("time_sampling", time_sampling, ("uniform", "logit_normal")),
    ):
        if value not in known:
            raise UserError(f"unknown {name} '{value}': choose one of {', '.join(known)}")
    if prediction == "velocity" and schedule.variance_preserving:
        raise UserError(f"prediction=velocity needs schedule flow; with {schedule.name} take v, eps or x0")
    if prediction == "v" and not schedule.variance_preserving:
        raise UserError("prediction=v needs a variance-preserving schedule; with flow take velocity or x0")
    if prediction == "eps" and schedule.ends_in_pure_noise:
        other = "v" if schedule.variance_preserving else "velocity"
        raise UserError(f"prediction=eps cannot start from the schedule's pure noise: take {other} or x0")
    if learned_variance and not (prediction == "eps" and schedule.variance_preserving):
        raise UserError("learned_variance needs prediction=eps and a schedule other than flow")
