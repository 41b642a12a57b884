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
from dalle.pipelines.variations import powers, slerp, truncated, turned
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


def test_slerp_goes_along_the_arc():
    p, q = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[math.cos(2), math.sin(2)]]).double()
    t = torch.tensor([0, 0.25, 0.5, 1]).double()
    wanted = torch.stack([torch.cos(2 * t), torch.sin(2 * t)], 1)
    torch.testing.assert_close(slerp(p, q, t), wanted)
    torch.testing.assert_close(slerp(3 * p, 3 * q, t), 3 * wanted)
    torch.testing.assert_close(slerp(p, 2 * p, t), (1 + t)[:, None] * p)
    longer = turned(2 * p, 4 * q, t)
    torch.testing.assert_close(longer, (2 + 2 * t)[:, None] * wanted)


@pytest.mark.parametrize("norm", [UNIT, WHITENED])
def test_interpolation_begins_and_ends_with_the_pictures(norm):
    pipeline, a, b = made(norm=norm), picture(0), picture(1)
    way = pipeline.interpolate(a, b, 5)
    assert way.shape == (5, 3, SIZE, SIZE)
    torch.testing.assert_close(way[:1], pipeline.variations(a, eta=0))
    torch.testing.assert_close(way[4:], pipeline.variations(b, eta=0))
    torch.testing.assert_close(pipeline.interpolate(a, b, 5, batch_size=2), way)
    turned_back = pipeline.interpolate(b, a, 5)
    torch.testing.assert_close(turned_back.flip(0), way, rtol=0, atol=1e-4)
    gaps = (way[1:] - way[:-1]).square().mean((1, 2, 3)).sqrt()
    assert gaps.max() < 2 * gaps.min()


def test_a_text_diff_turns_the_embedding_to_what_is_new_and_keeps_the_noise():
    pipeline, image, seen = made(), picture(), []
    sample = pipeline.decoder.sample
    pipeline.decoder.sample = lambda batch, **told: seen.append((batch, told)) or sample(batch, **told)
    known = pipeline.invert(image)
    way = pipeline.text_diff(image, "a ring", "a small red area", 0.5, 3, inverted=known)
    torch.testing.assert_close(way[:1], pipeline.variations(image, eta=0))
    batch, told = seen[1]
    old, new = nn.functional.normalize(pipeline.embed(["a ring", "a small red area"])["text_embed"], dim=-1)
    z_i = nn.functional.normalize(known.z_i[0], dim=0)
    z_d = nn.functional.normalize(new - old, dim=0)
    whole = torch.acos(z_i @ z_d)
    z = batch["image_embed"]
    torch.testing.assert_close(torch.acos((z @ z_i).clamp(-1, 1))[1:], whole * torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(torch.acos(z[2] @ z_d), whole / 2)
    assert torch.equal(told["noise"], known.x_T.expand(3, -1, -1, -1))


def test_a_reconstruction_keeps_the_first_principal_components():
    """Embeddings of which three directions are known, with a mean that is none of them."""
    axes = torch.eye(E)
    embeds = torch.cat([axes[0] + size * side * axes[1 + k] for k, size in enumerate((0.3, 0.2, 0.1))
                        for side in torch.tensor([-1.0, 1.0])[:, None, None]])  # fmt: skip
    norm = EmbedNorm("whitened").fit(embeds)
    z = torch.tensor([[2.0, 0.4, 0.2, 0.6]])
    unit = nn.functional.normalize(z, dim=-1)[0]
    mean = nn.functional.normalize(embeds, dim=-1).mean(0)
    rows = truncated(z, norm, [0, 1, 2, E])
    torch.testing.assert_close(rows[0], nn.functional.normalize(mean, dim=0))
    for row, known in ((rows[1], 1), (rows[2], 2)):
        wanted = mean.clone()
        wanted[1 : 1 + known] = unit[1 : 1 + known]
        torch.testing.assert_close(row, nn.functional.normalize(wanted, dim=0))
    torch.testing.assert_close(rows[3], unit)


def test_reconstructions_share_their_noise_and_end_with_all_that_is_known():
    pipeline, image, seen = made(norm=WHITENED), picture(), []
    sample = pipeline.decoder.sample
    pipeline.decoder.sample = lambda batch, **told: seen.append((batch, told)) or sample(batch, **told)
    out = pipeline.reconstruct(image, seed=4)
    batch, told = seen[0]
    assert out.shape == (4, 3, SIZE, SIZE)  # 0, 1, 2 and all of 4
    assert told["noise"].unique(dim=0).shape[0] == 1
    whole = WHITENED.encode(pipeline.clip.embed_image(image[None]))
    torch.testing.assert_close(batch["image_embed"][3:], whole, rtol=1e-4, atol=1e-4)
    assert out.unique(dim=0).shape == out.shape
    torch.testing.assert_close(pipeline.reconstruct(image, [4], seed=4), out[3:])
    torch.testing.assert_close(pipeline.reconstruct(image, seed=4, batch_size=3), out)
    assert not torch.allclose(pipeline.reconstruct(image, seed=5), out)


@pytest.mark.parametrize(("most", "wanted"), [(4, [0, 1, 2, 4]), (6, [0, 1, 2, 4, 6]), (1, [0, 1])])
def test_powers_end_with_all(most, wanted):
    assert powers(most) == wanted


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda p: p.invert(torch.zeros(3, 2, 4)), "the picture has 4 x 2 px; the decoder draws 4 x 4"),
        (lambda p: p.variations(picture(), eta=1.5), "eta is from 0 to 1, not 1.5"),
        (lambda p: p.variations(picture(), eta=math.nan), "eta is from 0 to 1, not nan"),
        (lambda p: p.variations(picture(), n=0), "n and batch_size must be at least 1"),
        (
            lambda p: p.variations(picture(), decoder={"sampler": Sampler("dpmpp")}),
            "done by DDIM alone, not by dpmpp; take sampler=ddim",
        ),
        (lambda p: p.interpolate(picture(), torch.zeros(3, 8, 8)), "the picture has 8 x 8 px"),
        (lambda p: p.interpolate(picture(), picture(1), 1), "frames are at least 2, both ends, not 1"),
        (lambda p: p.text_diff(picture(), "", "a", angle=0.0), "angle is a share of the arc"),
        (lambda p: p.text_diff(picture(), "", "a", angle=math.nan), "angle is a share .* not nan"),
        (lambda p: p.text_diff(picture(), "a cat", "a cat"), "CLIP sees no difference between 'a cat' and"),
        (lambda p: p.text_diff(picture(), "a " * 9, "a cat"), "is too long: CLIP reads 8 tokens"),
        (
            lambda p: p.reconstruct(picture()),
            "needs principal components .* datamodule.image_embed_norm=whitened keeps, not unit;",
        ),
        (lambda p: p.reconstruct(torch.zeros(3, 8, 8)), "the picture has 8 x 8 px"),
        (
            lambda p: made(norm=WHITENED).reconstruct(picture(), [2, 5]),
            r"each from 0 to 4, not \[2, 5\]",
        ),
        (lambda p: made(norm=WHITENED).reconstruct(picture(), []), r"each from 0 to 4, not \[\]"),
    ],
)
def test_mistakes_are_one_line(mistake, message):
    with pytest.raises(UserError, match=message) as error:
        mistake(made())
    assert "\n" not in str(error.value)
