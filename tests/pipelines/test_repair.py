"""Pictures mended by a decoder as the prior: its network is the exact denoiser of some of `shapes`."""

import math

import pytest
import torch
from pipelines.test_unclip import UNIT, E, FakeCLIP, FakePrior
from torch import nn

from dalle.data.embed_norm import EmbedNorm
from dalle.data.shapes import Shapes
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.restoration import blur, shrinking
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.errors import UserError
from dalle.images import from_uint8, to_uint8
from dalle.metrics.reconstruction import likeness
from dalle.pipelines.masks import check_picture
from dalle.pipelines.repair import GUESSES, NOISES
from dalle.pipelines.unclip import UnCLIP
from dalle.stages.decoder import DecoderStage

SIZE = 16
SCHEDULE = Schedule("flow")
CHOICE = GUESSES * NOISES  # calls of the network that choose an image embedding


class Album(nn.Module):
    """Knows a few pictures, each as likely as any other: E[x_0 | x_t] has a closed form. With a caption it
    knows those alone whose number is the caption's length.
    """

    image_size, channels, embed_dim = SIZE, 3, E

    def __init__(self, count: int = 64):
        super().__init__()
        self.pictures = nn.Parameter(Shapes("train", SIZE).images(range(count)))
        self.calls = []

    def forward(self, x, t, *, text_embed, keep_text, keep_image, **_):
        self.calls.append((text_embed, keep_text, keep_image))
        alpha, sigma = (c.view(-1, 1) for c in SCHEDULE.alpha_sigma(t))
        far = (x.flatten(1)[:, None] - alpha[..., None] * self.pictures.flatten(1)).square().sum(2)
        likely = -far / (2 * sigma.square())
        number = text_embed[:, :1].long() % len(self.pictures)
        other = keep_text[:, None] & (torch.arange(len(self.pictures)) != number)
        return (likely.masked_fill(other, -torch.inf).softmax(1) @ self.pictures.flatten(1)).view_as(x)


@pytest.fixture
def pipeline() -> UnCLIP:
    stage = DecoderStage(Album(), lambda net: Denoiser(net, SCHEDULE, "x0"), Sampler("ddim", steps=10))
    return UnCLIP(FakeCLIP(), FakePrior(UNIT), stage, UNIT, UNIT)


def spoilt(image: torch.Tensor, noise: float) -> torch.Tensor:
    """As a file of 8 bits has it."""
    made = image + noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    return from_uint8(to_uint8(made))


def psnr(made: torch.Tensor, image: torch.Tensor) -> float:
    return likeness(made.reshape(1, *image.shape), image[None])["psnr"].item()


HOLE = torch.zeros(SIZE, SIZE, dtype=torch.bool)
HOLE[3:9, 4:12] = True
NO_NUMBERS = torch.full((3, SIZE, SIZE), math.nan)


@pytest.mark.parametrize("number", [3, 17])
def test_known_degradations_are_undone(pipeline, number):
    image = pipeline.decoder.net.pictures.data[number]
    noisy, soft = spoilt(image, 0.3), spoilt(blur(SIZE, 1.0)(image[None])[0], 0)
    small, torn = spoilt(shrinking(SIZE, 2)(image[None])[0], 0), image.masked_fill(HOLE, 0)
    enlarged = nn.functional.interpolate(small[None], SIZE, mode="bicubic", antialias=True)[0]
    for before, after in (
        (noisy, pipeline.denoise(noisy, noise=0.3)),
        (noisy, pipeline.denoise(noisy)),
        (soft, pipeline.deblur(soft, blur_sigma=1.0)),
        (enlarged, pipeline.enhance(small)),
        (torn, pipeline.fill(torn, HOLE)),
    ):
        assert after.shape == (1, 3, SIZE, SIZE)
        assert psnr(after, image) > psnr(before, image) + 3


