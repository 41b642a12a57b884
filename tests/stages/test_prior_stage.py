"""The prior's stage: the loss it trains on, dropped captions, guidance, the best of several, its cosines."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.data.batch import text_of
from dalle.data.embed_norm import EmbedNorm
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.noise import per_sample
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.nets.prior import Prior
from dalle.stages.embedding_stage import best
from dalle.stages.prior import PriorStage

WIDTH, EMBED, LENGTH = 16, 8, 6


def make_net(seed: int = 0, layers: int = 0) -> Prior:
    torch.manual_seed(seed)
    net = Prior(
        embed_dim=EMBED,
        text_width=12,
        context_length=LENGTH,
        vocab_size=9,
        width=WIDTH,
        depth=2,
        heads=2,
        text_layers=layers,
    )
    nn.init.normal_(net.out.weight, std=0.3)  # zero at birth: nothing would depend on anything
    return net.eval()


def make_stage(net: nn.Module | None = None, **options) -> PriorStage:
    denoiser = partial(Denoiser, schedule=Schedule("cosine", 1000), prediction="x0")
    return PriorStage(net or make_net(), denoiser, Sampler("ddim", 4), **({"candidates": 1} | options))


def make_batch(size: int = 4, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(LENGTH)[None] < torch.randint(2, LENGTH + 1, (size, 1), generator=generator)
    return {
        "image_embed": EmbedNorm("unit_times_sqrt_dim").encode(torch.randn(size, EMBED, generator=generator)),
        "text_embed": torch.randn(size, EMBED, generator=generator),
        "text_hidden": torch.randn(size, LENGTH, 12, generator=generator),
        "text_mask": mask,
        "text": torch.randint(0, 9, (size, LENGTH), generator=generator),
    }


class TestStep:
    def test_is_the_error_of_the_clean_embedding(self):
        stage, batch = make_stage(text_dropout=0.0), make_batch(16)
        torch.manual_seed(3)
        out = stage.step(batch)
        assert out["per_sample"].mean() == out["loss"]
        torch.manual_seed(3)
        torch.rand(16)  # who keeps the caption
        t = stage.denoiser.times(batch["image_embed"])
        assert torch.equal(out["t"], t)
        noise = torch.randn(batch["image_embed"].shape)
        alpha, sigma = (c[:, None].float() for c in stage.denoiser.schedule.alpha_sigma(t))
        x_t = alpha * batch["image_embed"] + sigma * noise
        error = (stage.net(x_t, t, **text_of(batch)) - batch["image_embed"]).square().mean(1)
        torch.testing.assert_close(out["per_sample"], error, rtol=1e-4, atol=1e-5)

    def test_layers_of_the_networks_own_are_given_the_ids(self):
        stage, batch = make_stage(make_net(layers=1), guidance=2.0), make_batch()
        other = batch | {"text": (batch["text"] + 1) % 9}
        losses, drawn = [], []
        for told in (batch, other):
            torch.manual_seed(3)
            losses.append(stage.step(told)["loss"].item())
            torch.manual_seed(3)
            drawn.append(stage.sample(told))
        assert losses[0] != losses[1]
        assert not torch.isclose(drawn[0], drawn[1]).all(1).any()

    @pytest.mark.parametrize(("share", "kept"), [(0.0, 1.0), (0.1, 0.9), (1.0, 0.0)])
    def test_drops_captions_as_often_as_asked(self, share, kept):
        stage, seen = make_stage(text_dropout=share), []
        stage.denoiser.losses = lambda x, **cond: (seen.append(cond["keep_text"]), (torch.ones(len(x)),) * 2)[
            1
        ]
        torch.manual_seed(0)
        batch = make_batch(4000)
        stage.step(batch)
        assert seen[0].float().mean().item() == pytest.approx(kept, abs=0.015)

    def test_a_dropped_caption_does_not_matter(self):
        stage, batch, other = make_stage(text_dropout=1.0), make_batch(), make_batch(seed=2)
        other["image_embed"] = batch["image_embed"]
        torch.manual_seed(0)
        first = stage.step(batch)["per_sample"]
        torch.manual_seed(0)
        torch.testing.assert_close(stage.step(other)["per_sample"], first)


class TestSample:
    def randn(self, size: int = 4):
        return per_sample(range(size))

    def test_the_cached_text_changes_nothing(self):
        stage, batch = make_stage(), make_batch()
        made = stage.sample(batch, randn=self.randn())
        uncached = stage.sampler(
            lambda x, t: stage.denoiser(x, t, **text_of(batch)),
            self.randn()(torch.empty(4, EMBED)),
            stage.denoiser.schedule,
        )
        torch.testing.assert_close(made, uncached, rtol=1e-4, atol=1e-5)

    def test_guidance_is_the_weighted_sum(self):
        stage, batch = make_stage(), make_batch()
        made = stage.sample(batch, guidance=3.0, randn=self.randn())
        nobody = torch.zeros(4, dtype=torch.bool)

        def guided(x, t):
            with_text = stage.denoiser(x, t, **text_of(batch))
            without = stage.denoiser(x, t, **text_of(batch), keep_text=nobody)
            return without + 3 * (with_text - without)

        expected = stage.sampler(guided, self.randn()(torch.empty(4, EMBED)), stage.denoiser.schedule)
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(made, stage.sample(batch, randn=self.randn()))

    def test_guidance_given_wins_over_the_stages_own(self):
        batch = make_batch()
        own = make_stage(guidance=3.0).sample(batch, randn=self.randn())
        assert torch.equal(own, make_stage().sample(batch, guidance=3.0, randn=self.randn()))
        assert torch.equal(
            make_stage(guidance=3.0).sample(batch, guidance=1, randn=self.randn()),
            make_stage().sample(batch, randn=self.randn()),
        )

    def test_a_sample_does_not_depend_on_its_batch(self):
        stage, batch = make_stage(guidance=2.0, candidates=2), make_batch()
        whole = stage.sample(batch, randn=self.randn())
        alone = stage.sample({k: v[2:3] for k, v in batch.items()}, randn=per_sample([2]))
        torch.testing.assert_close(whole[2:3], alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["none", "unit", "unit_times_sqrt_dim", "standardized", "whitened"])
    def test_embeddings_have_the_length_of_the_datas(self, kind):
        """The decoder has seen no other, and the mean of vectors of one length is shorter than they are."""
        stage, batch = make_stage(), make_batch(8)
        plain = stage.sample(batch, candidates=1, randn=self.randn(8))
        stage.norm = EmbedNorm(kind).fit(torch.randn(50, EMBED) + 1)
        made = stage.sample(batch, candidates=1, randn=self.randn(8))
        if kind in ("none", "standardized"):
            assert torch.equal(made, stage.sample(batch, candidates=1, randn=self.randn(8)))
        elif kind == "whitened":
            torch.testing.assert_close(stage.norm.encode(stage.norm.decode(made)), made)
        else:
            torch.testing.assert_close(made.norm(dim=1), torch.full((8,), stage.norm.scale(EMBED)))
            assert F.cosine_similarity(made, plain).min() > 1 - 1e-5

    @pytest.mark.parametrize("kind", ["none", "unit", "unit_times_sqrt_dim", "standardized", "whitened"])
    def test_keeps_the_candidate_nearest_to_the_caption(self, kind):
        stage, batch = make_stage(), make_batch(8)
        stage.norm = EmbedNorm(kind).fit(
            torch.randn(50, EMBED, generator=torch.Generator().manual_seed(0)) + 1
        )
        randn = self.randn(8)
        one_by_one = torch.stack([stage.sample(batch, randn=randn) for _ in range(3)])
        kept = stage.sample(batch, candidates=3, randn=self.randn(8))
        score = (torch.stack([stage.norm.decode(z) for z in one_by_one]) * batch["text_embed"]).sum(-1)
        assert torch.equal(kept, one_by_one[score.argmax(0), torch.arange(8)])
        assert len(set(score.argmax(0).tolist())) > 1

    def test_best_of_one_is_that_one(self):
        z = torch.randn(3, EMBED)
        assert best([z], torch.randn(3, EMBED), EmbedNorm("unit")) is z

    def test_another_sampler(self):
        stage, batch = make_stage(), make_batch()
        other = stage.sample(batch, sampler=Sampler("dpmpp", 3), randn=self.randn())
        assert not torch.allclose(other, stage.sample(batch, randn=self.randn()))


class TestCosines:
    def logged(self, stage: PriorStage, batch: dict, index: int = 0) -> dict:
        kept = {}
        stage.log_dict = lambda values, **_: kept.update(values)
        stage.norm = EmbedNorm("unit_times_sqrt_dim")
        stage.log_cosines("val", batch, index)
        return {k: v.item() for k, v in kept.items()}

    def test_of_a_perfect_prior(self):
        stage, batch = make_stage(), make_batch(16)
        stage.sample = lambda batch, randn: batch["image_embed"]
        cosines = self.logged(stage, batch)
        text = batch["text_embed"]
        assert cosines["val/cosine_image"] == pytest.approx(1)
        assert cosines["val/cosine_caption"] == pytest.approx(
            F.cosine_similarity(batch["image_embed"], text).mean().item(), abs=1e-6
        )
        assert cosines["val/cosine_caption_of_data"] == pytest.approx(cosines["val/cosine_caption"], abs=1e-6)
        other = F.cosine_similarity(batch["image_embed"], text.roll(1, 0)).mean().item()
        assert cosines["val/cosine_other_caption"] == pytest.approx(other, abs=1e-6)

    def test_same_noise_every_time(self):
        stage, batch = make_stage(candidates=2), make_batch()
        torch.manual_seed(0)
        first = self.logged(stage, batch)
        torch.manual_seed(1)
        assert self.logged(stage, batch) == first

    def test_only_as_many_as_asked(self):
        stage, sizes = make_stage(val_samples=8), []
        sample = stage.sample
        stage.sample = lambda batch, **o: (sizes.append(len(batch["text_embed"])), sample(batch, **o))[1]
        for index, size in enumerate((6, 6, 1)):  # the last batch is a small one
            self.logged(stage, make_batch(size), index)
        assert sizes == [6, 2]


def test_the_normalisation_comes_from_the_data():
    stage, norm = make_stage(), EmbedNorm("unit")
    stage._trainer = SimpleNamespace(datamodule=SimpleNamespace(norm=norm))
    stage.setup("fit")
    assert stage.norm is norm
