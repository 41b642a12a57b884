"""The decoder's stage: dropped conditions, guidance by one scale or two, learned variance, sampling."""

from functools import partial

import pytest
import torch
from torch import nn

from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.inpainting import known_of
from dalle.diffusion.noise import per_sample
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.errors import UserError
from dalle.nets.unet import UNet
from dalle.stages.decoder import DecoderStage

EMBED, TEXT, LENGTH = 8, 12, 5


def make_net(channels: int = 3, inpaint: bool = False) -> UNet:
    torch.manual_seed(0)
    net = UNet(
        image_size=16, channels=3, out_channels=channels, width=16, multipliers=[1, 1], blocks=1,
        attention=[4], head_dim=8, embed_dim=EMBED, text_width=TEXT, image_tokens=2,
        patch=2, dropout=0.0, resample="conv", positions=False, inpaint=inpaint,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # zero-initialised outputs would make every condition the same
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def make_stage(
    schedule: str = "flow",
    prediction: str = "velocity",
    learned: bool = False,
    inpaint: bool = False,
    **options,
) -> DecoderStage:
    denoiser = partial(
        Denoiser, schedule=Schedule(schedule, 1000), prediction=prediction, learned_variance=learned
    )
    options = {"guidance": 1.0, "sampler": Sampler("ddim", 3), **options}
    return DecoderStage(make_net(6 if learned else 3, inpaint), denoiser, **options).eval()


def make_batch(size: int = 3) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {
        "image": torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1,
        "image_embed": torch.randn(size, EMBED, generator=generator),
        "text_embed": torch.randn(size, EMBED, generator=generator),
        "text_hidden": torch.randn(size, LENGTH, TEXT, generator=generator),
        "text_mask": torch.arange(LENGTH)[None]
        < torch.randint(2, LENGTH + 1, (size, 1), generator=generator),
    }


def conditions(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k != "image"}


def flags(size: int, value: bool) -> torch.Tensor:
    return torch.full((size,), value)


class TestStep:
    def test_drops_each_condition_on_its_own(self):
        stage, seen = make_stage(image_dropout=0.1, text_dropout=0.5), {}
        stage.denoiser.losses = lambda x, **cond: (seen.update(cond), (torch.ones(len(x)),) * 2)[1]
        torch.manual_seed(0)
        small = make_batch(1)
        batch = {k: v.expand(8000, *v.shape[1:]) for k, v in small.items()}
        stage.step(batch)
        image, text = seen["keep_image"].float(), seen["keep_text"].float()
        assert image.mean().item() == pytest.approx(0.9, abs=0.01)
        assert text.mean().item() == pytest.approx(0.5, abs=0.02)
        assert (image * text).mean().item() == pytest.approx(0.45, abs=0.02)

    def test_is_the_error_of_the_velocity(self):
        stage, batch = make_stage(image_dropout=0.0, text_dropout=0.0), make_batch()
        torch.manual_seed(3)
        out = stage.step(batch)
        torch.manual_seed(3)
        torch.rand(3), torch.rand(3)
        t, noise = torch.rand(3), torch.randn(3, 3, 16, 16)
        assert torch.equal(out["t"], t)
        at = t[:, None, None, None]
        velocity = stage.net((1 - at) * batch["image"] + at * noise, t, **conditions(batch))
        error = (velocity - (noise - batch["image"])).square().flatten(1).mean(1)
        torch.testing.assert_close(out["per_sample"], error, rtol=1e-4, atol=1e-5)
        assert out["loss"] == out["per_sample"].mean()


class TestSize:
    def test_pictures_of_a_size_that_is_given_or_that_the_batch_has(self):
        stage, batch = make_stage(), make_batch()
        embeds = conditions(batch)
        assert stage.sample(embeds).shape == (3, 3, 16, 16)
        assert stage.sample(embeds, size=(12, 24)).shape == (3, 3, 12, 24)
        assert stage.sample({**embeds, "image": torch.zeros(3, 3, 20, 12)}).shape == (3, 3, 20, 12)
        guided = make_stage(guidance=2.0, inpaint=True)
        known = known_of(torch.zeros(1, 3, 12, 24), torch.ones(1, 12, 24, dtype=torch.bool))
        assert guided.sample(embeds, size=(12, 24), known=known).shape == (3, 3, 12, 24)

    def test_trains_on_oblong_pictures(self):
        stage, batch = make_stage(inpaint=True), make_batch()
        out = stage.step({**batch, "image": torch.rand(3, 3, 12, 24)})
        out["loss"].backward()
        assert out["loss"].isfinite()

    @pytest.mark.parametrize("size", [(4, 16), (16, 65)])
    def test_nothing_out_of_reach(self, size):
        with pytest.raises(UserError, match="is not what this decoder of 16 px can draw"):
            make_stage().sample(conditions(make_batch()), size=size)

    def test_networks_of_squares(self):
        class Squares(nn.Module):
            image_size, channels, embed_dim = 16, 3, EMBED

            def __init__(self, net: UNet) -> None:
                super().__init__()
                self.net = net

            def forward(self, *args, **conditions):
                return self.net(*args, **conditions)

        stage = make_stage()
        stage.denoiser.net = Squares(stage.net)
        assert stage.sample(conditions(make_batch()), size=(16, 16)).shape[2:] == (16, 16)
        with pytest.raises(UserError, match="draws squares of 16 px only; leave size out"):
            stage.sample(conditions(make_batch()), size=(12, 24))


class TestBranches:
    """Weights and conditions; `guide` itself is tested in tests/diffusion."""

    def kept(self, branches):
        return [(w, c["keep_image"].all().item(), c["keep_text"].all().item()) for w, c in branches]

    def test_one_scale(self):
        assert self.kept(make_stage().branches(make_batch(), 3.0, None)) == [
            (-2.0, False, False),
            (3.0, True, True),
        ]

    def test_two_scales(self):
        branches = self.kept(make_stage().branches(make_batch(), 3.0, 5.0))
        assert branches == [(-2.0, False, False), (-2.0, True, False), (5.0, True, True)]

    def test_without_an_image_embedding(self):
        batch = make_batch()
        del batch["image_embed"]
        branches = make_stage().branches(batch, 3.0, None)
        assert self.kept(branches) == [(-2.0, False, False), (3.0, False, True)]


class TestSample:
    def sample(self, stage, batch, **options):
        return stage.sample(batch, randn=per_sample(range(len(batch["text_embed"]))), **options)

    def expected(self, stage, batch, weights: list[tuple[float, bool, bool]]):
        """The weighted sum over (weight, keep image, keep text), each evaluated on its own."""
        n = len(batch["image_embed"])

        def denoise(x, t):
            parts = [
                w * stage.denoiser(x, t, **conditions(batch), keep_image=flags(n, i), keep_text=flags(n, k))
                for w, i, k in weights
            ]
            return sum(parts).clamp(-1, 1)

        return stage.sampler(
            denoise, per_sample(range(n))(torch.empty(n, 3, 16, 16)), stage.denoiser.schedule
        ).clamp(-1, 1)

    @pytest.mark.parametrize(
        ("guidance", "text_guidance", "weights"),
        [
            (1, None, [(1.0, True, True)]),
            (2.5, None, [(-1.5, False, False), (2.5, True, True)]),
            (2.0, 3.0, [(-1.0, False, False), (-1.0, True, False), (3.0, True, True)]),
            (2.0, 0, [(-1.0, False, False), (2.0, True, False)]),
        ],
    )
    def test_is_the_weighted_sum(self, guidance, text_guidance, weights):
        stage, batch = make_stage(), make_batch()
        made = self.sample(stage, batch, guidance=guidance, text_guidance=text_guidance)
        torch.testing.assert_close(made, self.expected(stage, batch, weights), rtol=1e-3, atol=1e-4)

    def test_without_an_image_embedding_only_the_caption_counts(self):
        stage, batch = make_stage(), make_batch()
        expected = self.expected(stage, batch, [(-1.0, False, False), (2.0, False, True)])
        del batch["image_embed"]
        torch.testing.assert_close(self.sample(stage, batch, guidance=2.0), expected, rtol=1e-3, atol=1e-4)

    def test_a_picture_does_not_depend_on_its_batch(self):
        stage, batch = make_stage(guidance=2.0), make_batch()
        alone = stage.sample({k: v[1:2] for k, v in batch.items()}, randn=per_sample([1]))
        torch.testing.assert_close(self.sample(stage, batch)[1:2], alone, rtol=1e-4, atol=1e-5)

    def test_pads_do_not_matter(self):
        stage, batch = make_stage(), make_batch()
        first = self.sample(stage, batch)
        batch["text_hidden"] = torch.where(batch["text_mask"][..., None], batch["text_hidden"], 99.0)
        torch.testing.assert_close(self.sample(stage, batch), first, rtol=1e-4, atol=1e-5)

    def test_the_stages_own_settings_are_the_default(self):
        batch = make_batch()
        own = self.sample(make_stage(guidance=2.0, text_guidance=3.0), batch)
        assert torch.equal(own, self.sample(make_stage(), batch, guidance=2.0, text_guidance=3.0))

    def test_pictures_are_in_range_and_every_step_is_shown(self):
        stage, seen = make_stage(thresholding="none", guidance=8.0), []
        made = self.sample(
            stage, make_batch(), on_step=lambda i, n, x0: seen.append((i, n, x0.abs().max().item()))
        )
        assert made.abs().max() <= 1
        assert [(i, n) for i, n, _ in seen] == [(0, 3), (1, 3), (2, 3)]
        assert max(m for *_, m in seen) > 1  # nothing held them

    @pytest.mark.parametrize("thresholding", ["static", "dynamic"])
    def test_thresholding_holds_every_step(self, thresholding):
        stage, seen = make_stage(thresholding=thresholding, guidance=8.0), []
        self.sample(stage, make_batch(), on_step=lambda i, n, x0: seen.append(x0.abs().max().item()))
        assert max(seen) <= 1

    def test_rescaling_pulls_in(self):
        batch = make_batch()
        plain = self.sample(make_stage(guidance=8.0, thresholding="none"), batch)
        rescaled = self.sample(make_stage(guidance=8.0, thresholding="none", rescale=1.0), batch)
        assert rescaled.std() < plain.std()


class TestLearnedVariance:
    def test_samples_with_it(self):
        stage, batch = make_stage("cosine", "eps", learned=True, guidance=2.0), make_batch()
        randn = partial(per_sample, range(3))
        learned, small = (
            stage.sample(batch, sampler=Sampler("ddpm", 4, variance=v), randn=randn())
            for v in ("learned", "small")
        )
        assert learned.shape == (3, 3, 16, 16)
        assert torch.isfinite(learned).all()
        assert not torch.allclose(learned, small)

    def test_between_the_two_fixed_ones(self):
        """1 everywhere is variance beta, -1 the posterior's (Nichol & Dhariwal 2021, eq. 15)."""
        for value, name in ((1.0, "large"), (-1.0, "small")):
            stage = make_stage("cosine", "eps", learned=True)
            net = stage.net

            class Fixed(nn.Module):
                image_size, channels, embed_dim = 16, 3, EMBED

                def __init__(self, net, value):
                    super().__init__()
                    self.inner, self.value = net, value

                def forward(self, x, t, **cond):
                    mean, _ = self.inner(x, t, **cond).chunk(2, 1)
                    return torch.cat((mean, torch.full_like(mean, self.value)), 1)

            stage.denoiser.net = Fixed(net, value)
            batch = make_batch()
            learned, fixed = (
                stage.sample(batch, sampler=Sampler("ddpm", 4, variance=v), randn=per_sample(range(3)))
                for v in ("learned", name)
            )
            torch.testing.assert_close(learned, fixed, rtol=1e-4, atol=1e-4)

    def test_trains_with_the_hybrid_loss(self):
        stage, batch = make_stage("cosine", "eps", learned=True), make_batch()
        stage.step(batch)["loss"].backward()
        out = [p for name, p in stage.net.named_parameters() if p.shape[0] == 24 and p.ndim == 4][-1]
        assert (out.grad.flatten(1).abs().sum(1) > 0).all()  # mean and variance channels learn


class TestInpainting:
    def test_a_step_shows_random_parts_of_the_pictures_and_of_a_share_nothing(self):
        stage, seen = make_stage(inpaint=True, all_hidden=0.25), {}
        stage.denoiser.losses = lambda x, **cond: (seen.update(cond), (torch.ones(len(x)),) * 2)[1]
        small = make_batch(1)
        batch = {k: v.expand(400, *v.shape[1:]) for k, v in small.items()}
        torch.manual_seed(0)
        stage.step(batch)
        shown, kept = seen["known"].split((3, 1), dim=1)
        assert torch.equal(shown, batch["image"] * kept)
        assert kept.unique().tolist() == [0, 1]
        nothing = (kept.flatten(1).amax(1) == 0).float().mean().item()
        assert nothing == pytest.approx(0.25, abs=0.05)
        assert 0.2 < kept.mean() / (1 - nothing) < 0.8

    def test_what_is_known_is_told_under_every_condition(self):
        stage, batch = make_stage(inpaint=True), make_batch()
        known = known_of(batch["image"][:1], torch.arange(256).view(1, 16, 16) % 2 == 0)
        told = stage.branches({**batch, "known": known.expand(3, -1, -1, -1)}, 3.0, 5.0)
        assert all(torch.equal(cond["known"], known.expand(3, -1, -1, -1)) for _, cond in told)

        def sample(**options):
            return stage.sample(batch, guidance=2.0, randn=per_sample(range(3)), **options)

        assert not torch.allclose(sample(known=known), sample(), atol=1e-3)
        torch.testing.assert_close(sample(known=torch.zeros_like(known)), sample())  # nothing is known

    def test_another_decoder_says_that_it_cannot_be_told(self):
        with pytest.raises(UserError, match=r"not trained with masks; train one with inpaint=true"):
            make_stage().sample(make_batch(), known=torch.zeros(1, 4, 16, 16))
