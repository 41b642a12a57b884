"""Samplers: from noise to x0 through a denoiser. One function each, all with the same signature.

`denoise(x_t, t (B,)) -> x0`, or -> (x0, fraction) where the variance is learned (`Denoiser.with_variance`):
any callable, never a network. `levels` are the noise levels to visit, the last one clean; `randn(x)` draws
noise like x; `on_step(i, n, x0)` sees every estimate. All are written for any Gaussian path x_t = alpha x_0
+ sigma eps, so they hold for variance-preserving schedules and for flow, where `ddim` with eta = 0 is
Euler's method.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, get_type_hints

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from dalle.diffusion.schedule import Level, Levels, Schedule, posterior
from dalle.errors import UserError
from dalle.ranges import Fraction, NonNegative, Steps, Text, check_value

Randn = Callable[[Tensor], Tensor]
OnStep = Callable[[int, int, Tensor], object]
Denoise = Callable[..., Tensor | tuple[Tensor, Tensor | None]]

LONG_STEP = 4.0
Resamplings = Annotated[int, Ge(1), Le(100)]

VARIANCES = ("auto", "small", "large", "learned", "analytic")


@torch.inference_mode()
def ddpm(
    denoise: Denoise,
    x: Float[Tensor, "B *S"],
    levels: Levels,
    variance: Literal["auto", "small", "large", "learned", "analytic"] = "auto",
    eps_square: Sequence[NonNegative] | None = None,
    randn: Randn = torch.randn_like,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B *S"]:
    """Ancestral sampling: Ho et al. 2020, algorithm 2, on respaced levels (Nichol & Dhariwal 2021, sec. 4).

    variance: `small` (the posterior's), `large` (beta), `learned`, `auto` (learned where the denoiser tells
    it, else small), or `analytic` (Bao et al. 2022), which needs `eps_square`: the mean of the squared eps
    estimate on data, at each of the N noisy levels.
    """
    if variance not in VARIANCES:
        raise UserError(f"unknown variance '{variance}': choose one of {', '.join(VARIANCES)}")
    if variance == "analytic" and (eps_square is None or len(eps_square) != len(levels)):
        raise UserError(f"variance=analytic needs eps_square: {len(levels)} numbers, one per step")
    for i, now, to in levels.steps():
        x0, fraction = _estimate(denoise, x, now)
        c0, ct, beta, small = posterior(now.alpha, now.sigma, to.alpha, to.sigma)
        x = c0 * x0 + ct * x
        if to.sigma > 0:
            if variance == "learned" or (variance == "auto" and fraction is not None):
                std = _learned_std(fraction, beta, small)
            elif variance == "analytic" and eps_square is not None:  # Bao et al. 2022, eq. 8
                unsure = (now.sigma / max(now.alpha, 1e-12)) ** 2 * (1 - eps_square[i])  # Var[x_0 | x_t]
                std = math.sqrt(small + c0**2 * min(max(unsure, 0.0), 1.0))
            else:
                std = math.sqrt(beta if variance == "large" else small)
            x = x + std * randn(x)
        if on_step is not None:
            on_step(i, len(levels), x0)
    return x


@torch.inference_mode()
def ddim(
    denoise: Denoise,
    x: Float[Tensor, "B *S"],
    levels: Levels,
    eta: Fraction = 0.0,
    resamplings: Resamplings = 1,
    randn: Randn = torch.randn_like,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B *S"]:
    """Song et al. 2021 (DDIM), eq. 12. eta = 0 is deterministic, eta = 1 has the law of `ddpm` (small).

    Each step is done `resamplings` times, noise being added in between: what is put into the estimates and
    what is drawn then agree (Lugmayr et al. 2022, RePaint, sec. 4.2, with jumps of one step).
    """
    for i, now, to in levels.steps():
        _, _, beta, small = posterior(now.alpha, now.sigma, to.alpha, to.sigma)
        std = eta * math.sqrt(small)  # eq. 16
        for number in range(resamplings):
            if number:
                x = now.alpha / to.alpha * x + math.sqrt(beta) * randn(x)
            x0, _ = _estimate(denoise, x, now)
            eps = (x - now.alpha * x0) / now.sigma
            x = to.alpha * x0 + math.sqrt(max(to.sigma**2 - std**2, 0.0)) * eps
            if std > 0:
                x = x + std * randn(x)
            if on_step is not None:
                on_step(i, len(levels), x0)
    return x


@torch.inference_mode()
def dpmpp(
    denoise: Denoise,
    x: Float[Tensor, "B *S"],
    levels: Levels,
    randn: Randn = torch.randn_like,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B *S"]:
    """DPM-Solver++ 2M: Lu et al. 2022b, algorithm 2. Deterministic; best on levels uniform in log-SNR.

    The first step, and the last, to no noise at all, are of first order, which is DDIM.
    """
    x0_before, h_before = x, math.inf
    for i, now, to in levels.steps():
        x0, _ = _estimate(denoise, x, now)
        h = _logsnr(to) - _logsnr(now)
        second_order = i > 0 and to.sigma > 0
        weight = h / (2 * h_before) if second_order else 0.0
        guess = (1 + weight) * x0 - weight * x0_before
        x = to.sigma / now.sigma * x - to.alpha * math.expm1(-h) * guess
        x0_before, h_before = x0, h
        if on_step is not None:
            on_step(i, len(levels), x0)
    return x


@torch.inference_mode()
def heun(
    denoise: Denoise,
    x: Float[Tensor, "B *S"],
    levels: Levels,
    churn: NonNegative = 0.0,
    churn_noise: NonNegative = 1.0,
    randn: Randn = torch.randn_like,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B *S"]:
    """Karras et al. 2022, algorithm 2, in g = sigma/alpha and y = x/alpha, where dy/dg = eps.

    Two calls of the denoiser a step; one, Euler's, to no noise and where g falls more than fourfold and stays
    above 1. There the slope changes in the step's last bit only, and the mean of both ends, meant for small
    steps, would spread samples up to a hundredfold: on most levels but EDM's the first step leads from g of
    hundreds, or infinite, to a few. `churn` is S_churn, `churn_noise` S_noise.
    """
    gamma = min(churn / len(levels), math.sqrt(2) - 1)
    for i, now, to in levels.steps():
        if gamma > 0 and now.alpha > 0:
            x, now = _add_noise(x, levels.schedule, now, 1 + gamma, churn_noise, randn)
        x0, _ = _estimate(denoise, x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x = to.alpha * x0 + to.sigma * eps
        long = now.sigma * to.alpha > LONG_STEP * to.sigma * now.alpha and to.sigma > to.alpha
        if to.sigma > 0 and now.alpha > 0 and not long:
            x0, _ = _estimate(denoise, x, to)
            eps_there = (x - to.alpha * x0) / to.sigma
            step = to.sigma / to.alpha - now.sigma / now.alpha
            x = x + to.alpha * step * (eps_there - eps) / 2
        if on_step is not None:
            on_step(i, len(levels), x0)
    return x


@torch.inference_mode()
def ddim_invert(
    denoise: Denoise, x: Float[Tensor, "B *S"], levels: Levels, refinements: int = 3
) -> Float[Tensor, "B *S"]:
    """From x0 up to the noise of which `ddim` with eta = 0 makes it: Song et al. 2021, sec. 4.3.

    The paper takes eps at the level a step starts from, where ddim's takes it at the noisier end. Each
    of `refinements` estimates it there once more (a fixed point, Pan et al. 2023): enough of them undo ddim
    exactly; none is the paper's.
    """
    for _, now, to in reversed(list(levels.steps())):
        if to.sigma > 0:
            x0, _ = _estimate(denoise, x, to)
            up = now.alpha * x0 + now.sigma * (x - to.alpha * x0) / to.sigma
        else:  # a clean picture has no noise to estimate: as if it were the least noisy one
            x0, _ = _estimate(denoise, x, now)
            up = now.alpha * x + now.sigma * (x - now.alpha * x0) / now.sigma
        for _ in range(refinements):
            x0, _ = _estimate(denoise, up, now)
            if to.sigma > to.alpha:  # of two forms of the same step, the one that settles faster
                up = now.alpha * x0 + now.sigma * (x - to.alpha * x0) / to.sigma
            else:
                eps = (up - now.alpha * x0) / now.sigma
                up = now.alpha * (x - to.sigma * eps) / to.alpha + now.sigma * eps
        x = up
    return x


METHODS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp": dpmpp,
    "heun": heun,
    "euler": ddim,  # on flow, DDIM with eta = 0 is Euler's method
}
DETERMINISTIC = ("ddim", "euler")


def register(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a sampler of one's own known by its function's name, for `sampler.method`; a decorator.

    The function has the signature of those above: (denoise, x, levels, options ..., randn, on_step). Commands
    find it with ``trust=[mylab]`` where ``import mylab`` registers it.

    Raises:
        UserError: there is one of this name.
    """
    name = method.__name__
    if (known := METHODS.get(name)) and (known.__module__ != method.__module__):
        raise UserError(f"there is a sampler {name} already, in {known.__module__}; give yours another name")
    METHODS[name] = method
    return method


