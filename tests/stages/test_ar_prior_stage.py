"""The autoregressive prior's stage: its loss, dropped captions, how codes are drawn, the best of several."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.autoregressive.sampling import generate
from dalle.data.batch import text_of
from dalle.data.embed_norm import EmbedNorm
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.nets.ar_prior import ARPrior, EmbeddingCodes
from dalle.stages.ar_prior import ARPriorStage, Writer

EMBED, LENGTH, DIMS, K = 8, 6, 4, 16


def make_net(seed: int = 0) -> ARPrior:
    torch.manual_seed(seed)
    net = ARPrior(EMBED, 12, LENGTH, DIMS, K, width=16, depth=2, heads=2, waves=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    batch = make_batch(200, seed=5)
    net.codes.fit(batch["image_embed"], F.cosine_similarity(batch["image_embed"], batch["text_embed"]))
    return net.eval()


def make_stage(net: ARPrior | None = None, **options) -> ARPriorStage:
    stage = ARPriorStage(net or make_net(), **options).eval()
    stage.norm = EmbedNorm("unit_times_sqrt_dim")
    return stage


def make_batch(size: int = 4, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(LENGTH)[None] < torch.randint(2, LENGTH + 1, (size, 1), generator=generator)
    return {
        "image_embed": EmbedNorm("unit_times_sqrt_dim").encode(torch.randn(size, EMBED, generator=generator)),
        "text_embed": torch.randn(size, EMBED, generator=generator),
        "text_hidden": torch.randn(size, LENGTH, 12, generator=generator),
        "text_mask": mask,
    }


class TestStep:
    def test_is_the_cross_entropy_of_the_dimensions_codes(self):
        stage, batch = make_stage(text_dropout=0.0), make_batch(16)
        codes = stage.net.codes.encode(batch["image_embed"])
        dots = F.cosine_similarity(batch["image_embed"], batch["text_embed"])
        every = torch.cat((stage.net.codes.encode_dot(dots)[:, None], codes), 1)
        logits = stage.net(every, **text_of(batch))
        expected = -logits.log_softmax(2).gather(2, codes[..., None]).mean()
        out = stage.step(batch)
        torch.testing.assert_close(out["loss"], expected)
        torch.testing.assert_close(out["bits_per_code"], expected / torch.tensor(2.0).log())
        kept = F.cosine_similarity(stage.net.codes.decode(codes), batch["image_embed"]).mean()
        torch.testing.assert_close(out["cosine_of_codes"], kept)

    @pytest.mark.parametrize(("share", "kept"), [(0.0, 1.0), (0.1, 0.9), (1.0, 0.0)])
    def test_drops_captions_as_often_as_asked(self, share, kept):
        stage, seen = make_stage(text_dropout=share), []
        stage.net.forward = lambda codes, **cond: (
            seen.append(cond["keep_text"]), torch.zeros(len(codes), DIMS, K, requires_grad=True)
        )[1]  # fmt: skip
        torch.manual_seed(0)
        stage.step(make_batch(4000))
        assert seen[0].float().mean().item() == pytest.approx(kept, abs=0.015)

    def test_an_embedding_that_is_no_number_spoils_the_loss(self):
        """It would have a code like any other: see `stages.nan_guard`."""
        stage, batch = make_stage(), make_batch()
        batch["image_embed"][1, 2] = torch.nan
        assert stage.step(batch)["loss"].isnan()

    def test_learns_embeddings_that_follow_from_the_caption(self):
        stage, batch = make_stage(text_dropout=0.0), make_batch()
        batch["text_embed"] = batch["image_embed"].clone()  # of the largest dot product there is
        optimizer = torch.optim.Adam(stage.parameters(), lr=1e-2)
        for _ in range(120):
            loss = stage.step(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = stage.net.codes.decode(stage.net.codes.encode(batch["image_embed"]))
        made = stage.sample(batch, temperature=0, dot_quantile=1.0)
        torch.testing.assert_close(made, stage.norm.project(right))


class TestSample:
    def randn(self, size: int = 4):
        return per_sample(range(size))

    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_the_cache_changes_nothing(self, guidance):
        stage, batch = make_stage(), make_batch()
        writer, rows = Writer(stage.net, text_of(batch)), torch.arange(4)[:, None]
        dot, found = torch.full((4, 1), 9), []
        for cached in (True, False):
            u = torch.Generator().manual_seed(0)
            found.append(
                generate(
                    writer, rows, guidance=guidance, prefix=dot, cached=cached,
                    uniform=lambda x, u=u: torch.rand(x.shape, generator=u),
                )
            )  # fmt: skip
        assert torch.equal(*found)
        assert torch.equal(found[0][:, :1], dot)

    def test_guidance_is_the_weighted_sum(self):
        stage, batch = make_stage(), make_batch()
        made = stage.sample(batch, guidance=3.0, temperature=0, dot_quantile=1.0)
        codes, nobody = torch.full((4, 1), K - 1), torch.zeros(4, dtype=torch.bool)
        for _ in range(DIMS):
            told, _ = stage.net.prefill(codes, **text_of(batch))
            null, _ = stage.net.prefill(codes, **text_of(batch), keep_text=nobody)
            codes = torch.cat((codes, (null + 3 * (told - null)).argmax(1, keepdim=True)), 1)
        expected = stage.norm.project(stage.net.codes.decode(codes[:, 1:]))
        torch.testing.assert_close(made, expected)
        assert not torch.allclose(made, stage.sample(batch, temperature=0, dot_quantile=1.0))

    @pytest.mark.parametrize(
        "option", [{"guidance": 3.0}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}]
    )
    def test_what_is_given_wins_over_the_stages_own(self, option):
        batch, plain = make_batch(16), make_stage().sample(make_batch(16), randn=self.randn(16))
        own = make_stage(**option).sample(batch, randn=self.randn(16))
        assert torch.equal(own, make_stage().sample(batch, **option, randn=self.randn(16)))
        assert not torch.equal(own, plain)

    def test_the_dot_product_is_from_the_upper_half(self):
        stage, seen = make_stage(), []
        prefill = stage.net.prefill
        stage.net.prefill = lambda codes, **text: (seen.append(codes[:, 0]), prefill(codes, **text))[1]
        stage.sample(make_batch(400))
        assert set(seen[0].tolist()) == set(range(K // 2, K))
        stage.sample(make_batch(400), dot_quantile=0.0)
        assert set(seen[1].tolist()) == set(range(K))

    def test_draws_from_the_networks_distribution(self):
        stage = make_stage()
        one = {key: value[:1] for key, value in make_batch().items()}
        many = {key: value.expand(4000, *value.shape[1:]) for key, value in one.items()}
        stage.norm = None  # as drawn, whatever its length
        made = stage.sample(many, dot_quantile=1.0, randn=self.randn(4000))
        first = stage.net.codes.encode(made)[:, 0]
        expected = stage.net.prefill(torch.tensor([[K - 1]]), **text_of(one))[0].softmax(1)[0]
        torch.testing.assert_close(first.bincount(minlength=K) / 4000, expected, atol=0.03, rtol=0)

    def test_a_sample_does_not_depend_on_its_batch(self):
        stage, batch = make_stage(guidance=2.0, candidates=2), make_batch()
        whole = stage.sample(batch, randn=self.randn())
        alone = stage.sample({k: v[2:3] for k, v in batch.items()}, randn=per_sample([2]))
        torch.testing.assert_close(whole[2:3], alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["none", "unit", "unit_times_sqrt_dim", "standardized", "whitened"])
    def test_keeps_the_candidate_nearest_to_the_caption(self, kind):
        stage, batch = make_stage(), make_batch(8)
        generator = torch.Generator().manual_seed(0)
        stage.norm = EmbedNorm(kind).fit(torch.randn(50, EMBED, generator=generator) + 1)
        randn = self.randn(8)
        one_by_one = torch.stack([stage.sample(batch, randn=randn) for _ in range(3)])
        kept = stage.sample(batch, candidates=3, randn=self.randn(8))
        score = (torch.stack([stage.norm.decode(z) for z in one_by_one]) * batch["text_embed"]).sum(-1)
        torch.testing.assert_close(kept, one_by_one[score.argmax(0), torch.arange(8)])
        assert len(set(score.argmax(0).tolist())) > 1
        if kind.startswith("unit"):
            torch.testing.assert_close(kept.norm(dim=1), torch.full((8,), stage.norm.scale(EMBED)))

    def test_extreme_noise_is_never_infinite(self):
        for x in (-30.0, 30.0):
            made = make_stage().sample(make_batch(), randn=lambda like, x=x: torch.full_like(like, x))
            assert made.isfinite().all()


def test_more_choices_than_there_are_buckets():
    with pytest.raises(UserError, match="top_k is 1 to 16, the codes there are, not 17"):
        make_stage(top_k=17)


def test_codes_and_normalisation_come_from_the_data():
    stage, norm = make_stage(), EmbedNorm("unit")
    codes = EmbeddingCodes(EMBED, DIMS, K).fit(make_batch(50)["image_embed"], torch.zeros(50))
    stage._trainer = SimpleNamespace(datamodule=SimpleNamespace(norm=norm, codes=codes))
    stage.setup("test")
    assert not torch.equal(stage.net.codes.components, codes.components)  # a run's own stay
    stage.setup("fit")
    assert stage.norm is norm
    assert torch.equal(stage.net.codes.components, codes.components)
    assert torch.equal(stage.net.codes.dots, codes.dots)
