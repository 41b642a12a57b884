"""Restoring through known linear degradations: against dense algebra, and exact for a Gaussian."""

import pytest
import torch
import torch.nn.functional as F

from dalle.data.degradations import blurred, gaussian_kernel, shrunk
from dalle.diffusion.restoration import (
    Hidden,
    Separable,
    blur,
    estimated_noise,
    given,
    misfit,
    nothing,
    shrinking,
)
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.errors import UserError

SIZE = 8
MASK = torch.zeros(SIZE, SIZE, dtype=torch.bool)
MASK[2:5, 1:6] = True
KINDS = {
    "nothing": nothing(SIZE),
    "blur": blur(SIZE, 0.7),
    "shrinking": shrinking(SIZE, 2),
    "hidden": Hidden(MASK),
    "any": Separable(torch.randn(5, SIZE), torch.randn(SIZE, SIZE)),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def pictures(b: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).double()


def matrix(degradation) -> torch.Tensor:
    """H as a matrix (h w, H W)."""
    basis = torch.eye(SIZE * SIZE, dtype=torch.float64).view(-1, 1, SIZE, SIZE)
    return degradation(basis).flatten(1).T


def posterior(
    h: torch.Tensor, mean: torch.Tensor, y: torch.Tensor, noise: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, H W) and covariance of x, having been N(mean, 1), given y = h x + noise."""
    gain = h.T @ torch.linalg.inv(h @ h.T + noise**2 * torch.eye(len(h)))
    return mean + (y - mean @ h.T) @ gain.T, torch.eye(h.shape[1]) - gain @ h


@every_kind
@pytest.mark.parametrize("noise", [0.3, 0.02])
def test_the_likeliest_is_that_of_dense_algebra(kind, noise):
    h, x, spread = matrix(KINDS[kind]), pictures(2), torch.tensor([0.5, 1.3]).double()
    y = KINDS[kind](pictures(2, seed=1))
    made = KINDS[kind].likeliest(x, y, spread, noise)
    for i in range(2):
        s, flat, seen = spread[i], x[i].flatten(1), y[i].flatten(1)
        exact = posterior(h, flat / s, seen / s, noise / s.item())[0] * s
        torch.testing.assert_close(made[i].flatten(1), exact, rtol=0, atol=1e-5)


@every_kind
def test_without_noise_all_that_is_seen_is_believed_and_nothing_else_changes(kind):
    x, y = pictures(2), KINDS[kind](pictures(2, seed=1))
    made = KINDS[kind].likeliest(x, y, torch.ones(2).double(), 0.0)
    torch.testing.assert_close(KINDS[kind](made), y, rtol=0, atol=2e-4)
    torch.testing.assert_close(
        KINDS[kind].likeliest(x, KINDS[kind](x), torch.ones(2), 0.0), x, rtol=0, atol=1e-5
    )


def analytic(schedule: Schedule, mean: torch.Tensor):
    """The denoiser of pictures that are N(mean, 1) in every pixel."""

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in schedule.alpha_sigma(t))
        return mean + alpha / (alpha**2 + sigma**2) * (x_t - alpha * mean)

    return denoise


@every_kind
@pytest.mark.parametrize("method", ["ddim", "dpmpp", "heun"])
def test_a_gaussian_is_restored_to_its_exact_posterior_mean(kind, method):
    """Noise of 0 is the middle of what is drawn; a straight path begins there, so any steps will do."""
    schedule, noise, mean = Schedule("flow"), 0.2, pictures(1, 1, seed=5)
    y = KINDS[kind](pictures(3, 1, seed=1)) + noise * KINDS[kind](pictures(3, 1, seed=2))
    denoise = given(analytic(schedule, mean), KINDS[kind], y, noise, schedule)
    made = Sampler(method, 6)(denoise, torch.zeros_like(pictures(3, 1)), schedule)
    exact = posterior(matrix(KINDS[kind]), mean.flatten(1), y.flatten(1), noise)[0]
    torch.testing.assert_close(made.flatten(1), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["blur", "shrinking", "hidden"])
@pytest.mark.parametrize(("name", "rtol"), [("flow", 0.01), ("cosine", 0.01)])
def test_a_gaussian_is_restored_with_the_spread_of_its_posterior(kind, name, rtol):
    """Deterministic sampling is linear in the noise: every pixel's is followed alone."""
    schedule, noise, count = Schedule(name, zero_terminal_snr=name != "flow"), 0.2, SIZE * SIZE
    y = KINDS[kind](pictures(1, 1, seed=1)).expand(count + 1, -1, -1, -1)
    denoise = given(
        analytic(schedule, torch.zeros(1, 1, SIZE, SIZE).double()), KINDS[kind], y, noise, schedule
    )
    start = torch.cat((torch.zeros(1, count), torch.eye(count))).double().view(-1, 1, SIZE, SIZE)
    made = Sampler("heun", 80)(denoise, start, schedule).flatten(1)
    exact = posterior(matrix(KINDS[kind]), torch.zeros(1, count).double(), y[:1].flatten(1), noise)
    torch.testing.assert_close(made[:1], exact[0], rtol=0, atol=1e-4)
    spread = (made[1:] - made[:1]).T
    torch.testing.assert_close(spread @ spread.T, exact[1], rtol=0, atol=rtol)


def test_what_a_denoiser_tells_of_its_variance_stays():
    schedule, x, t = Schedule("cosine"), pictures(2), torch.full((2,), 0.5).double()
    told, fraction = given(lambda x_t, t: (x_t, t), nothing(SIZE), x, 0.1, schedule)(x + 1, t)
    assert fraction is t
    assert torch.equal(told, given(lambda x_t, t: x_t, nothing(SIZE), x, 0.1, schedule)(x + 1, t))
    assert not torch.equal(told, x + 1)


def test_blur_and_shrinking_are_those_of_the_data():
    image = 0.5 * torch.randn(2, 3, 12, 12).clamp(-1, 1)
    kernel = gaussian_kernel(2 * 4 + 1, (1.3, 1.3))
    torch.testing.assert_close(blur(12, 1.3)(image), blurred(image, kernel), rtol=0, atol=1e-5)
    torch.testing.assert_close(shrinking(12, 3)(image), shrunk(image, 3), rtol=0, atol=1e-5)


def test_noise_is_told_by_a_picture_that_is_smooth_elsewhere():
    smooth = F.interpolate(torch.randn(1, 3, 4, 4), 64, mode="bilinear")
    for noise in (0.02, 0.1, 0.4):
        seen = estimated_noise((smooth + noise * torch.randn(1, 3, 64, 64))[0])
        assert seen == pytest.approx(noise, rel=0.1)


def test_noise_is_told_where_it_was_cut_at_black_and_white():
    generator = torch.Generator().manual_seed(0)
    for black, white in ((0.0, 1.0), (0.4, 0.0), (0.3, 0.3)):
        image = torch.zeros(3, 64, 64)
        image[:, : round(64 * black)], image[:, 64 - round(64 * white) :] = -1.0, 1.0
        for noise in (0.02, 0.1, 0.4):
            spoilt = (image + noise * torch.randn(image.shape, generator=generator)).clamp(-1, 1)
            assert estimated_noise(spoilt) == pytest.approx(noise, rel=0.12)
    assert estimated_noise(torch.ones(3, 16, 16)) == 0


def test_pictures_that_no_factor_divides():
    with pytest.raises(UserError, match="pictures of 8 px cannot be made 3 times smaller"):
        shrinking(8, 3)


@pytest.mark.parametrize("name", ["flow", "cosine"])
def test_a_misfit_is_the_mean_error_of_what_is_kept(name):
    schedule, seen = Schedule(name), []
    image, told = pictures(1)[0].float(), pictures(2, seed=1).float()

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        seen.append((x, sigma / alpha))
        return told

    noise = list(pictures(6, seed=2).float().unflatten(0, (3, 2)))
    found = misfit(denoise, image, MASK, noise, schedule)
    exact = (told - image).square()[..., ~MASK].mean((1, 2))
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(
        torch.stack([ratio[0] for _, ratio in seen]), torch.tensor([8.0, 4.0, 2.0]), rtol=0.02, atol=0
    )
    hidden = misfit(denoise, image.masked_fill(MASK, 9.0), MASK, noise, schedule)
    assert torch.equal(hidden, found)
    assert torch.equal(seen[0][0], seen[3][0])