class Sampler:
    """A sampler by name, with its number of steps, spacing of levels and options.

    `spacing` None takes the method's best on a variance-preserving schedule (dpmpp `logsnr`, heun `edm`, else
    `strided`) and `uniform` on flow. `options` are the method's own arguments (ddim: eta; ddpm: variance;
    heun: churn). Raises UserError for an unknown method, spacing or option.
    """

    def __init__(self, method: str = "ddim", steps: Steps = 25, spacing: Text | None = None, **options):
        if method not in METHODS:
            raise UserError(f"unknown sampler '{method}': choose one of {', '.join(METHODS)}")
        arguments = list(inspect.signature(METHODS[method]).parameters.items())[3:]
        known = [name for name, _ in arguments if name not in ("randn", "on_step")]
        hints = get_type_hints(METHODS[method], include_extras=True)
        for name, value in options.items():
            if name not in known:
                has = ", ".join(known) or "none"
                raise UserError(f"sampler {method} has no option '{name}': its options are: {has}")
            check_value(value, hints[name], f"sampler {method}: {name}")
        if steps < 1:
            raise UserError(f"a sampler needs at least 1 step, not {steps}")
        self.method, self.steps, self.spacing, self.options = method, steps, spacing, options

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Sampler({self.method!r}, steps={self.steps}, spacing={self.spacing!r}{options})"

    def levels(self, schedule: Schedule) -> Levels:
        spacing = self.spacing
        if spacing is None and schedule.variance_preserving:
            spacing = {"dpmpp": "logsnr", "heun": "edm"}.get(self.method)
        return schedule.levels(self.steps, spacing)

    def __call__(
        self,
        denoise: Denoise,
        noise: Float[Tensor, "B *S"],
        schedule: Schedule,
        randn: Randn = torch.randn_like,
        on_step: OnStep | None = None,
        start: Float[Tensor, "#B *S"] | None = None,
        strength: Fraction = 1.0,
    ) -> Float[Tensor, "B *S"]:
        """From standard normal `noise` to x0.

        Args:
            start: begins with this x0, to which noise is added, and takes the last `strength` of all steps,
                at least one (Meng et al. 2022, SDEdit).
        """
        levels = self.levels(schedule)
        if start is not None:
            levels = levels.last(max(1, round(strength * len(levels))))
            x = levels.alpha[0].item() * start + levels.sigma[0].item() * noise
            return METHODS[self.method](denoise, x, levels, randn=randn, on_step=on_step, **self.options)
        x = noise * _first_std(levels)
        return METHODS[self.method](denoise, x, levels, randn=randn, on_step=on_step, **self.options)

    def with_eta(self, eta: float, resamplings: int = 1) -> "Sampler":
        """The same levels with this much noise in every step.

        Raises:
            UserError: another method than ddim.
        """
        if self.method not in DETERMINISTIC:
            raise UserError(f"this is done by DDIM alone, not by {self.method}; take sampler=ddim")
        return Sampler(self.method, self.steps, self.spacing, eta=eta, resamplings=resamplings)

    def invert(
        self, denoise: Denoise, x0: Float[Tensor, "B *S"], schedule: Schedule, refinements: int = 3
    ) -> Float[Tensor, "B *S"]:
        """The `noise` of which this sampler, without noise of its own, makes x0; see `ddim_invert`."""
        levels = self.with_eta(0.0).levels(schedule)
        return ddim_invert(denoise, x0, levels, refinements) / _first_std(levels)


