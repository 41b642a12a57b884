import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dalle.nets.prior import Prior

SMALL = {"embed_dim": 8, "text_width": 6, "context_length": 5, "vocab_size": 9}
SMALL |= {"width": 32, "depth": 2, "heads": 4, "text_layers": 1}


def grown(**changes) -> Prior:
    torch.manual_seed(0)
    net = Prior(**SMALL | changes)
    nn.init.normal_(net.out.weight, std=0.2)
    return net


def inputs(net: Prior, b: int = 3, length: int = 5) -> tuple[torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(1)
    text = {
        "text_embed": torch.randn(b, net.embed_dim, generator=generator),
        "text_hidden": torch.randn(b, length, net.text_width, generator=generator),
        "text_mask": torch.arange(length) < torch.arange(1, b + 1)[:, None],
        "text": torch.randint(0, 9, (b, length), generator=generator),
    }
    if not net.text_layers:
        del text["text"]
    return torch.randn(b, net.embed_dim, generator=generator), torch.rand(b, generator=generator), text


@settings(max_examples=10, deadline=None)
@given(b=st.integers(1, 3), length=st.integers(1, 5), depth=st.integers(1, 3), heads=st.sampled_from([1, 4]))
def test_is_zero_at_birth_at_any_size(b, length, depth, heads):
    net = Prior(**SMALL | {"depth": depth, "heads": heads})
    x, t, text = inputs(net, b, length)
    out = net(x, t, **text)
    assert out.shape == x.shape
    assert not out.any()


def test_papers_prior_has_the_papers_size():
    """ "1B" (DALL-E 2, Table 3): 12 width^2 in each of 24 layers, and what goes in and out."""
    with torch.device("meta"):
        net = Prior(1024, 2048, 256, 50257, 2048, 24, 32)
    assert sum(p.numel() for p in net.layers.parameters()) == 24 * (12 * 2048**2 + 13 * 2048)
    assert sum(p.numel() for p in net.parameters()) == 1_228_551_168


@pytest.mark.parametrize("length", [5, 3])
@pytest.mark.parametrize("keep", [None, [True, False, True], [False, False, False]])
def test_cache_is_exact(keep, length):
    net = grown().eval()
    x, t, text = inputs(net, length=length)
    keep = None if keep is None else torch.tensor(keep)
    cache = net.prefix(**text, keep_text=keep)
    expected = net(x, t, **text, keep_text=keep)
    torch.testing.assert_close(net(x, t, cache=cache), expected, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():  # another attention kernel
        cache = net.prefix(**text, keep_text=keep)
        torch.testing.assert_close(net(x, t, cache=cache), expected, rtol=1e-5, atol=1e-6)


def test_cache_holds_keys_and_values_of_each_layer():
    net = grown()
    x, t, text = inputs(net)
    cache = net.prefix(**text)
    assert [c.shape for c in cache] == [(3, 6, 64)] * 2
    with pytest.raises(ValueError, match="text is in the cache"):
        net(x, t, **text, cache=cache)
    with pytest.raises(ValueError, match="or a cache"):
        net(x, t, text_embed=text["text_embed"])


def test_layers_of_its_own_read_ids_in_both_directions():
    """The same words in another order are another text; the first knows the last; ids are needed."""
    net = grown().eval()
    x, t, text = inputs(net)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    read = net.read(ids)
    assert not torch.isclose(net.read(ids.flip(1)).mean(1), read.mean(1)).any(1).all()
    assert not torch.isclose(net.read(torch.tensor([[1, 2, 3, 4, 8]]))[0, 0], read[0, 0]).all()
    del text["text"]
    with pytest.raises(ValueError, match="needs the token ids as text"):
        net(x, t, **text)
    assert grown(text_layers=0)(x, t, **text).shape == x.shape


def test_too_long_a_text_is_refused():
    net = grown()
    x, t, text = inputs(net, length=6)
    with pytest.raises(ValueError, match="6 tokens; this prior takes at most 5"):
        net(x, t, **text)


def test_no_token_sees_a_later_one():
    """The Jacobian of tokens after all layers by tokens before is zero above the diagonal, and only there."""
    net = grown().eval()

    def through(tokens):
        for layer in net.layers:
            tokens, _ = layer(tokens)
        return tokens[0].sum(1)

    jacobian = torch.autograd.functional.jacobian(through, torch.randn(1, 9, 32))[:, 0]
    assert isinstance(jacobian, torch.Tensor)
    assert torch.equal(jacobian.abs().sum(2) > 1e-9, torch.ones(9, 9, dtype=torch.bool).tril())


class TestConditions:
    def outputs(self, change: dict, **keep) -> tuple[torch.Tensor, torch.Tensor]:
        net = grown().eval()
        x, t, text = inputs(net)
        return net(x, t, **text, **keep), net(x, t, **text | change, **keep)

    def test_all_of_them_matter(self):
        net = grown().eval()
        x, t, text = inputs(net)
        before = net(x, t, **text)
        for change in (
            {"text_embed": torch.randn(3, 8)},
            {"text_hidden": torch.randn(3, 5, 6)},
            {"text": (text["text"] + 1) % 9},
        ):
            assert not torch.isclose(net(x, t, **text | change), before).all(1).any()
        assert not torch.isclose(net(x, t.flip(0), **text), before)[[0, 2]].all(1).any()
        assert not torch.isclose(net(x.flip(0), t, **text), before)[[0, 2]].all(1).any()

    def test_a_dropped_caption_has_no_influence(self):
        new = {"text_embed": torch.randn(3, 8), "text_hidden": torch.randn(3, 5, 6)}
        new |= {"text_mask": torch.ones(3, 5, dtype=torch.bool), "text": torch.zeros(3, 5, dtype=torch.long)}
        before, after = self.outputs(new, keep_text=torch.tensor([False, True, False]))
        assert torch.isclose(before, after, atol=1e-6).all(1).tolist() == [True, False, True]

    def test_pads_have_no_influence(self):
        _, _, text = inputs(grown())
        noisy = torch.where(text["text_mask"][..., None], text["text_hidden"], 9.0)
        before, after = self.outputs({"text_hidden": noisy})
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_every_parameter_is_trained():
    net = grown()
    x, t, text = inputs(net)
    net(x, t, **text, keep_text=torch.tensor([True, False, True])).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpoint in (False, True):
        net = grown(dropout=0.3, checkpoint=checkpoint)
        x, t, text = inputs(net)
        torch.manual_seed(2)
        net(x, t, **text).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.compile
def test_compiles_to_one_graph():
    """Captured whole, forward and backward; without the minutes that inductor takes to make code of it."""
    net = grown().eval()
    x, t, text = inputs(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    expected = net(x, t, **text)
    torch.testing.assert_close(compiled(x, t, **text), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x, t, cache=net.prefix(**text)), expected, rtol=1e-4, atol=1e-5)
