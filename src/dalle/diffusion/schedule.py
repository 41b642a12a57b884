"""Noise schedules: how much image and how much noise there is at a time t.

x_t = alpha(t) x_0 + sigma(t) eps, with t in [0, 1]: t = 0 is exactly clean (alpha 1, sigma 0), t = 1
noisiest. `linear` (Ho et al. 2020), `scaled_linear` (Rombach et al. 2022), `cosine` (Nichol & Dhariwal
2021) and `sigmoid` (level form, Jabri et al. 2022) are variance preserving (alpha^2 + sigma^2 = 1) and made
of discrete levels: level i = 0 .. steps-1 sits at t = (i+1) / steps, with ln alpha linear in between
(DPM-Solver, Lu et al. 2022). `flow` is the straight path of rectified flow (Liu et al. 2022), not variance
preserving: alpha = 1 - t, sigma = t.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.errors import UserError
from dalle.machine import precise
from dalle.ranges import Positive, Steps

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "flow")
SPACINGS = ("strided", "trailing", "leading", "uniform", "logsnr", "edm", "fast27")
LOGSNR_FLOOR = -5.1  # ln(alpha/sigma); below it DPM-Solver's steps are unstable (Lu et al. 2022b)
ZERO = -1e4  # ln alpha where alpha is 0: finite, so that it interpolates; exp of it is exactly 0

Number = TypeVar("Number", float, Tensor)


def expand(coefficient: Float[Tensor, "B"], like: Float[Tensor, "B ..."]) -> Tensor:
    """(B,) -> (B, 1, ...), to multiply `like`."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def posterior(
    alpha: Number, sigma: Number, alpha_prev: Number, sigma_prev: Number
) -> tuple[Number, Number, Number, Number]:
    """q(x_prev | x_t, x_0) for any Gaussian path (Kingma et al. 2021, eq. 25-27; Ho et al. 2020, eq. 6-7).

    Returns c0, ct, beta, variance: its mean is c0 x_0 + ct x_t; beta is the variance of q(x_t | x_prev).
    """
    ratio = alpha / alpha_prev
    kept = (sigma_prev / sigma) ** 2
    beta = sigma**2 - ratio**2 * sigma_prev**2
    return alpha_prev * beta / sigma**2, ratio * kept, beta, beta * kept


class Level(NamedTuple):
    """One noise level in Python floats, as a sampler's step uses it."""

    t: float
    alpha: float
    sigma: float


