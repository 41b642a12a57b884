"""Recomputing changes memory and time, and nothing else."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dalle.nets.blocks import MLP, Attention
from dalle.nets.recompute import Checkpoint, recomputed


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(32), Attention(32, 2), MLP(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))[0]
        return x + self.mlp(self.norm(x))


def passed(how: Checkpoint | None, layer: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Output, gradients, operations of both passes, and numbers kept between them."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = layer(x) if how is None else recomputed(how, layer, x)
        grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    return {"made": [out, *grads], "flops": counter.get_total_flops(), "kept": sum(kept.values())}


@pytest.mark.parametrize("how", [True, "selective"])
def test_gradients_are_the_same(how):
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 8, 32)
    usual, again = (passed(way, layer, x) for way in (None, how))
    torch.testing.assert_close(again["made"], usual["made"], rtol=0, atol=0)


def test_selective_computes_no_product_twice():
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 8, 32)
    usual, whole, selective = (passed(way, layer, x)["flops"] for way in (None, True, "selective"))
    assert selective == usual
    assert whole == pytest.approx(usual * 4 / 3, rel=0.1)
