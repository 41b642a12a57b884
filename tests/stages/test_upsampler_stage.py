"""The upsampler's stage: noise conditioning augmentation, sampling at any size, in tiles."""

import math
from functools import partial

import pytest
import torch

from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.noise import per_sample
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.errors import UserError
from dalle.nets.upsampler import UpsamplerUNet
from dalle.stages.upsampler import UpsamplerStage, augmented


def make_stage(noise: float = 0.1, **options) -> UpsamplerStage:
    torch.manual_seed(0)
    net = UpsamplerUNet(
        image_size=32, factor=2, channels=3, out_channels=3, width=16, multipliers=[1, 1], blocks=1,
        patch=2, residual=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(noise * torch.randn(p.shape, generator=generator))
    denoiser = partial(Denoiser, schedule=Schedule("flow", 1000), prediction="x0")
    return UpsamplerStage(net, denoiser, Sampler("ddim", 3), **options).eval()


def make_batch(size: int = 2, side: int = 16) -> dict:
    generator = torch.Generator().manual_seed(2)
    low = torch.rand(size, 3, side, side, generator=generator) * 2 - 1
    return {"image": torch.rand(size, 3, 2 * side, 2 * side, generator=generator) * 2 - 1, "low": low}


def test_the_level_of_the_noise():
    """low_s = sqrt(1 - s^2) low + s eps: variance 1 stays 1."""
    low, noise = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5])
    low, noise = (x.view(2, 1, 1, 1).expand(2, 3, 4, 4) for x in (low, noise))
    made = augmented(low, torch.tensor([0.0, 0.6]), noise)
    torch.testing.assert_close(made[0], low[0])
    torch.testing.assert_close(made[1], torch.full((3, 4, 4), 0.8 * 2 + 0.6 * 0.5))


def test_the_network_is_told_the_level_that_its_small_picture_has():
    stage, seen = make_stage(noise_max=0.5, noise_level=0.25), {}
    stage.denoiser.losses = lambda x, **cond: (seen.update(cond), (torch.ones(len(x)),) * 2)[1]
    zeros = {"image": torch.zeros(512, 3, 4, 4), "low": torch.zeros(512, 3, 16, 16)}
    stage.train().step(zeros)
    spread = seen["low"].flatten(1).std(1)
    torch.testing.assert_close(spread, seen["level"], rtol=0.15, atol=0.005)
    assert seen["level"].min() < 0.02
    assert 0.48 < seen["level"].max() <= 0.5
    stage.eval().step(zeros)
    assert seen["level"].eq(0.25).all()


def test_sampling_adds_the_noise_it_tells_of():
    stage, batch = make_stage(), make_batch()
    plain, noisy = (stage.sample(batch, noise_level=s, randn=per_sample([0, 1])) for s in (None, 0.2))
    assert plain.shape == noisy.shape == batch["image"].shape
    assert plain.abs().max() <= 1
    assert not torch.allclose(plain, noisy, atol=1e-3)


def test_a_picture_does_not_depend_on_its_batch():
    stage, batch = make_stage(noise_level=0.1), make_batch()
    alone = stage.sample({"low": batch["low"][1:]}, randn=per_sample([1]))
    together = stage.sample(batch, randn=per_sample([0, 1]))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (24, 10), (15, 33)])
def test_any_size_is_drawn(shape):
    low = torch.zeros(1, 3, *shape)
    assert make_stage().sample({"low": low}).shape == (1, 3, 2 * shape[0], 2 * shape[1])


def test_tiles_are_the_whole_but_for_what_norms_see():
    """Group norms average over a tile in place of the picture: hence near, not equal."""
    stage, batch = make_stage(noise=0.03), make_batch(1, side=32)
    whole, tiles = (stage.sample(batch, randn=per_sample([0]), tile=tile) for tile in (None, 32))
    change = (whole - stage.sample(batch, randn=per_sample([1]))).abs().mean()
    assert not torch.equal(whole, tiles)
    assert (whole - tiles).abs().mean() < 0.3 * change
    assert torch.equal(stage.sample(batch, randn=per_sample([0]), tile=64), whole)


def test_more_noise_than_trained_with_is_refused():
    with pytest.raises(UserError, match=r"noise_level=0.5 is more noise than model.noise_max=0.2"):
        make_stage(noise_level=0.5)
    stage = make_stage()
    with pytest.raises(UserError, match=r"noise_level=nan is not from 0 to 0.2, the most noise"):
        stage.sample(make_batch(), noise_level=math.nan)
    with pytest.raises(UserError, match=r"noise_level=0.3 is not from 0 to 0.2"):
        stage.check(noise_level=0.3)
    stage.check(noise_level=0.2)
