"""The autoregressive prior's codes against exact values, and its network against a loop without a cache."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from dalle.errors import UserError
from dalle.nets.ar_prior import ARPrior, EmbeddingCodes, dims_for, principal_components

SMALL = {
    "embed_dim": 8, "text_width": 6, "context_length": 5, "dims": 3, "buckets": 4, "width": 32, "depth": 2,
    "heads": 4, "waves": 0,
}  # fmt: skip
E = 8


def embeds(n: int = 400, seed: int = 0) -> torch.Tensor:
    """Of different variance in all directions, around a mean."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(E, E, generator=generator)).Q
    return torch.randn(n, E, generator=generator) * torch.logspace(1, -2, E) @ turned + 3


def fitted(dims: int = E, buckets: int = 1024) -> EmbeddingCodes:
    return EmbeddingCodes(E, dims, buckets).fit(embeds(), torch.linspace(-1, 1, 400) ** 3)


def grown(**changes) -> ARPrior:
    torch.manual_seed(0)
    net = ARPrior(**SMALL | changes).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def inputs(net: ARPrior, b: int = 3, length: int = 5) -> tuple[torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(1)
    text = {
        "text_embed": torch.randn(b, net.embed_dim, generator=generator),
        "text_hidden": torch.randn(b, length, net.text_width, generator=generator),
        "text_mask": torch.arange(length) < torch.arange(1, b + 1)[:, None],
    }
    return torch.randint(net.buckets, (b, 1 + net.dims), generator=generator), text


class TestPrincipalComponents:
    def test_are_those_of_a_singular_value_decomposition(self):
        x = embeds().double().numpy()
        mean, variances, rows = (part.numpy() for part in principal_components(embeds()))
        _, s, directions = np.linalg.svd(x - x.mean(0), full_matrices=False)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-10)
        np.testing.assert_allclose(variances, s**2 / len(x), rtol=1e-8)
        np.testing.assert_allclose(np.abs((rows * directions).sum(1)), 1, rtol=1e-8)
        np.testing.assert_allclose(rows @ rows.T, np.eye(E), atol=1e-12)
        assert (rows[np.arange(E), np.abs(rows).argmax(1)] > 0).all()

    def test_how_many_keep_a_share(self):
        variances = torch.tensor([6.0, 3.0, 1.0, 0.0], dtype=torch.float64)
        shares = (0.1, 0.6, 0.61, 0.9, 0.91, 1.0)
        assert [dims_for(variances, kept) for kept in shares] == [1, 1, 2, 2, 3, 3]
        assert dims_for(torch.zeros(4), 0.99) == 4  # nothing varies: nothing is left out

    def test_what_is_lost_is_the_variance_left_out(self):
        """The paper's "less than 1 % average mean squared error" is kept_variance=0.99."""
        x, codes = embeds(), fitted(dims=3, buckets=2**16)
        variances = principal_components(x)[1]
        lost = (codes.decode(codes.encode(x)) - x).square().sum(1).mean()
        assert lost.item() == pytest.approx(variances[3:].sum().item(), rel=0.02)

    def test_no_numbers_are_refused(self):
        x = embeds()
        x[7, 2] = torch.nan
        with pytest.raises(UserError, match="the image embeddings hold values that are no numbers"):
            principal_components(x)


class TestCodes:
    def test_there_and_back_is_within_half_a_bucket(self):
        codes, x = fitted(), embeds(seed=0)
        inside = ((codes.project(x) > codes.low) & (codes.project(x) < codes.high)).all(1)
        assert inside.float().mean() > 0.95
        off = (codes.project(codes.decode(codes.encode(x))) - codes.project(x))[inside].abs()
        half = (codes.high - codes.low) / codes.buckets / 2
        assert (off <= half * 1.001 + 1e-5).all()
        middles = torch.randint(1024, (50, E))
        assert torch.equal(codes.encode(codes.decode(middles)), middles)

    def test_beyond_the_buckets_is_the_outermost_and_no_number_the_first(self):
        codes = fitted(dims=2)
        ends = torch.stack((codes.low - 5, codes.high + 5)) @ codes.components + codes.mean
        assert codes.encode(ends).tolist() == [[0, 0], [1023, 1023]]
        assert codes.encode(torch.full((1, E), torch.nan)).tolist() == [[0, 0]]

    def test_dimensions_come_by_their_variance(self):
        ranges = fitted().high - fitted().low
        assert torch.equal(ranges, ranges.sort(descending=True).values)

    def test_a_dimension_that_never_moves_is_one_bucket_wide(self):
        x = embeds()[:1].expand(20, E)
        codes = EmbeddingCodes(E, E, 16).fit(x, torch.zeros(20))
        torch.testing.assert_close(codes.decode(codes.encode(x)), x, atol=1e-4, rtol=1e-4)

    def test_dot_products_fill_their_buckets_evenly(self):
        dots = torch.linspace(-1, 1, 400) ** 3
        counts = fitted(buckets=8).encode_dot(dots).bincount(minlength=8)
        assert counts.sum() == 400
        assert counts.min() >= 48
        assert counts.max() <= 52
        assert fitted(buckets=8).encode_dot(torch.tensor([-9.0, 9.0])).tolist() == [0, 7]

    def test_a_quantile_of_the_dot_products(self):
        codes, dots = fitted(buckets=8), torch.linspace(-1, 1, 400) ** 3
        quantiles = torch.tensor([0.0, 0.3, 0.5, 0.75, 0.999, 1.0])
        assert torch.equal(codes.dot_at(quantiles), codes.encode_dot(dots.quantile(quantiles)))
        assert codes.dot_at(torch.linspace(0.501, 1, 50)).min() >= 4

    def test_a_dot_product_that_is_often_the_same_has_a_token_that_was_trained(self):
        dots = torch.cat((torch.zeros(50), torch.ones(50)))
        codes = EmbeddingCodes(E, 1, 16).fit(embeds(100), dots)
        assert set(codes.dot_at(torch.linspace(0.52, 1, 99)).tolist()) <= set(codes.encode_dot(dots).tolist())

    def test_more_dimensions_than_there_are(self):
        with pytest.raises(UserError, match="dims=9 are more than the 8 of the image embeddings"):
            EmbeddingCodes(E, 9, 4).fit(embeds(), torch.zeros(400))


