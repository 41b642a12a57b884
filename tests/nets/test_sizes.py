"""Every default network takes pictures of every size, and is of a size that suits it."""

import pytest
import torch
import yaml
from tiny import ROOT
from torch import nn

from dalle.errors import UserError
from dalle.nets.dit import positions
from dalle.nets.sizes import cut, map_sides, padded, stretched
from dalle.training.defaults import fill_sizes
from dalle.trust import composed

SIDES = [
    16, 17, 20, 24, 28, 32, 36, 40, 48, 50, 56, 60, 64, 72, 80, 96, 100, 112, 128, 144, 150, 160, 176, 192,
    200, 224, 240, 250, 256,
]  # fmt: skip
TEXT = {"embed_dim": 32, "text_width": 16, "vocab_size": 300, "context_length": 12}
FILES = ["model/clip", "model/gan", "model/dvae", "model/vqgan", "model/vae", "model/net/small_unet",
         "model/net/unet", "model/net/dit"]  # fmt: skip
VIT = {"vision": "vit"}


def node(file: str, size: int, part: str = "net", **given) -> dict:
    """The network of a preset, as it is filled for pictures of a size."""
    config = yaml.safe_load((ROOT / "conf" / f"{file}.yaml").read_text())
    model = config.get("model", {"net": config})
    model["net"] |= given
    if "inpaint" in model["net"]:  # said once for a network and its stage
        model["net"]["inpaint"] = False
    text = {key: value for key, value in TEXT.items() if model["net"].get(key) == "auto"}
    if file in ("model/dvae", "model/vqgan"):
        text = {}
    fill_sizes({"model": model}, {"image_size": size, **text})
    if part == "discriminator":
        model[part] |= {"image_size": size, **text}
    return {key: value for key, value in model[part].items() if key != "_partial_"}


def made(file: str, size: int, part: str = "net", **given) -> nn.Module:
    arguments = node(file, size, part, **given)
    return composed(arguments.pop("_target_"))(**arguments)


@pytest.mark.parametrize("size", SIDES)
def test_every_size_has_networks(size):
    """Of no more than a few million weights, with codes that a small transformer can write."""
    with torch.device("meta"):
        nets = {file: made(file, size) for file in FILES}
        nets["discriminator"] = made("model/gan", size, "discriminator")
        nets["vit"] = made("model/clip", size, **VIT)
        nets["vqvae"] = made("model/vqgan", size, vocab_size=2304, levels=[[8, 8], [6, 6]], patchwise=128)
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert max(counts.values()) < 11e6, counts
    for name in ("model/dvae", "model/vqgan"):
        assert 3 <= nets[name].grid <= 20
    assert 6 <= nets["model/net/dit"].side <= 16 or size < 24
    for name in ("model/net/small_unet", "model/net/unet"):
        assert nets[name].whole <= 64
        assert (
            size <= nets[name].positions[0].shape[-1] * nets[name].patch
            if name.endswith("small_unet")
            else True
        )