def test_what_is_seen_stays_also_in_a_picture_that_the_decoder_does_not_know(pipeline):
    image = torch.rand(3, SIZE, SIZE) * 2 - 1
    made = pipeline.fill(image, HOLE, noise=0.001, n=2)
    assert (made - image)[..., ~HOLE].abs().max() < 0.01
    small = torch.rand(3, SIZE // 2, SIZE // 2) - 0.5
    again = shrinking(SIZE, 2)(pipeline.enhance(small, noise=0.001, n=2))
    assert (again - small).abs().mean() < 0.05


def test_what_is_hidden_does_not_matter(pipeline):
    image = pipeline.decoder.net.pictures.data[0]
    other = image.masked_fill(HOLE, 0.7)
    assert torch.equal(pipeline.fill(image, HOLE, seed=3), pipeline.fill(other, HOLE, seed=3))


def test_a_prompt_is_heard_without_guidance_and_no_prompt_is_none(pipeline):
    net = pipeline.decoder.net
    image = net.pictures.data[0]
    said = "a red ring"  # 10 letters
    told = pipeline.denoise(spoilt(image, 2.0), said, noise=2.0)
    assert psnr(told, net.pictures.data[10]) > 30
    assert all(keep.all() and not keep_image.all() for _, keep, keep_image in net.calls[-10:])
    assert len(net.calls[-1][1]) == 1  # one estimate a step
    pipeline.denoise(spoilt(image, 0.3), noise=0.3)
    assert not any(keep.any() for _, keep, _ in net.calls[-10:])


def test_inpainting_keeps_what_is_not_white_and_draws_the_rest_to_fit(pipeline):
    net = pipeline.decoder.net
    said, wanted = "a red ring", net.pictures.data[10]  # of 10 letters
    torn = (wanted + 0.02 * torch.rand(wanted.shape)).masked_fill(HOLE, 0.3)
    made = pipeline.inpaint(torn, HOLE, said, decoder={"guidance": 1.0})
    assert psnr(made, wanted) > 30
    assert torch.equal(made[0][..., ~HOLE], torn[..., ~HOLE])
    assert len(net.calls) == CHOICE + 10 * 4
    assert net.calls[-1][2].all()  # the prior's embedding is seen
    plain = pipeline.inpaint(torn, HOLE, said, paste=False, resamplings=1, decoder={"guidance": 1.0})
    assert len(net.calls) == 2 * CHOICE + 10 * 5
    assert not torch.equal(plain[0][..., ~HOLE], torn[..., ~HOLE])


class Named(Album):
    """Draws the picture whose number its image embedding names, whatever the caption."""

    def forward(self, x, t, *, image_embed, keep_image, **_):
        number = image_embed[:, 0].round().long().clamp(0, len(self.pictures) - 1)
        return self.pictures[number].where(keep_image[:, None, None, None], 0.0)


class Guessing(FakePrior):
    """Guesses any of a few numbers."""

    def sample(self, batch, randn=torch.randn_like):
        noise = randn(torch.empty_like(batch["text_embed"]))
        return torch.distributions.Normal(0.0, 1.0).cdf(noise) * 5.99 - 0.5


def test_of_the_priors_embeddings_inpainting_takes_the_one_that_fits_what_is_kept():
    stage = DecoderStage(Named(6), lambda net: Denoiser(net, SCHEDULE, "x0"), Sampler("ddim", steps=2))
    pipeline = UnCLIP(FakeCLIP(), Guessing(UNIT), stage, EmbedNorm("none"), EmbedNorm("none"))
    pictures = stage.net.pictures.data
    image = pictures[4].masked_fill(HOLE, 0.3)

    def named(made):
        return [(one - pictures).square().flatten(1).mean(1).argmin().item() for one in made]

    chosen = named(pipeline.inpaint(image, HOLE, "a ring", n=40, paste=False, decoder={"guidance": 1.0}))
    guessed = named(pipeline.sample(["a ring"], n=40, decoder={"guidance": 1.0}))
    assert guessed.count(4) < 16
    assert chosen.count(4) > guessed.count(4) + 8  # one of four guesses is right: 1 - (5/6)^4 of all
    few = pipeline.inpaint(image, HOLE, "a ring", n=3, batch_size=2, paste=False, decoder={"guidance": 1.0})
    assert named(few) == chosen[:3]


def test_outpainting_keeps_the_picture(pipeline):
    image = pipeline.decoder.net.pictures.data[3]
    made = pipeline.outpaint(image, "a ring", right=6, top=4, n=2, resamplings=1)
    assert made.shape == (2, 3, 20, 22)
    assert torch.equal(made[..., 4:, :16], image.expand(2, -1, -1, -1))
    assert made[..., :4, :].mean() > 0.9  # white, as this picture's edges; blank is 0


def test_copies_differ_and_do_not_depend_on_the_batch(pipeline):
    image = pipeline.decoder.net.pictures.data[0]
    hole = torch.ones(SIZE, SIZE, dtype=torch.bool)
    many = pipeline.fill(image, hole, n=5, seed=2)
    assert many.unique(dim=0).shape == many.shape
    assert torch.equal(pipeline.fill(image, hole, n=5, seed=2, batch_size=2), many)
    assert torch.equal(pipeline.fill(image, hole, n=1, seed=2)[0], many[0])
    assert not torch.equal(pipeline.fill(image, hole, n=1, seed=3)[0], many[0])


def test_little_strength_keeps_the_picture_and_all_of_it_follows_the_prompt(pipeline):
    net = pipeline.decoder.net
    image, said = net.pictures.data[0], "a red ring"
    faint = pipeline.restyle(image, said, strength=0.1, decoder={"guidance": 0.0})
    whole = pipeline.restyle(image, said, strength=1.0, decoder={"guidance": 1.0})
    assert psnr(faint, image) > 30
    assert psnr(whole, net.pictures.data[10]) > 30
    assert len(net.calls) == 1 + 10
    assert net.calls[-1][2].all()  # the prior's embedding is seen
    assert len(pipeline.prior.calls) == 2


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda p: p.denoise(torch.zeros(3, 8, 16)), "the picture has 16 x 8 px; the decoder draws 16 x 16"),
        (lambda p: p.denoise(torch.zeros(3, 16, 16), noise=0.0), r"noise is a standard deviation .* not 0.0"),
        (lambda p: p.deblur(torch.zeros(3, 16, 16), blur_sigma=-1.0), r"blur is .* above 0 .* not -1.0"),
        (lambda p: p.enhance(torch.zeros(3, 16, 16)), "enhance makes pictures of 8, 4, 2 px ones of 16 px"),
        (lambda p: p.enhance(torch.zeros(3, 5, 5)), "the picture has 5 x 5 px"),
        (
            lambda p: p.fill(torch.zeros(3, 16, 16), HOLE[:8]),
            "the mask has 16 x 8 px, but the picture 16 x 16",
        ),
        (lambda p: p.denoise(torch.zeros(3, 16, 16), noise=math.inf), r"noise is .* not inf"),
        (lambda p: p.deblur(torch.zeros(3, 16, 16), blur_sigma=math.nan), r"blur is .* not nan"),
        (
            lambda p: p.deblur(torch.zeros(3, 16, 16), blur_sigma=1e9),
            "side of 16, not 1000000000.0",
        ),
        (lambda p: p.denoise(NO_NUMBERS), "the picture holds values that are no finite numbers"),
        (lambda p: p.enhance(NO_NUMBERS[:, :8, :8]), "the picture holds values that are no finite"),
        (lambda p: p.restyle(NO_NUMBERS, "a"), "the picture holds values that are no finite numbers"),
        (lambda p: p.inpaint(NO_NUMBERS, HOLE, "a"), "the picture holds values that are no finite numbers"),
        (lambda p: p.outpaint(NO_NUMBERS, "a", left=4), "the picture holds values that are no finite"),
        (lambda p: p.invert(NO_NUMBERS), "the picture holds values that are no finite numbers"),
        (lambda p: p.restyle(torch.zeros(3, 16, 16), "a", strength=0.0), "strength is more than 0"),
        (lambda p: p.restyle(torch.zeros(3, 16, 16), "a " * 9), "is too long: CLIP reads 8 tokens"),
    ],
)
def test_mistakes_are_one_line(pipeline, mistake, message):
    with pytest.raises(UserError, match=message) as error:
        mistake(pipeline)
    assert "\n" not in str(error.value)