@pytest.mark.parametrize("waves", [0, 3])
@pytest.mark.parametrize("keep", [None, [True, False, True]])
def test_likelihood_is_that_of_a_loop_without_a_cache(keep, waves):
    net = grown(waves=waves)
    codes, text = inputs(net)
    keep = None if keep is None else torch.tensor(keep)
    likelihood = net(codes, **text, keep_text=keep).log_softmax(2).gather(2, codes[:, 1:, None]).sum((1, 2))
    expected = torch.zeros(3)
    for i in range(1, codes.shape[1]):
        logits, _ = net.prefill(codes[:, :i], **text, keep_text=keep)
        expected += logits.log_softmax(1).gather(1, codes[:, i, None])[:, 0]
    torch.testing.assert_close(likelihood, expected, rtol=1e-4, atol=1e-5)


def test_probabilities_of_all_embeddings_add_up_to_one():
    net = grown()
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    codes = torch.cat((torch.full((len(every), 1), 2), every), dim=1)
    text = {key: value[1:2].expand(len(every), *value.shape[1:]) for key, value in inputs(net)[1].items()}
    likelihood = net(codes, **text).log_softmax(2).gather(2, codes[:, 1:, None]).sum((1, 2))
    assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("length", [5, 3])
@pytest.mark.parametrize("keep", [None, [True, False, True], [False, False, False]])
def test_cache_is_exact(keep, length):
    net = grown(waves=2)
    codes, text = inputs(net, length=length)
    keep = None if keep is None else torch.tensor(keep)
    expected = net(codes, **text, keep_text=keep)
    with torch.inference_mode():
        logits, cache = net.prefill(codes[:, :1], **text, keep_text=keep)
        found = [logits]
        for rank in (1, 2):
            found.append(net.step(codes[:, rank], rank, cache))
    torch.testing.assert_close(torch.stack(found, 1), expected, rtol=1e-4, atol=1e-5)


def test_of_a_dropped_caption_nothing_matters():
    """Its dot product included, which is about the caption."""
    net = grown()
    codes, text = inputs(net)
    other = {key: value.roll(1, 0) for key, value in text.items()}
    nobody = torch.zeros(3, dtype=torch.bool)
    swapped = torch.cat((codes[:, :1].roll(1, 0) + 1, codes[:, 1:]), 1) % 4
    torch.testing.assert_close(
        net(codes, **text, keep_text=nobody), net(swapped, **other, keep_text=nobody), rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(net(codes, **text), net(swapped, **text))


def test_paddings_do_not_matter():
    net = grown()
    codes, text = inputs(net)
    pads = torch.where(text["text_mask"][..., None], text["text_hidden"], 100.0)
    torch.testing.assert_close(net(codes, **text), net(codes, **text | {"text_hidden": pads}))


@pytest.mark.parametrize("options", [{}, {"waves": 3}, {"checkpoint": True}])
def test_all_parameters_learn(options):
    """DDP waits for the gradient of each; the last code is not read."""
    net = grown(**options).train()
    codes, text = inputs(net)
    net(codes, **text, keep_text=torch.tensor([True, False, True])).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]
    assert "codes.components" in net.state_dict()
    assert "wave" not in net.state_dict()


def test_waves_are_shared_by_neighbours():
    net = ARPrior(**SMALL | {"buckets": 256, "waves": 8})
    nn.init.zeros_(net.code_embedding.weight)
    table = net.read(torch.arange(256), net.code_embedding, "read")
    near, far = (table[10] - table[11]).norm(), (table[10] - table[100]).norm()
    assert near < far / 10


def test_papers_prior_has_the_papers_size():
    """Ramesh et al. 2022, Table 3: width 1664, 24 layers, 26 heads; "1B" are .8B without the text encoder."""
    with torch.device("meta"):
        net = ARPrior(1024, 2048, 64, 319, 1024, 1664, 24, 26, waves=0)
    assert net.position.shape[0] == 384  # the paper's context
    assert sum(p.numel() for p in net.layers.parameters()) == 24 * (12 * 1664**2 + 13 * 1664)
    assert sum(p.numel() for p in net.parameters()) == 808_942_336


def test_wrong_sizes():
    with pytest.raises(UserError, match="3 heads do not divide width 32"):
        ARPrior(**SMALL | {"heads": 3})
    with pytest.raises(UserError, match="5 waves are more than the 4 buckets"):
        ARPrior(**SMALL | {"waves": 5})
    net = grown()
    codes, text = inputs(net, length=5)
    with pytest.raises(ValueError, match="6 tokens; this prior takes at most 5"):
        net(codes, **text | {"text_hidden": torch.zeros(3, 6, 6), "text_mask": torch.ones(3, 6) > 0})
