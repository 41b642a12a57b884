"""The upsampler's network: bicubic at birth, any size, no attention, the level of noise."""

import pytest
import torch
from PIL import Image
from torch import nn

from dalle.errors import UserError
from dalle.images import from_uint8, to_pil, to_uint8
from dalle.nets.blocks import Attention
from dalle.nets.sizes import enlarged
from dalle.nets.upsampler import UpsamplerUNet


def make_net(**options) -> UpsamplerUNet:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "factor": 2, "channels": 3, "out_channels": 3, "residual": False}
    return UpsamplerUNet(
        **{**sizes, "width": 16, "multipliers": [1, 2], "blocks": 1, "patch": 2, **options}
    ).eval()


def moved(net: UpsamplerUNet) -> UpsamplerUNet:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def test_at_birth_it_is_the_bicubic_picture():
    low, x = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 16, 16)
    out = make_net(residual=True)(x, torch.rand(2), low=low, level=torch.zeros(2))
    torch.testing.assert_close(out, enlarged(low, 16, 16))
    assert not make_net()(x, torch.rand(2), low=low, level=torch.zeros(2)).any()


def test_enlarging_is_pillows_bicubic():
    pixels = torch.randint(80, 176, (1, 3, 8, 6), dtype=torch.uint8)
    ours = to_uint8(enlarged(from_uint8(pixels), 24, 18))[0]
    theirs = to_pil(from_uint8(pixels[0])).resize((18, 24), Image.Resampling.BICUBIC)
    difference = ours.permute(1, 2, 0).int() - torch.tensor(list(theirs.tobytes())).view(24, 18, 3)
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("height", [16, 18, 34])
@pytest.mark.parametrize("options", [{}, {"patch": 1, "resample": "block", "multipliers": [1, 1, 2]}])
def test_pictures_of_any_size_go_through(height, options):
    net = moved(make_net(**options))
    out = net(torch.randn(1, 3, height, 22), torch.rand(1), low=torch.randn(1, 3, height // 2, 11),
              level=torch.rand(1))  # fmt: skip
    assert out.shape == (1, 3, height, 22)


def test_it_has_convolutions_alone_and_listens_to_all_it_is_told():
    net = moved(make_net())
    assert not [m for m in net.modules() if isinstance(m, (Attention, nn.MultiheadAttention))]
    given = {"x": torch.randn(2, 3, 16, 16), "t": torch.rand(2), "low": torch.randn(2, 3, 8, 8),
             "level": torch.rand(2)}  # fmt: skip
    out = net(**given)
    for name, value in given.items():
        assert not torch.allclose(net(**{**given, name: value * 0.5}), out, atol=1e-4), name


def test_recomputing_gives_the_same_gradients():
    gradients = []
    for checkpoint in (False, True):
        net = moved(make_net(checkpoint=checkpoint)).train()
        x, low = torch.ones(1, 3, 16, 16), torch.ones(1, 3, 8, 8)
        net(x, torch.ones(1), low=low, level=torch.ones(1)).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(g is not None for g in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"factor": 3}, "factor=3 does not divide the side of 16"),
        ({"resample": "nearest"}, "resample is 'conv' or 'block'"),
        ({"residual": True, "out_channels": 6}, "residual needs out_channels=3"),
        ({"patch": 16}, "image_size=16 cannot be folded by patch 16"),
    ],
)
def test_sizes_that_do_not_fit(options, line):
    with pytest.raises(UserError, match=line):
        make_net(**options)


@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, {"resample": "block", "residual": True}])
def test_compiles_to_one_graph(options):
    """Captured whole, without the minutes that inductor takes to make code of it."""
    torch.compiler.reset()
    net = moved(make_net(**options))
    given = {"x": torch.randn(2, 3, 16, 16), "t": torch.rand(2), "low": torch.randn(2, 3, 8, 8),
             "level": torch.rand(2)}  # fmt: skip
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), net(**given), rtol=1e-4, atol=1e-4)
