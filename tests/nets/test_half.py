"""Weights that are bf16 once and for all: the numbers of autocast, bit for bit, without its copies."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dalle.autoregressive.sampling import generate
from dalle.nets.ar_prior import ARPrior
from dalle.nets.dalle import DALLE
from dalle.nets.dit import DiT
from dalle.nets.half import to_bf16
from dalle.nets.prior import Prior
from dalle.nets.small_unet import SmallUNet
from dalle.nets.unet import UNet

TEXT = {
    "text_embed": torch.randn(3, 8, generator=torch.Generator().manual_seed(1)),
    "text_hidden": torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2)),
    "text_mask": torch.arange(5) < torch.tensor([[5], [3], [2]]),
}
PICTURE = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
TIME = torch.tensor([0.1, 0.5, 1.0])
SIZES = {"embed_dim": 8, "text_width": 12}


def unet() -> tuple[nn.Module, Any]:
    net = UNet(16, 3, 3, 16, (1, 2), 1, (4,), 8, **SIZES, patch=2)
    return net, lambda: net(PICTURE, TIME, image_embed=TEXT["text_embed"], **TEXT)


def dit() -> tuple[nn.Module, Any]:
    net = DiT(16, 3, 3, 4, 32, 2, 4, **SIZES)
    return net, lambda: net(PICTURE, TIME, image_embed=TEXT["text_embed"], **TEXT)


def prior() -> tuple[nn.Module, Any]:
    net = Prior(**SIZES, context_length=6, vocab_size=9, width=16, depth=2, heads=2)
    return net, lambda: net(TEXT["text_embed"], TIME, cache=net.prefix(**TEXT))


def ar_prior() -> tuple[nn.Module, Any]:
    net = ARPrior(**SIZES, context_length=6, dims=4, buckets=32, width=16, depth=2, heads=2, waves=4)
    return net, lambda: net(torch.arange(15).reshape(3, 5), **TEXT)


def dalle() -> tuple[nn.Module, Any]:
    net = DALLE(20, 6, 11, 3, 32, 2, 4, style="llama", image_levels=None)
    text = torch.tensor([[1, 5, 19, 0, 0, 0]] * 3)
    return net, lambda: net(text, torch.arange(27).reshape(3, 9) % 11)[1]


@pytest.mark.parametrize("made", [unet, dit, prior, ar_prior, dalle])
def test_the_numbers_of_autocast_without_casting(made):
    """Of every network that is drawn with. And how far bf16 is from fp32 at all: a percent or two."""
    torch.manual_seed(0)
    net, run = made()
    for p in net.eval().parameters():  # outputs are zero at birth
        nn.init.normal_(p, std=0.15) if p.ndim > 1 else nn.init.normal_(p, mean=0.5, std=0.15)
    with torch.no_grad():
        exact: Tensor = run()
        with torch.autocast("cpu", torch.bfloat16):
            usual = run()
        to_bf16(net)
        with torch.autocast("cpu", torch.bfloat16):
            cast = run()
    assert torch.equal(cast, usual)
    off = (cast - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.03
    halves = sum(p.numel() for p in net.parameters() if p.dtype == torch.bfloat16)
    assert halves > 0.5 * sum(p.numel() for p in net.parameters())


def test_what_stays_fp32():
    net = DALLE(20, 6, 11, 3, 32, 2, 4, image_levels=None)
    to_bf16(net)
    whole = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, p in net.named_parameters()
        if p.dtype == torch.float32
    }
    assert whole == {
        "norm", "norm1", "norm2", "text_embedding", "image_embedding", "text_position", "row", "column",
        "text_head", "image_head",
    }  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        codes = generate(net.eval(), torch.tensor([[1, 5, 19, 0, 0, 0]]), guidance=2.0)
    assert codes.shape == (1, 9)


class FeatureMaps(TorchDispatchMode):
    """Notes what makes feature maps in another type than bf16, or another layout than channels_last; group
    norms, which compute in fp32 inside, are of other operations than these.
    """

    ops = ("convolution", "add", "cat", "upsample_nearest2d", "avg_pool2d")

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.wrong = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        out = made[0] if isinstance(made, tuple) else made  # None: a gradient that nobody wants
        named = func._schema.name.removeprefix("aten::").removesuffix("_backward") in self.ops
        if named and out is not None and out.ndim == 4:
            last = out.is_contiguous(memory_format=torch.channels_last)
            self.seen += 1
            if out.dtype != torch.bfloat16 or not last:
                self.wrong.append(f"{func}: {tuple(out.shape)}, {out.dtype}, channels_last: {last}")
        return made


UNETS = {
    "conv": lambda: UNet(16, 3, 3, 16, (1, 2), 1, (4,), 8, **SIZES, patch=2),
    "block": lambda: UNet(16, 3, 6, 16, (1, 2), 1, (8,), 8, **SIZES, patch=1, dropout=0.1, resample="block"),
    "small": lambda: SmallUNet(16, 3, 3, 16, (1, 2), (1, 1), (4,), 8, 16, **SIZES, patch=2),
}


@pytest.mark.parametrize("kind", UNETS)
def test_no_feature_map_is_fp32_or_turned_around(kind):
    """Forward and backward under autocast: each such map would be twice the memory traffic."""
    net = UNETS[kind]().to(memory_format=torch.channels_last)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    picture = PICTURE.to(memory_format=torch.channels_last)
    with FeatureMaps() as maps:
        with torch.autocast("cpu", torch.bfloat16):
            out = net(picture, TIME, image_embed=TEXT["text_embed"], **TEXT)
        out.backward(torch.ones_like(out))
    assert maps.seen > 20
    assert maps.wrong == []