@pytest.mark.parametrize("size", [17, 36])
def test_pictures_of_odd_sizes_go_through(size):
    text = {
        "text_embed": torch.randn(2, 32), "text_hidden": torch.randn(2, 12, 16),
        "text_mask": torch.ones(2, 12, dtype=torch.bool),
    }  # fmt: skip
    image, t = torch.rand(2, 3, size, size) * 2 - 1, torch.rand(2)
    for name in ("small_unet", "unet", "dit"):
        net = made(f"model/net/{name}", size)
        assert net(image, t, image_embed=torch.randn(2, 32), **text).shape == image.shape
    for given in ({}, VIT):
        assert made("model/clip", size, **given).encode_image(image).shape == (2, 128)
    for name in ("dvae", "vqgan"):
        net = made(f"model/{name}", size).eval()
        codes = net.encode(image)
        assert codes.shape == (2, net.grid**2)
        assert net.decode(codes).shape == image.shape
    assert made("model/vae", size)(image)[0].shape == image.shape
    assert made("model/gan", size)(torch.randn(2, 64), **text).shape == image.shape
    image.requires_grad_()
    logits = made("model/gan", size, "discriminator")(image, **text)
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    gradient.square().sum().backward()  # as R1 asks
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_what_is_given_stays_and_the_rest_follows_it():
    assert node("model/net/small_unet", 64, patch=4)["attention"] == [4]
    assert node("model/net/small_unet", 64)["attention"] == [4]
    three = node("model/net/small_unet", 64, multipliers=[1, 2, 4])
    assert (three["blocks"], three["attention"]) == ([2, 1, 1], [8])
    assert node("model/net/unet", 64, patch=4)["attention"] == [8, 4]
    assert node("model/dvae", 64, factor=8)["patch"] == 4
    assert node("model/vqgan", 64, patch=4)["multipliers"] == [2]
    assert node("model/vqgan", 128, multipliers=[1, 2])["patch"] == 4
    assert node("model/vqgan", 32, levels=[8, 5, 5])["vocab_size"] == 200
    assert node("model/gan", 64, multipliers=[1, 2])["attention"] == [32]
    assert node("model/gan", 64, patch=4)["multipliers"] == [1, 2, 4]
    assert node("model/clip", 64, patch_size=8)["vision_layers"] == 2


@pytest.mark.parametrize("name", ["small_unet", "unet", "dit"])
def test_decoders_draw_oblong_pictures(name):
    """With attention, learned places and what is known of the picture stretched to their shape."""
    torch.manual_seed(0)
    net = made(f"model/net/{name}", 32, inpaint=True)
    for p in net.parameters():  # zero at birth
        nn.init.normal_(p, std=0.05)
    given = {
        "image_embed": torch.randn(2, 32), "text_embed": torch.randn(2, 32),
        "text_hidden": torch.randn(2, 12, 16), "text_mask": torch.ones(2, 12, dtype=torch.bool),
    }  # fmt: skip
    for height, width in ((24, 40), (44, 23)):
        image, known = torch.randn(2, 3, height, width), torch.randn(2, 4, height, width)
        drawn = net(image, torch.rand(2), **given, known=known)
        assert drawn.shape == image.shape
        assert drawn.std() > 0
        places = [p for key, p in net.named_parameters() if "position" in key or "sketch" in key]
        net.zero_grad()
        drawn.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in places)


def test_what_is_learned_of_places_is_stretched():
    table = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    assert stretched(table, 8, 8) is table
    wide = stretched(table, 6, 12)
    assert wide.shape == (1, 1, 6, 12)
    torch.testing.assert_close(wide, wide[:, :, :1].expand_as(wide))
    assert wide[0, 0, 0].diff().min() >= 0
    torch.testing.assert_close(wide.flip(3), -wide)
    large, oblong = positions(6, 6, 16).view(6, 6, 16), positions(4, 6, 16).view(4, 6, 16)
    assert torch.equal(large[:4], oblong)


def test_padding_repeats_the_edge_and_is_cut_again():
    image = torch.arange(25.0).view(1, 1, 5, 5)
    whole = padded(image, 4)
    assert whole.shape == (1, 1, 8, 8)
    torch.testing.assert_close(cut(whole, 5), image, rtol=0, atol=0)
    assert (whole[0, 0, :5, 5:] == image[0, 0, :, 4:]).all()
    assert (whole[0, 0, 5:] == whole[0, 0, 4]).all()
    assert padded(image, 5) is cut(image, 5) is image
    assert map_sides(17, 2, 3) == [12, 6, 3]


@pytest.mark.parametrize(("patch", "levels"), [(0, 1), (-1, 2), (2, 0), (16, 2)])
def test_nothing_of_a_picture_left(patch, levels):
    with pytest.raises(UserError, match="image_size=17 cannot be folded"):
        map_sides(17, patch, levels)
