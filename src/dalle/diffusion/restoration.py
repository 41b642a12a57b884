"""Restoring a picture x that is known through y = H x + noise, H linear and known: noise, blur, a mask, fewer
pixels. No network is trained for it; a denoiser is the prior.

`given` is a function from denoiser to denoiser, as those in `guidance.py`: an estimate of x_0 from x_t
becomes one from x_t and y, so every sampler restores. What is left uncertain of x_0 at x_t is taken for
independent and equal in all pixels, r^2 = sigma^2 / (alpha^2 + sigma^2), as of data with variance 1 (Song et
al. 2023, PiGDM, sec. 3.1; without its Jacobian). In the singular value decomposition H = U S V^T (Kawar et
al. 2022, DDRM) the estimate is

    V^T x_0' = V^T x_0 + s r^2 / (s^2 r^2 + noise^2) (U^T y - s V^T x_0)

which without noise puts in all that y says, as DDNM does (Wang et al. 2023, eq. 13): x_0 + H^+ (y - H x_0).
"""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dalle.diffusion.samplers import Denoise
from dalle.diffusion.schedule import Schedule, expand
from dalle.errors import UserError

NOISIEST = 8.0  # sigma/alpha at which a denoiser tells where things are, by its conditions more than by x_t
NOTHING = 1e-4  # singular values below it are rounding
WHOLE, CUT = 0.6745, 0.3555  # median of |a - b - c + d| / 2 of Gaussian noise, whole and without its one half


@runtime_checkable
class Degradation(Protocol):
    """A linear H, which spoils pictures of one size."""

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """H x."""
        ...

    def likeliest(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "#B C h w"],
        spread: Float[Tensor, "B"],
        noise: float,
    ) -> Float[Tensor, "B C H W"]:
        """The mean of what x may be, having been N(x, spread^2), where H x + `noise` N(0, 1) is seen as y."""
        ...


class Separable:
    """Rows and columns by a matrix each: y = `rows` x `columns`^T. Blurs and resizings are."""

    def __init__(self, rows: Float[Tensor, "h H"], columns: Float[Tensor, "w W"]) -> None:
        self.rows, self.columns = rows, columns
        self.left, heights, self.down = torch.linalg.svd(rows.double(), full_matrices=False)
        self.right, widths, self.across = torch.linalg.svd(columns.double(), full_matrices=False)
        self.singular = heights[:, None] * widths

    def move(self, x: Tensor) -> None:
        """To where x is, once: a step that copies from the host waits for all that came before."""
        if self.rows.device != x.device:
            for name, part in list(vars(self).items()):
                setattr(self, name, part.to(x))

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        self.move(x)
        return self.rows.to(x) @ x @ self.columns.to(x).T

    def likeliest(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "#B C h w"],
        spread: Float[Tensor, "B"],
        noise: float,
    ) -> Float[Tensor, "B C H W"]:
        self.move(x)
        left, right, down, across, s = (
            part.to(x) for part in (self.left, self.right, self.down, self.across, self.singular)
        )
        off = left.T @ y @ right - s * (down @ x @ across.T)
        variance = expand(spread, x).square()
        seen = s.square() * variance + noise**2
        gain = torch.where((s > NOTHING) & (seen > 0), s * variance / seen.clamp(min=1e-20), 0.0)
        return x + down.T @ (gain * off) @ across


class Hidden:
    """Pixels that are hidden are 0 (a middle gray)."""

    def __init__(self, mask: Bool[Tensor, "H W"]) -> None:
        self.mask = mask

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        self.mask = self.mask.to(x.device)  # once
        return x.masked_fill(self.mask, 0.0)

    def likeliest(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "#B C H W"],
        spread: Float[Tensor, "B"],
        noise: float,
    ) -> Float[Tensor, "B C H W"]:
        variance = expand(spread, x).square()
        gain = variance / (variance + noise**2) if noise else torch.ones_like(variance)
        self.mask = self.mask.to(x.device)  # once
        return torch.where(self.mask, x, x + gain * (y - x))