def test_a_decoder_that_was_trained_with_masks_is_told_what_is_known_and_draws_once():
    class Told(Album):
        inpaint = True

        def forward(self, x, t, *, known=None, **cond):
            self.known = known
            return super().forward(x, t, **cond)

    stage = DecoderStage(Told(), lambda net: Denoiser(net, SCHEDULE, "x0"), Sampler("ddim", steps=10))
    pipeline, net = UnCLIP(FakeCLIP(), FakePrior(UNIT), stage, UNIT, UNIT), stage.net
    image = net.pictures.data[10]
    made = pipeline.inpaint(image.masked_fill(HOLE, 0.3), HOLE, "a red ring", n=2)
    assert len(net.calls) == CHOICE + 10  # each step once, where another decoder does it four times
    kept = (~HOLE).float()
    assert torch.equal(net.known[0], torch.cat((image * kept, kept[None])))
    assert len(net.known) == 2 * 2  # under both conditions of the guidance, for each picture
    assert torch.equal(made[0][..., ~HOLE], image[..., ~HOLE])
    pipeline.inpaint(image, HOLE, "a red ring", resamplings=3)
    assert len(net.calls) == 2 * CHOICE + 10 * (1 + 3)
    net.known = None
    pipeline.fill(image.masked_fill(HOLE, 0), HOLE)
    assert net.known is not None
    pipeline.outpaint(image, "a ring", right=6)
    assert net.known[0, 3].sum() == SIZE * (SIZE - 6)
    pipeline.sample(["a red ring"])
    assert net.known is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"not \(1, 3, 8, 8\) of torch.float32"),
        (torch.zeros(1, 8, 8), r"a picture is \(3, height, width\) of floats in \[-1, 1\], not \(1, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"not \(3, 8, 8\) of torch.uint8"),
    ],
)
def test_what_is_no_picture_is_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        check_picture(wrong)