def _first_std(levels: Levels) -> float:
    """Standard deviation at the first level, for data of variance 1."""
    return (levels.alpha[0] ** 2 + levels.sigma[0] ** 2).sqrt().item()


def _estimate(denoise: Denoise, x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
    """x0 and, if the denoiser tells, the learned variance's fraction; in x's precision."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # half precision cannot tell times apart
    out = denoise(x, torch.full(x.shape[:1], level.t, dtype=dtype, device=x.device))
    x0, fraction = out if isinstance(out, tuple) else (out, None)
    return x0.to(x.dtype), fraction


def _learned_std(fraction: Tensor | None, beta: float, small: float) -> Tensor:
    if fraction is None:
        raise UserError("variance=learned needs a model with learned_variance=true: take small or large")
    return torch.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(small)))


def _logsnr(level: Level) -> float:
    if level.alpha == 0 or level.sigma == 0:
        return math.copysign(math.inf, level.alpha - level.sigma)
    return math.log(level.alpha / level.sigma)


def _add_noise(
    x: Tensor, schedule: Schedule, now: Level, factor: float, scale: float, randn: Randn
) -> tuple[Tensor, Level]:
    """Raise sigma/alpha by `factor`, or as far as the schedule goes, by adding the noise that is missing."""
    t = schedule.t_at(torch.tensor([_logsnr(now) - math.log(factor)], dtype=torch.float64))
    raised = Level(t.item(), *(c.item() for c in schedule.alpha_sigma(t)))
    missing = (raised.sigma / raised.alpha) ** 2 - (now.sigma / now.alpha) ** 2
    x = raised.alpha * (x / now.alpha + scale * math.sqrt(max(missing, 0.0)) * randn(x))
    return x, raised
