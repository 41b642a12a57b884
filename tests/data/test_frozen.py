"""FrozenCLIP stays frozen, in full precision, and is known by the hash of its weights."""

import pytest
import torch
from torch import nn

from dalle.data.frozen import FrozenCLIP, weights_hash
from dalle.data.tokenizers import CaptionTokenizer
from dalle.nets.clip import CLIP


@pytest.fixture
def frozen() -> FrozenCLIP:
    tokenizer = CaptionTokenizer.train(["a red circle", "a blue square above a ring"], 300, 12)
    torch.manual_seed(0)
    net = CLIP(
        image_size=16, patch_size=8, vision_width=32, vision_layers=1, text_width=24, text_layers=1,
        context_length=12, vocab_size=tokenizer.vocab_size, embed_dim=20, text_heads=None, vision="vit",
    )  # fmt: skip
    return FrozenCLIP(net, tokenizer)


def test_sizes_and_shapes(frozen):
    assert (frozen.image_size, frozen.embed_dim, frozen.text_width, frozen.context_length) == (16, 20, 24, 12)
    out = frozen.embed_captions(["a red circle", "a ring"])
    assert {name: tuple(x.shape) for name, x in out.items()} == {
        "text": (2, 12), "text_embed": (2, 20), "text_hidden": (2, 12, 24), "text_mask": (2, 12),
    }  # fmt: skip
    assert torch.equal(out["text_mask"], out["text"] != 0)
    assert torch.equal(out["text_embed"], frozen.embed_text(out["text"])["text_embed"])


def test_resizes(frozen):
    flat = torch.full((2, 3, 1, 1), 0.3)
    torch.testing.assert_close(
        frozen.embed_image(flat.expand(-1, -1, 40, 40)), frozen.embed_image(flat.expand(-1, -1, 16, 16))
    )


def test_stays_frozen_inside_a_trained_owner(frozen):
    owner = nn.Sequential(frozen).train()
    assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad for p in owner.parameters())
    image = torch.rand(2, 3, 16, 16, requires_grad=True)
    embed = frozen.embed_image(image)
    assert not embed.requires_grad
    (nn.Linear(20, 1)(embed)).sum().backward()  # a tensor of inference mode would refuse


def test_autocast_around_it_changes_nothing(frozen):
    image = torch.rand(2, 3, 16, 16)
    expected = frozen.embed_image(image), frozen.embed_captions(["a ring"])
    with torch.autocast("cpu", torch.bfloat16):
        image_embed, text = frozen.embed_image(image.bfloat16().float()), frozen.embed_captions(["a ring"])
        assert torch.equal(frozen.embed_image(image), expected[0])
    assert image_embed.dtype == torch.float32
    for name, value in expected[1].items():
        assert torch.equal(text[name], value)


def test_hash_knows_names_values_and_types(frozen):
    before = frozen.weights_hash
    assert len(before) == 16
    assert before == weights_hash(frozen.net)
    with torch.no_grad():
        frozen.net.visual.proj[0, 0] += 1e-3
    assert weights_hash(frozen.net) != before
    line = nn.Linear(3, 3, bias=False)
    hashes = {weights_hash(line), weights_hash(nn.Sequential(line)), weights_hash(line.bfloat16())}
    assert len(hashes) == 3


def test_hash_is_the_same_everywhere():
    """A fixed value: caches and manifests of earlier versions must stay valid."""
    line = nn.Linear(2, 1)
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[1.0, -2.0]]))
        line.bias.zero_()
    import hashlib

    content = b"bias torch.float32 (1,);" + bytes(4) + b"weight torch.float32 (1, 2);"
    content += bytes.fromhex("0000803f000000c0")
    assert weights_hash(line) == hashlib.sha256(content).hexdigest()[:16]


def test_bf16_is_near_and_known_as_another(frozen):
    """The same weights, other embeddings: what is kept of the one is not taken for the other's."""
    image = torch.rand(4, 3, 16, 16)
    half = FrozenCLIP(frozen.net, frozen.tokenizer, bf16=True)
    exact, near = frozen.embed_image(image), half.embed_image(image)
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    assert torch.nn.functional.cosine_similarity(near, exact).min() > 0.999
    assert half.weights_hash == frozen.weights_hash
    assert half.made_by != frozen.made_by
    text = [net.embed_captions(["a red circle"])["text_embed"] for net in (frozen, half)]
    assert not torch.equal(*text)
    torch.testing.assert_close(*text, rtol=0.05, atol=0.02)
