"""CLIP's network: the same numbers as open_clip's and transformers', from the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.errors import UserError
from dalle.nets.clip import CLIP, PIXEL_MEAN, PIXEL_STD

TINY = {
    "image_size": 32, "patch_size": 8, "vision_width": 64, "vision_layers": 2, "vision_heads": 2,
    "text_width": 48, "text_layers": 2, "text_heads": 3, "context_length": 12, "vocab_size": 100,
    "embed_dim": 40, "vision": "vit",
}  # fmt: skip


CONV = {"vision": "conv", "patch_size": 2, "vision_width": 8, "vision_layers": 3, "vision_heads": None}
RESNET = {
    "vision": "resnet", "patch_size": 32, "vision_width": 8, "vision_layers": [1, 1, 1, 1],
    "vision_heads": None,
}  # fmt: skip
towers = pytest.mark.parametrize("tower", [{}, CONV, RESNET], ids=["vit", "conv", "resnet"])


def tiny(seed: int = 0, **changes) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(**(TINY | changes)).eval()


def inputs(batch: int = 3, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    text = torch.randint(1, 98, (batch, 12), generator=generator)
    for row, length in zip(text, (5, 12, 2), strict=False):
        row[length - 1], row[length:] = 99, 0
    return image, text


def normalised(image: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return ((image + 1) / 2 - mean) / std


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_equals_open_clip_both_ways(activation):
    model = pytest.importorskip("open_clip.model")
    theirs = model.CLIP(
        40,
        model.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32),
        model.CLIPTextCfg(context_length=12, vocab_size=100, width=48, heads=3, layers=2),
        quick_gelu=activation == "quick_gelu",
    ).eval()
    ours, (image, text) = tiny(activation=activation), inputs()
    for source, target in [(ours, theirs), (theirs, ours)]:
        torch.nn.init.normal_(source.visual.proj)  # so that the second copy is not of equal weights
        target.load_state_dict(source.state_dict(), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(
                ours.encode_image(image), theirs.encode_image(normalised(image)), atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                ours.encode_text(text)[0], theirs.encode_text(text), atol=1e-5, rtol=1e-5
            )
            for mine, other in zip(ours(image, text), theirs(normalised(image), text), strict=True):
                torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_text_states_equal_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=48, intermediate_size=192, projection_dim=40, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=12, hidden_act="gelu", eos_token_id=99, bos_token_id=1,
    )  # fmt: skip
    theirs, ours = transformers.CLIPTextModelWithProjection(config).eval(), tiny()
    state = {name: p.clone() for name, p in theirs.state_dict().items() if "position_ids" not in name}

    def copy(name: str, *parameters: torch.Tensor) -> None:
        ending = [key for key in state if key.endswith(name)]
        assert len(ending) == 1
        state[ending[0]] = torch.cat(parameters)

    for i, block in enumerate(ours.transformer.resblocks):
        layer = f"layers.{i}."
        for j, part in enumerate("qkv"):
            copy(f"{layer}self_attn.{part}_proj.weight", block.attn.in_proj_weight.chunk(3)[j])
            copy(f"{layer}self_attn.{part}_proj.bias", block.attn.in_proj_bias.chunk(3)[j])
        pairs = {
            "self_attn.out_proj": block.attn.out_proj, "layer_norm1": block.ln_1, "layer_norm2": block.ln_2,
            "mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj,
        }  # fmt: skip
        for name, module in pairs.items():
            copy(f"{layer}{name}.weight", module.weight)
            copy(f"{layer}{name}.bias", module.bias)
    copy("token_embedding.weight", ours.token_embedding.weight)
    copy("position_embedding.weight", ours.positional_embedding)
    copy("final_layer_norm.weight", ours.ln_final.weight)
    copy("final_layer_norm.bias", ours.ln_final.bias)
    copy("text_projection.weight", ours.text_projection.T)
    theirs.load_state_dict(state, strict=False)
    _, text = inputs()
    with torch.no_grad():
        out, (embed, hidden, _) = theirs(input_ids=text), ours.encode_text(text)
    torch.testing.assert_close(embed, out.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, out.last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("vision_width", "text_width", "embed_dim", "parameters"),
    [(768, 512, 512, 151_277_313), (384, 384, 384, 63_085_825)],
    ids=["ViT-B-32", "ViT-S-32"],
)
def test_parameter_counts_of_the_known_models(vision_width, text_width, embed_dim, parameters):
    with torch.device("meta"):
        net = CLIP(
            image_size=224, patch_size=32, vision_width=vision_width, vision_layers=12, text_width=text_width,
            text_layers=12, text_heads=None, context_length=77, vocab_size=49408, embed_dim=embed_dim,
            vision="vit",
        )  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.visual.transformer.resblocks[0].attn.heads == vision_width // 64


def test_initialisation_is_the_release_s():
    net = tiny(text_width=256, text_heads=4, text_layers=8, vocab_size=1000, embed_dim=256)
    block = net.transformer.resblocks[3]
    expected = [
        (net.token_embedding.weight, 0.02), (net.positional_embedding, 0.01), (net.text_projection, 1 / 16),
        (block.attn.in_proj_weight, 1 / 16), (block.mlp.c_fc.weight, 512**-0.5),
        (block.attn.out_proj.weight, 1 / 64), (block.mlp.c_proj.weight, 1 / 64),
        (net.visual.proj, 1 / 8), (net.visual.positional_embedding, 1 / 8),
    ]  # fmt: skip
    for parameter, std in expected:
        assert parameter.std().item() == pytest.approx(std, rel=0.05)
    assert net.logit_scale.item() == pytest.approx(2.659260036932778, abs=1e-6)


def test_first_loss_is_that_of_equal_logits():
    net, batch = tiny(), 64
    image = torch.zeros(batch, 3, 32, 32)  # equal images: every text likes all of them alike
    text = torch.randint(1, 98, (batch, 12))
    text[:, -1] = 99
    with torch.no_grad():
        image_embed, text_embed, scale = net(image, text)
    loss = F.cross_entropy(scale * text_embed @ image_embed.T, torch.arange(batch))
    assert loss.item() == pytest.approx(math.log(batch), abs=1e-4)


@given(length=st.integers(2, 12), size=st.sampled_from([16, 32, 48]))
@settings(max_examples=8, deadline=None)
def test_text_after_the_end_and_image_size_do_not_matter(length, size):
    net, (image, text) = tiny(), inputs()
    text[:, length - 1], text[:, length:] = 99, 0
    noisy = text.clone()
    noisy[:, length:] = torch.randint(0, 98, noisy[:, length:].shape)
    with torch.no_grad():
        embed, hidden, mask = net.encode_text(text)
        other, other_hidden, other_mask = net.encode_text(noisy)
        short, _, _ = net.encode_text(text[:, :length])
        flat = image[:, :, :1, :1].expand(-1, -1, size, size)
        torch.testing.assert_close(
            net.encode_image(flat), net.encode_image(flat[..., :1, :1].expand(-1, -1, 32, 32))
        )
    torch.testing.assert_close(embed, other)
    torch.testing.assert_close(embed, short)
    torch.testing.assert_close(hidden[mask], other_hidden[other_mask])


def test_mask_ends_with_the_end_token():
    _, text = inputs()
    assert tiny().encode_text(text)[2].sum(1).tolist() == [5, 12, 2]


@pytest.mark.parametrize("vision_layers", [1, 2, 4])
def test_conv_tower_trains_whole(vision_layers):
    """Every parameter of every depth gets a gradient once the branches are no longer zero."""
    net, (image, text) = tiny(**CONV | {"vision_layers": vision_layers}), inputs()
    for block in net.visual.blocks:
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    image_embed, _, _ = net(image, text)
    assert image_embed.shape == (3, 40)
    image_embed[:, 0].sum().backward()
    assert [name for name, p in net.visual.named_parameters() if p.grad is None or not p.grad.any()] == []


@towers
def test_checkpointing_changes_no_gradient(tower):
    image, text = inputs()
    grads = []
    for checkpoint in (False, True):
        net = tiny(**tower, checkpoint=checkpoint).train()
        image_embed, text_embed, scale = net(image, text)
        (scale * image_embed @ text_embed.T).diagonal().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.compile
@towers
def test_compiles_to_the_same_numbers(tower):
    net, (image, text) = tiny(**tower), inputs()
    with torch.no_grad():
        expected = net(image, text)
        torch.testing.assert_close(torch.compile(net)(image, text), expected, atol=1e-4, rtol=1e-4)


@towers
def test_autocast_keeps_the_meaning(tower):
    net, (image, text) = tiny(**tower), inputs()
    with torch.no_grad():
        exact = net(image, text)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(image, text)[0]
    torch.testing.assert_close(rounded.norm(dim=1), torch.ones(3))  # of float32 precision
    assert (exact * rounded).sum(1).min() > 0.995


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 50}, "image_size=32 cannot be folded by patch 50"),
        ({"text_heads": 5}, "text_heads"),
        ({"activation": "relu"}, "relu"),
        ({"vision": "rnn"}, "vision is vit, conv or resnet, not 'rnn'"),
        ({"vision": "resnet"}, "a list of vision_layers, not 2"),
        ({"vision_layers": [1, 1, 1, 1]}, "for vision=resnet with patch_size=32"),
        (RESNET | {"vision_layers": [1, 1, 1]}, "four numbers of layers"),
        (RESNET | {"image_size": 48}, "a multiple of 32 px"),
        (RESNET | {"vision_heads": 5}, "5 heads do not divide 256; set vision_heads"),
        (CONV | {"vision_layers": 0}, "at least one of vision_layers"),
        (CONV | {"vision_layers": 6}, "image_size=32 cannot be folded by patch 2 and then halved 5 times"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        tiny(**change)


def test_too_many_ids_are_refused():
    with pytest.raises(ValueError, match="context length is 12"):
        tiny().encode_text(torch.zeros(1, 13, dtype=torch.int64))
