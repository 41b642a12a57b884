"""Parts of networks and optimizers that a compiler makes kernels of on a GPU, beside the same operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.nets import blocks
from dalle.nets.blocks import GroupNorm
from dalle.nets.dalle import DALLE
from dalle.optim.adamw_8bit import AdamW8bit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 64, 80, 80), (8, 192, 32, 32), (2, 320, 48, 48)])
def test_group_norm(shape, dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, device="cuda", dtype=dtype) + 1).to(memory_format=torch.channels_last)
    norm, g = GroupNorm(shape[1]).cuda(), torch.randn_like(x)
    nn.init.normal_(norm.weight)
    made = []
    for plain in (False, True):
        x = x.detach().double() if plain else x.detach()
        weights = [w.detach().to(torch.float64 if plain else torch.float32) for w in norm.parameters()]
        inputs = [t.requires_grad_() for t in (x, *weights)]
        if plain:
            out = F.silu(F.group_norm(x, norm.groups, *inputs[1:]))
        else:
            assert blocks.worth_fusing(x)
            out = norm(x, *(w[None].expand(len(x), -1) for w in inputs[1:]))
            assert out.is_contiguous(memory_format=torch.channels_last)
        made.append([out, *torch.autograd.grad(out, inputs, g.to(out.dtype))])
    for ours, exact in zip(*made, strict=True):
        off = (ours.double() - exact).norm() / exact.norm()
        assert off < (1e-5 if dtype == torch.float32 else 6e-3)


def test_sparse_attention():
    """Logits and gradients beside the masked ones, eager."""
    torch.manual_seed(0)
    net = DALLE(
        text_vocab=100, text_length=64, image_vocab=64, grid=16, width=128, depth=3, heads=4,
        attention="dalle", kernel=5, image_levels=None,
    ).cuda()  # fmt: skip
    text = torch.randint(1, 99, (2, 64), device="cuda")
    codes = torch.randint(64, (2, 256), device="cuda")
    made = []
    for training in (True, False):
        net.train(training)
        with torch.autocast("cuda", torch.bfloat16):
            logits = net(text, codes)[1]
        made.append([logits, *torch.autograd.grad(logits.square().mean(), list(net.layers.parameters()))])
    for ours, masked in zip(*made, strict=True):
        assert (ours - masked).norm() < 0.03 * masked.norm()


def test_adamw_in_8_bits():
    """The first two steps, the second of averages that were kept, beside those on the CPU."""
    made = []
    for device in ("cpu", "cuda"):
        p = nn.Parameter(torch.ones(256, 300, device=device))
        optimizer = AdamW8bit([p], lr=0.1, weight_decay=0.1)
        for step in range(2):
            p.grad = torch.randn(256, 300, generator=torch.Generator().manual_seed(step)).to(device)
            optimizer.step()
        made.append(p.detach().cpu())
    cpu, gpu = (p - 1 for p in made)
    assert (gpu - cpu).norm() < 0.05 * cpu.norm()  # both are rounded by chance