@dataclass(frozen=True)
class Levels:
    """The N+1 noise levels a sampler visits in N steps, the last one clean. All (N+1,) float64 on the CPU."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    schedule: "Schedule"

    def __len__(self) -> int:
        return len(self.t) - 1

    def last(self, steps: int) -> "Levels":
        """Those of the last `steps` steps."""
        kept = slice(len(self) - steps, None)
        return Levels(self.t[kept], self.alpha[kept], self.sigma[kept], self.schedule)

    def steps(self) -> Iterator[tuple[int, Level, Level]]:
        """(step number, level one is at, level one goes to)."""
        points = list(map(Level, self.t.tolist(), self.alpha.tolist(), self.sigma.tolist()))
        return zip(range(len(self)), points[:-1], points[1:], strict=True)


class Schedule:
    """alpha(t) and sigma(t), and the levels a sampler visits.

    `steps` is the number T of discrete levels. `zero_terminal_snr` shifts and scales alpha so that t = 1 is
    pure noise (Lin et al. 2024, algorithm 1); it needs v or x0 prediction. `flow` ends in pure noise anyway.
    `shift` multiplies sigma/alpha at every t: above 1, training and sampling spend more of their time where
    large, redundant pictures are decided (Hoogeboom et al. 2023, sec. 2; flow: Esser et al. 2024, eq. 23).
    """

    def __init__(
        self, name: str, steps: Steps = 1000, zero_terminal_snr: bool = False, shift: Positive = 1.0
    ):
        if name not in SCHEDULES:
            raise UserError(f"unknown noise schedule '{name}': choose one of {', '.join(SCHEDULES)}")
        if steps < 2:
            raise UserError(f"a noise schedule needs at least 2 steps, not {steps}")
        if shift <= 0:
            raise UserError(f"the shift of a noise schedule must be above 0, not {shift}")
        self.name, self.steps, self.shift = name, steps, shift
        self.variance_preserving = name != "flow"
        self.ends_in_pure_noise = zero_terminal_snr or name == "flow"
        self._tables: dict[torch.device, Tensor] = {}
        if self.variance_preserving:
            cpu = torch.device("cpu")
            with cpu:  # whatever device a network around it is being made on
                log_alpha = 0.5 * torch.log1p(-betas(name, steps)).cumsum(0)
                log_alpha -= 0.5 * torch.log1p((shift**2 - 1) * -torch.expm1(2 * log_alpha))
                if zero_terminal_snr:
                    first, last = log_alpha[0].exp(), log_alpha[-1].exp()
                    log_alpha = ((log_alpha.exp() - last) * first / (first - last)).log().clamp(min=ZERO)
                # ln alpha at t = 0, 1/T, ..., 1
                self._tables[cpu] = torch.cat([log_alpha.new_zeros(1), log_alpha])

    def __repr__(self) -> str:
        end = self.ends_in_pure_noise
        return f"Schedule({self.name!r}, steps={self.steps}, shift={self.shift}, ends_in_pure_noise={end})"

    def alpha_sigma(self, t: Float[Tensor, "*B"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
        """alpha and sigma at times t, in t's dtype and on its device, computed in float64."""
        if not self.variance_preserving:
            sigma = self.shift * t / (1 + (self.shift - 1) * t)
            return 1 - sigma, sigma
        table = self._table(t.device)
        level = (precise(t) * self.steps).clamp(0, self.steps)
        nearest = level.round()  # the rounding of t must not move it off a discrete level
        level = torch.where((level - nearest).abs() < torch.finfo(t.dtype).eps * self.steps, nearest, level)
        below = level.floor().clamp(max=self.steps - 1).long()
        log_alpha = torch.lerp(table[below], table[below + 1], level - below)
        return log_alpha.exp().to(t.dtype), (-torch.expm1(2 * log_alpha)).sqrt().to(t.dtype)

    def t_at(self, logsnr: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """The inverse: the t at which ln(alpha/sigma) is this. float64 on the CPU."""
        if not self.variance_preserving:
            return torch.sigmoid(-logsnr - math.log(self.shift))
        table = self._table(logsnr.device)
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * logsnr)
        above = torch.searchsorted(-table, -log_alpha).clamp(1, self.steps)
        part = (log_alpha - table[above - 1]) / (table[above] - table[above - 1])
        return ((above - 1 + part) / self.steps).clamp(max=1.0)

    def levels(self, steps: int, spacing: str | None = None) -> Levels:
        """The levels of a sampler that takes `steps` steps.

        spacing: `strided` (evenly spaced indices, both ends kept; the default), `trailing`, `leading`
        ("ddimN"), `uniform` in t (the default of flow), `logsnr` (uniform in ln(alpha/sigma)), `edm`
        (Karras et al. 2022, eq. 5), or counts for equal sections of the schedule, cleanest first:
        "10,10,3,2,2"; `fast27` is GLIDE's. Where the schedule ends in pure noise, the first level is that,
        whatever the spacing (Lin et al. 2024, sec. 3.3). Raises UserError for a number of steps the spacing
        cannot give.
        """
        spacing = spacing or ("strided" if self.variance_preserving else "uniform")
        if steps < 1:
            raise UserError(f"a sampler needs at least 1 step, not {steps}")
        if spacing == "uniform":
            t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        elif spacing == "logsnr":
            t = self.t_at(torch.linspace(*self._logsnr_range(), steps, dtype=torch.float64))
        elif spacing == "edm":
            t = self.t_at(-self._edm_sigmas(steps).log())
        else:
            kept = torch.tensor(kept_indices(self.steps, steps, spacing)[::-1], dtype=torch.float64)
            t = (kept + 1) / self.steps
        if self.ends_in_pure_noise:
            t[0] = 1.0
        t = torch.cat([t, t.new_zeros(1)])
        return Levels(t, *self.alpha_sigma(t), self)

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            with torch.inference_mode(False):  # it outlives the sampling that first asked for it
                self._tables[device] = precise(self._tables[torch.device("cpu")], device)
        return self._tables[device]

    def _logsnr_range(self) -> tuple[float, float]:
        """Of the noisiest discrete level, or the floor, and of the cleanest."""
        alpha, sigma = self.alpha_sigma(torch.tensor([1.0, 1 / self.steps], dtype=torch.float64))
        noisiest, cleanest = (alpha / sigma).log().tolist()
        return max(noisiest, LOGSNR_FLOOR), cleanest

    def _edm_sigmas(self, steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
        alpha, sigma = self.alpha_sigma(torch.ones(1, dtype=torch.float64))
        high = min(high, (sigma / alpha).item())
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def betas(name: str, steps: int) -> Tensor:
    """The variances (steps,) of q(x_i | x_{i-1}) of the variance-preserving schedules, float64."""
    if name == "linear":  # Ho et al. 2020, sec. 4, for any number of steps
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64).clamp(max=0.999)
    if name == "scaled_linear":  # Rombach et al. 2022
        return torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    if name == "cosine":  # Nichol & Dhariwal 2021, eq. 17
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    else:  # sigmoid: Jabri et al. 2022, start -3, end 3, temperature 1
        low, high = torch.sigmoid(torch.tensor([-3.0, 3.0], dtype=torch.float64))
        alpha_bar = ((high - torch.sigmoid(6 * u - 3)) / (high - low)).clamp(1e-9, 1)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def kept_indices(total: int, steps: int, spacing: str) -> list[int]:
    """Which of `total` discrete levels a sampler of `steps` steps visits, cleanest first."""
    if steps > total:
        raise UserError(f"{steps} sampling steps, but the noise schedule has only {total} levels")
    if spacing == "strided":
        return even_sections(total, [steps]) if steps > 1 else [total - 1]
    if spacing == "trailing":
        return sorted(round(total - k * total / steps) - 1 for k in range(steps))
    if spacing == "leading":
        for stride in range(1, total + 1):
            if len(range(0, total, stride)) == steps:
                return list(range(0, total, stride))
        raise UserError(f"no whole stride gives {steps} of {total} levels: take spacing=strided")
    if spacing == "fast27":  # GLIDE's upsampler: the last level is moved off the end
        kept = even_sections(total, [10, 10, 3, 2, 2])
        kept[-1] = total - 3
    else:
        try:
            kept = even_sections(total, [int(count) for count in spacing.split(",")])
        except ValueError:
            known = f"choose {', '.join(SPACINGS)}, or counts of sections such as 10,5,5"
            raise UserError(f"unknown spacing '{spacing}': {known}") from None
    if len(kept) != steps:
        raise UserError(f"spacing '{spacing}' makes {len(kept)} steps, not {steps}: set steps={len(kept)}")
    return kept


def even_sections(total: int, counts: list[int]) -> list[int]:
    """Split 0 .. total-1 into equal sections; keep `counts` evenly spaced indices of each with both ends."""
    size, extra = divmod(total, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise UserError(f"cannot keep {count} of the {length} levels of section {section + 1}")
        stride = (length - 1) / (count - 1) if count > 1 else 0.0
        position = 0.0  # summed up as the reference does: rounding half to even depends on it
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept
