"""Pictures moved in DALL-E 2's latents (z_i, x_T), by a decoder that is the exact denoiser of Gaussian ones
around what their embedding says.
"""

import math

import pytest
import torch
from pipelines.test_unclip import UNIT, E, FakeCLIP, FakePrior
from torch import nn

from dalle.data.embed_norm import EmbedNorm
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.errors import UserError
from dalle.pipelines.unclip import UnCLIP
from dalle.stages.decoder import DecoderStage

SIZE, STD = 4, 0.4
SCHEDULE = Schedule("cosine")
QUARTERS = SIZE // 2


class SeeingCLIP(FakeCLIP):
    """A picture's embedding: the means of the first channel's quarters."""

    def embed_image(self, image):
        return nn.functional.avg_pool2d(image[:, :1], QUARTERS).flatten(1) * 3


class Gaussian(nn.Module):
    """E[x_0 | x_t] of pictures of standard deviation STD, whose quarters have the embedding's means / 5."""

    image_size, channels, embed_dim = SIZE, 3, E

    def __init__(self):
        super().__init__()
        self.weight, self.heard = nn.Parameter(torch.ones(())), []

    def forward(self, x, t, *, image_embed, keep_text, keep_image, **_):
        self.heard.append((keep_text.any().item(), keep_image.all().item(), len(x)))
        mean = image_embed.view(-1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3) / 5
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in SCHEDULE.alpha_sigma(t))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return mean + gain * (x - alpha * mean)


def made(steps: int = 25, norm: EmbedNorm = UNIT) -> UnCLIP:
    def denoiser(net):
        return Denoiser(net, SCHEDULE, "x0")

    stage = DecoderStage(Gaussian(), denoiser, Sampler("ddim", steps=steps, eta=0.7), thresholding="none")
    return UnCLIP(SeeingCLIP(), FakePrior(norm), stage, norm, norm)


def picture(seed: int = 0) -> torch.Tensor:
    return (torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * STD).clamp(-0.9, 0.9)


WHITENED = EmbedNorm("whitened").fit(torch.randn(50, E, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("norm", [UNIT, WHITENED])
def test_a_picture_becomes_its_embedding_and_noise_and_comes_back(norm):
    pipeline, image = made(norm=norm), picture()
    z_i, x_T, error = pipeline.invert(image)
    assert torch.equal(z_i, pipeline.clip.embed_image(image[None]))
    mean = norm.encode(z_i).view(1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3) / 5
    torch.testing.assert_close(x_T, (image - mean) / STD, rtol=0.1, atol=0.01)  # the probability flow
    again = pipeline.variations(image, eta=0)
    assert error == pytest.approx((again[0] - image).square().mean().sqrt().item(), rel=1e-4, abs=1e-7)
    assert error < 0.01
    assert made(steps=100, norm=norm).invert(image).error < error
    assert not any(text for text, _, _ in pipeline.decoder.net.heard)
    assert all(embed and count == 1 for _, embed, count in pipeline.decoder.net.heard)  # no guidance


def test_variations_share_an_embedding_and_differ_the_more_the_more_noise_there_is():
    pipeline, image = made(), picture()

    def distance(eta: float) -> float:
        return (pipeline.variations(image, 64, eta) - image).square().mean().sqrt().item()

    near, far = distance(0.2), distance(1.0)
    assert 0.02 < near < 0.8 * far
    many = pipeline.variations(image, 5, seed=2)
    assert many.unique(dim=0).shape == (5, 3, SIZE, SIZE)
    assert torch.equal(pipeline.variations(image, 5, seed=2, batch_size=2), many)
    assert not torch.equal(pipeline.variations(image, 1, seed=3)[0], many[0])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda p: p.invert(torch.zeros(3, 2, 4)), "the picture has 4 x 2 px; the decoder draws 4 x 4"),
        (lambda p: p.variations(picture(), eta=1.5), "eta is from 0 to 1, not 1.5"),
        (lambda p: p.variations(picture(), eta=math.nan), "eta is from 0 to 1, not nan"),
        (lambda p: p.variations(picture(), n=0), "n and batch_size must be at least 1"),
        (
            lambda p: p.variations(picture(), decoder={"sampler": Sampler("dpmpp")}),
            "sampler dpmpp cannot be undone; take sampler=ddim",
        ),
    ],
)
def test_mistakes_are_one_line(mistake, message):
    with pytest.raises(UserError, match=message) as error:
        mistake(made())
    assert "\n" not in str(error.value)
