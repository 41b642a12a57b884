"""Generator and discriminator: sizes, what each reads, the projection's algebra, spectral norms."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.gan import Caption, Discriminator, Generator, GeneratorBlock

COMMON: dict[str, Any] = {
    "image_size": 16,
    "width": 16,
    "multipliers": [1, 2],
    "embed_dim": 6,
    "text_width": 5,
    "patch": 2,
}
GENERATOR = COMMON | {"latent_dim": 7, "blocks": 1, "attention": [4], "head_dim": 16, "condition_width": 24}
DISCRIMINATOR = COMMON | {"features": 10}
KINDS = {Generator: GENERATOR, Discriminator: DISCRIMINATOR}
both = pytest.mark.parametrize("kind", [Generator, Discriminator])


def made(kind: type, **changes) -> Any:
    """A small network in which nothing is zero."""
    torch.manual_seed(0)
    net = kind(**KINDS[kind] | changes)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


def captions(b: int = 3, length: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text_embed": torch.randn(b, 6, generator=generator),
        "text_hidden": torch.randn(b, length, 5, generator=generator),
        "text_mask": torch.arange(length) < torch.arange(1, b + 1)[:, None],
    }


def first(net: Generator | Discriminator, b: int = 3) -> Tensor:
    """Noise for a generator, pictures for a discriminator."""
    generator = torch.Generator().manual_seed(2)
    shape = (b, net.latent_dim) if isinstance(net, Generator) else (b, 3, 16, 16)
    return torch.randn(shape, generator=generator)


@settings(max_examples=12, deadline=None)
@given(
    image_size=st.sampled_from([16, 32, 64]), patch=st.sampled_from([1, 2, 4]), levels=st.integers(1, 3),
    blocks=st.integers(1, 2), attend=st.booleans(),
)  # fmt: skip
def test_any_size(image_size, patch, levels, blocks, attend):
    side = image_size // patch >> (levels - 1)
    sizes = {"image_size": image_size, "patch": patch, "multipliers": [1, 2, 4][:levels]}
    attention = [side] if attend and side <= 16 else []
    net = made(Generator, **sizes, blocks=blocks, attention=attention)
    image = net(first(net), **captions())
    assert image.shape == (3, 3, image_size, image_size)
    assert image.abs().max() <= 1
    assert made(Discriminator, **sizes)(image, **captions()).shape == (3,)


def test_256_pixels():
    sizes = {"image_size": 256, "width": 4, "multipliers": [1, 1, 2, 2, 4, 4], "patch": 2}
    net = made(Generator, **sizes, attention=[], head_dim=4)
    image = net(first(net, 1), **captions(1))
    assert image.shape == (1, 3, 256, 256)
    assert made(Discriminator, **sizes)(image, **captions(1)).shape == (1,)


@both
def test_a_picture_does_not_depend_on_its_batch(kind):
    net = made(kind)
    x, text = first(net), captions()
    alone = net(x[1:2], **{k: v[1:2] for k, v in text.items()})
    torch.testing.assert_close(net(x, **text)[1:2], alone, rtol=1e-4, atol=1e-5)


@both
def test_pads_do_not_matter(kind):
    net = made(kind)
    x, text = first(net), captions()
    other = torch.where(text["text_mask"][..., None], text["text_hidden"], 99.0)
    torch.testing.assert_close(net(x, **text), net(x, **text | {"text_hidden": other}))


@both
@pytest.mark.parametrize("key", ["text_embed", "text_hidden", "text_mask"])
def test_everything_said_of_a_caption_matters(kind, key):
    net = made(kind)
    x, text = first(net), captions()
    changed = ~text[key] if key == "text_mask" else text[key].flip(-1)
    assert not torch.allclose(net(x, **text), net(x, **text | {key: changed}), atol=1e-3)


@both
def test_the_first_input_matters(kind):
    net = made(kind)
    x, text = first(net), captions()
    assert not torch.allclose(net(x, **text), net(x.flip(0), **text), atol=1e-3)


@both
def test_every_weight_learns(kind):
    net = made(kind)
    out = net(first(net), **captions())
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_caption_of_one_word_is_that_word():
    """The mean is over real words only."""
    torch.manual_seed(0)
    caption, text = Caption(8, 6, 5), captions(1)
    vector, words = caption(**text)
    expected = caption.embed(text["text_embed"]) + caption.mean_word(caption.words(text["text_hidden"][:, 0]))
    torch.testing.assert_close(vector, expected)
    torch.testing.assert_close(words, caption.words(text["text_hidden"]))


def test_residual_branches_of_a_generator_begin_at_zero():
    torch.manual_seed(0)
    for block in [m for m in Generator(**GENERATOR).modules() if isinstance(m, GeneratorBlock)]:
        x = torch.randn(2, block.channels, 4, 4)
        context = torch.randn(2, 3, 2 * block.channels) if block.attention is not None else None
        assert torch.equal(block(x, torch.randn(2, 4 * block.channels), context), x)


class TestProjection:
    def test_is_psi_plus_the_product(self):
        """Miyato & Koyama 2018, eq. 4."""
        net = made(Discriminator)
        x, text = first(net), captions()
        f, e = net.picture(x), net.caption(**text)
        expected = torch.stack([net.psi.weight[0] @ f[i] + net.psi.bias[0] + e[i] @ f[i] for i in range(3)])
        torch.testing.assert_close(net(x, **text), expected)

    def test_captions_differ_by_their_projections_alone(self):
        """D(x, c) - D(x, c') = <e(c) - e(c'), f(x)>: psi, which sees no caption, falls out."""
        net = made(Discriminator)
        x, text = first(net), captions()
        other = {k: v.flip(0) for k, v in text.items()}
        difference = ((net.caption(**text) - net.caption(**other)) * net.picture(x)).sum(1)
        torch.testing.assert_close(net(x, **text) - net(x, **other), difference, rtol=1e-4, atol=1e-5)

    def test_is_of_order_one_at_birth(self):
        """He's initialisation: without norms neither picture nor gradient fades."""
        torch.manual_seed(0)
        net = Discriminator(**DISCRIMINATOR | {"width": 32, "multipliers": [1, 2, 4], "features": 256})
        image = torch.rand(64, 3, 16, 16) * 2 - 1
        assert 0.1 < net.picture(image).std() < 10
        assert 0.1 < net(image, **captions(64, 64)).std() < 10


def test_spectral_norms_become_one():
    net = made(Discriminator, spectral_norm=True)
    for _ in range(50):
        net(first(net), **captions())
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            norm = torch.linalg.matrix_norm(module.weight.flatten(1), ord=2)
            torch.testing.assert_close(norm, torch.ones(()), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Generator, {"image_size": 3}, "image_size=3 cannot be folded by patch 2 and then halved 1 times"),
        (Generator, {"attention": [5]}, "attention names feature maps of side"),
        (Generator, {"head_dim": 24}, "head_dim 24 must divide"),
        (
            Discriminator,
            {"image_size": 3},
            "image_size=3 cannot be folded by patch 2 and then halved 1 times",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(kind, changes, message):
    with pytest.raises(UserError, match=message):
        made(kind, **changes)


def test_logits_are_fp32_under_autocast():
    net = made(Discriminator)
    picture, caption = torch.randn(2, 3, 10).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net.logits(picture, caption)
    exact = net.double().logits(picture.double(), caption.double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-6)
