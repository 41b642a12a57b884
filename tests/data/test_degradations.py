"""What spoils small pictures: exact kernels, sizes, seeds, and that each step does what it says."""

import math

import numpy as np
import pytest
import torch

from dalle.data.degradations import (
    BSR,
    GaussianBlur,
    blurred,
    degradation_of,
    gaussian_kernel,
    jpeg,
    shrunk,
)


def picture(side: int = 32, seed: int = 0) -> torch.Tensor:
    """Waves: neither flat nor noise."""
    place = torch.linspace(0, 6, side)
    phase = torch.tensor([0.0, 1.0, 2.0])[:, None, None] + seed
    return torch.sin(place[:, None] + phase) * torch.cos(2 * place + phase)


def test_the_papers_kernel():
    """3 x 3, sigma 0.6: exp(-1 / 0.72) beside the middle."""
    kernel, side = gaussian_kernel(3, (0.6, 0.6)), math.exp(-1 / 0.72)
    row = torch.tensor([side, 1.0, side]) / (1 + 2 * side)
    torch.testing.assert_close(kernel, torch.outer(row, row))
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(GaussianBlur().kernel, kernel)


@pytest.mark.parametrize(("sigma", "angle"), [((1.5, 1.5), 0.0), ((2.0, 0.7), 0.6), ((0.1, 3.0), 1.2)])
def test_kernels_keep_brightness(sigma, angle):
    kernel = gaussian_kernel(15, sigma, angle)
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(kernel, kernel.flip(0, 1))
    flat = torch.full((1, 3, 9, 9), 0.4)
    torch.testing.assert_close(blurred(flat, kernel), flat)


def test_axes_and_angle():
    wide, turned = gaussian_kernel(21, (3.0, 1.0)), gaussian_kernel(21, (3.0, 1.0), math.pi / 2)
    torch.testing.assert_close(turned, wide.T)
    place = torch.arange(21.0) - 10
    assert (wide.sum(0) * place.square()).sum().sqrt().item() == pytest.approx(3.0, rel=0.01)
    assert (wide.sum(1) * place.square()).sum().sqrt().item() == pytest.approx(1.0, rel=0.01)
    shifted = gaussian_kernel(21, (1.0, 1.0), shift=1.5)
    assert (shifted.sum(0) * place).sum().item() == pytest.approx(1.5, abs=1e-4)


def test_blur_comes_as_often_as_asked():
    image, blur = picture(8), GaussianBlur(probability=0.5)
    clean, rng = shrunk(image, 2), np.random.default_rng(0)
    same = [torch.equal(blur(image, 2, rng), clean) for _ in range(400)]
    assert np.mean(same) == pytest.approx(0.5, abs=0.07)
    assert torch.equal(GaussianBlur(probability=0.0)(image, 2, rng), clean)
    torch.testing.assert_close(GaussianBlur(probability=1.0)(image, 2, rng),
                               blurred(clean[None], blur.kernel)[0])  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "blur", "bsr", "bsr_light"])
@pytest.mark.parametrize("factor", [2, 4])
def test_sizes_range_and_seeds(kind, factor):
    image, degrade = picture(), degradation_of(kind)
    made = [degrade(image, factor, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert made[0].shape == (3, 32 // factor, 32 // factor)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2]) == (kind == "none")
    assert all(x.abs().max() <= 1 for x in made)


def test_the_light_one_spoils_less():
    image = picture(64)
    clean = shrunk(image, 4)

    def error(light: bool) -> float:
        some = (BSR(light)(image, 4, np.random.default_rng(seed)) for seed in range(20))
        return float(np.mean([(x - clean).square().mean().item() for x in some]))

    assert 0.0001 < error(True) < 0.7 * error(False)


def test_the_light_one_leaves_half_of_the_pictures_as_they_are():
    image, degrade, rng = picture(16), degradation_of("bsr_light"), np.random.default_rng(0)
    clean = shrunk(image, 2)
    same = [torch.equal(degrade(image, 2, rng), clean) for _ in range(400)]
    assert np.mean(same) == pytest.approx(0.5, abs=0.07)
    assert not any(torch.equal(degradation_of("bsr")(image, 2, rng), clean) for _ in range(20))


def test_what_is_spoilt_is_still_in_its_place():
    """No step may shift a picture: the mean of many is nearest to the clean one where it was."""
    image = torch.full((3, 64, 64), -1.0)
    image[:, 24:40, 20:44] = 1
    mean = torch.stack([BSR()(image, 4, np.random.default_rng(seed)) for seed in range(60)]).mean(0)
    place = torch.arange(16) + 0.5
    mass = (mean + 1).mean(0)
    assert (mass.sum(0) * place).sum().item() / mass.sum().item() == pytest.approx(8, abs=0.1)
    assert (mass.sum(1) * place).sum().item() / mass.sum().item() == pytest.approx(8, abs=0.1)


def test_jpeg_loses_more_at_lower_quality():
    image = picture(64)
    worse, better = ((jpeg(image, quality) - image).square().mean().item() for quality in (30, 95))
    assert 0 < better < worse < 0.05


def test_noise_is_as_strong_as_it_says():
    flat = torch.zeros(1, 3, 64, 64)
    spread = [BSR().add_noise(flat, np.random.default_rng(seed)).std().item() * 127.5 for seed in range(60)]
    assert 1 < min(spread) < 6 < 20 < max(spread) < 27
