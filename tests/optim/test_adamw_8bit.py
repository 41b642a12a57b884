"""AdamW in 8 bits beside AdamW."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dalle.optim.adamw_8bit import AdamW8bit, codebook, decoded, encoded
from dalle.optim.factory import OptimizerFactory


def trained(optimizer: Any, net: nn.Module, steps: int, first: int = 0) -> list[float]:
    """Losses of learning what another network does."""
    torch.manual_seed(1)
    teacher, losses = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), []
    for step in range(first, first + steps):
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.manual_seed(step)  # of what is rounded by chance, as in a stage
        optimizer.step()
        losses.append(loss.item())
    return losses


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


@pytest.mark.parametrize("signed", [True, False])
def test_the_codebook_has_fine_steps_for_large_numbers(signed):
    book = codebook(signed)
    assert len(book) == len(book.unique()) == 256
    assert book.max() == 1
    assert book.abs().sort().values[1] < 1e-6
    assert (book.min() < -0.9) == signed
    assert book.diff()[-20:].max() < 0.02


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_by_chance_is_right_on_average(signed):
    torch.manual_seed(0)
    book, values = codebook(signed), torch.randn(4, 256)
    values = values if signed else values.abs()
    mean = torch.zeros_like(values)
    for _ in range(400):
        codes, scale = encoded(values, book, torch.rand_like(values))
        mean += decoded(codes, scale, book) / 400
    torch.testing.assert_close(mean, values, rtol=0, atol=0.01)
    exact, scale = encoded(book[None] * 3, book, torch.rand(1, 256))
    assert torch.equal(exact[0], torch.arange(256, dtype=torch.uint8))


def test_it_learns_as_adamw_does():
    losses, nets = [], []
    for kind in (torch.optim.AdamW, AdamW8bit):
        nets.append(student())
        losses.append(trained(kind(nets[-1].parameters(), lr=3e-3, weight_decay=0.01), nets[-1], 150))
    usual, ours = (sum(some[-20:]) / 20 for some in losses)
    assert usual < 0.5 * losses[0][0]
    assert ours == pytest.approx(usual, rel=0.05)


def test_small_weights_move_as_under_adamw():
    ours, theirs = (nn.Parameter(torch.ones(7, 3)) for _ in range(2))
    optimizers = [kind([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1) for kind, p in (
        (AdamW8bit, ours), (torch.optim.AdamW, theirs)
    )]  # fmt: skip
    for step in range(3):
        for optimizer, p in zip(optimizers, (ours, theirs), strict=True):
            p.grad = torch.randn(7, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_the_first_step_is_adamws():
    """It depends on no average that was kept."""
    ours, theirs = (nn.Parameter(torch.ones(100, 50)) for _ in range(2))
    for kind, p in ((AdamW8bit, ours), (torch.optim.AdamW, theirs)):
        p.grad = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
        kind([p], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(ours, theirs)


def test_it_takes_two_bytes_a_weight():
    p = nn.Parameter(torch.ones(512, 512))
    p.grad = torch.ones_like(p)
    optimizer = AdamW8bit([p], lr=0.1)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert held / p.numel() == pytest.approx(2.03, abs=0.01)


def test_kernels_move_in_whatever_order_they_lie_in_memory():
    made = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(torch.ones(32, 32, 3, 3).to(memory_format=layout))
        optimizer = AdamW8bit([p], lr=0.1)
        p.grad = torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        made.append(p.detach())
    torch.testing.assert_close(*made)


def test_a_step_that_is_left_out_moves_nothing():
    net = student()
    optimizer: Any = AdamW8bit(net.parameters(), lr=3e-3)
    trained(optimizer, net, 2)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close((net.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


def test_it_goes_on_bit_by_bit():
    nets = [student() for _ in range(2)]
    optimizers = [AdamW8bit(net.parameters(), lr=3e-3) for net in nets]
    trained(optimizers[0], nets[0], 4)
    trained(optimizers[1], nets[1], 2)
    again = copy.deepcopy(nets[1])
    resumed = AdamW8bit(again.parameters(), lr=3e-3)
    resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    trained(resumed, again, 2, first=2)
    torch.testing.assert_close(again.state_dict(), nets[0].state_dict(), rtol=0, atol=0)


def test_the_factory_makes_it():
    net = student()
    optimizer, _ = OptimizerFactory(AdamW8bit, lr=1e-3, betas=[0.9, 0.99], fused=True).build(net, 10)
    assert isinstance(optimizer, AdamW8bit)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