def given(
    denoise: Denoise, degradation: Degradation, y: Float[Tensor, "#B C h w"], noise: float, schedule: Schedule
) -> Denoise:
    """A denoiser whose estimate of x_0 is one from x_t and y; what it tells of the variance stays.

    Args:
        y: the spoilt pictures, or one for all.
        noise: standard deviation of what was added to them, in units of [-1, 1]; 0 trusts them bit for bit.
    """

    def told(x_t: Tensor, t: Tensor, **cond) -> Tensor | tuple[Tensor, Tensor | None]:
        out = denoise(x_t, t, **cond)
        x0, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        alpha, sigma = schedule.alpha_sigma(t)
        spread = sigma / (alpha.square() + sigma.square()).sqrt()
        x0 = degradation.likeliest(x0, y.to(x0), spread.to(x0), noise)
        return x0 if rest is None else (x0, *rest)

    return told


def misfit(
    denoise: Denoise,
    image: Float[Tensor, "3 H W"],
    mask: Bool[Tensor, "H W"],
    noise: Sequence[Float[Tensor, "B 3 H W"]],
    schedule: Schedule,
) -> Float[Tensor, "B"]:
    """How badly a denoiser tells what is not hidden of a picture of which noise leaves little: mean squares
    of its errors, at as many noise levels as there are noises, up to `NOISIEST`.
    """
    mask = mask.to(image.device)
    kept, errors = image.masked_fill(mask, 0.0), []
    for number, eps in enumerate(noise):
        t = schedule.t_at(torch.tensor([-math.log(NOISIEST / 2**number)])).to(eps)
        alpha, sigma = schedule.alpha_sigma(t)
        out = denoise(alpha * kept + sigma * eps, t.expand(len(eps)))
        x0 = out[0] if isinstance(out, tuple) else out
        errors.append((x0 - image)[..., ~mask].square().mean((1, 2)))
    return torch.stack(errors).mean(0)


def nothing(size: int) -> Separable:
    """Only noise is added."""
    return Separable(torch.eye(size), torch.eye(size))


def blur(size: int, sigma: float) -> Separable:
    """A Gaussian of this standard deviation in pixels; beyond the edges the picture goes on as it ends.

    Raises:
        UserError: none, or one that is wider than the picture.
    """
    if not 0 < sigma <= size:
        raise UserError(
            "blur is the standard deviation of a Gaussian in pixels, above 0 and at most the picture's side "
            f"of {size}, not {sigma}"
        )
    half = max(1, round(3 * sigma))
    place = torch.arange(-half, half + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (place / sigma).square())
    kernel = (weight / weight.sum())[None, None]
    lines = torch.eye(size, dtype=torch.float64)[:, None]
    matrix = F.conv1d(F.pad(lines, (half, half), mode="replicate"), kernel)[:, 0].T.float()
    return Separable(matrix, matrix)


def shrinking(size: int, factor: int) -> Separable:
    """Bicubic and without aliases, as `dalle.data.degradations.shrunk` but for its clamping."""
    if size % factor:
        raise UserError(f"pictures of {size} px cannot be made {factor} times smaller")
    lines = torch.eye(size, dtype=torch.float64)[None, None]
    less = F.interpolate(lines, (size // factor, size), mode="bicubic", antialias=True, align_corners=False)
    return Separable(less[0, 0].float(), less[0, 0].float())


def estimated_noise(image: Float[Tensor, "3 H W"]) -> float:
    """Standard deviation of the noise in a picture that is smooth in most places: of its finest diagonal
    waves (Haar's), whose median edges do not move (Donoho & Johnstone 1994, sec. 4.1).

    What was black or white has lost half of its noise there, to -1 or 1: twice as many values as lie at
    these ends count as such.
    """
    even = image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
    diagonal = (even[:, ::2, ::2] - even[:, 1::2, ::2] - even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 2
    at_ends = min(1.0, 2 * (image.abs() == 1).float().mean().item())
    return diagonal.abs().median().item() / (WHOLE + (CUT - WHOLE) * at_ends)
