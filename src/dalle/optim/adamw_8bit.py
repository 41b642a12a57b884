"""AdamW with its two averages in 8 bits: an eighth of a network's size beside it, not twice that size.

Blocks of numbers share a scale, and a number in a block is one of 256 of both coarse and fine steps (Dettmers
et al. 2022, "8-bit Optimizers via Block-wise Quantization"). What differs: the second average is kept as its
root, whose range is half of as many decades; and numbers are rounded up or down by chance, so that what a
step adds is not lost for being less than half of a rounding step. Small weights keep fp32 averages.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.optim import Optimizer

from dalle.compiler import can_compile, compiled
from dalle.optim.muon import adamw_step
from dalle.ranges import Betas, NonNegative, Rate

BLOCK = 256  # numbers of a scale
SMALL = 4096  # weights of a parameter, below which there is little to save


def codebook(signed: bool) -> Float[Tensor, "256"]:
    """The numbers that 8 bits stand for, in [-1, 1] or [0, 1], rising, over seven decades: larger ones lie
    closer for their size (Dettmers 2016, "dynamic tree quantization").
    """
    magnitudes = [torch.tensor([0.0, 1.0])]
    for decade in range(7):  # from 1e-7 to 1, each with twice as many steps
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        middles = (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).float()
        magnitudes += [middles, -middles] if signed else [middles]
    return torch.cat(magnitudes).sort().values


def decoded(
    codes: UInt8[Tensor, "n 256"], scale: Float[Tensor, "n 1"], book: Float[Tensor, "256"]
) -> Float[Tensor, "n 256"]:
    return book[codes.int()] * scale


def encoded(
    values: Float[Tensor, "n 256"], book: Float[Tensor, "256"], chance: Float[Tensor, "n 256"]
) -> tuple[UInt8[Tensor, "n 256"], Float[Tensor, "n 1"]]:
    """Codes and scales whose expected value is that of `values`; chance: uniform in [0, 1)."""
    scale = values.abs().amax(1, keepdim=True)
    parts = values / scale.clamp(min=1e-30)
    above = torch.bucketize(parts, book).clamp(1, len(book) - 1)
    low, high = book[above - 1], book[above]
    up = chance * (high - low) < parts - low
    return (above - 1 + up).to(torch.uint8), scale


def quantized_step(
    p: Float[Tensor, "N"],
    grad: Float[Tensor, "N"],
    codes: UInt8[Tensor, "2 n 256"],
    scales: Float[Tensor, "2 n 1"],
    books: Float[Tensor, "2 256"],
    rates: Float[Tensor, "7"],
    bad: Tensor,
) -> None:
    """One step in place, of all averages; none where `bad`.

    rates: learning rate, betas, eps, what weights are multiplied by, and what makes up for averages that
    began at zero.
    """
    lr, beta1, beta2, eps, kept, whole1, whole2 = rates.unbind()
    blocks = codes.shape[1]
    g = F.pad(grad.float(), (0, blocks * BLOCK - len(p))).view(blocks, BLOCK)
    first = decoded(codes[0], scales[0], books[0])
    second = decoded(codes[1], scales[1], books[1]).square()
    first = beta1 * first + (1 - beta1) * g
    second = beta2 * second + (1 - beta2) * g.square()
    step = lr * (first / whole1) / ((second / whole2).sqrt() + eps)
    moved = p.float() * kept - step.flatten()[: len(p)]
    p.copy_(torch.where(bad, p, moved.to(p.dtype)))
    for i, values in enumerate((first, second.sqrt())):
        code, scale = encoded(values, books[i], torch.rand_like(values))
        codes[i].copy_(torch.where(bad, codes[i], code))
        scales[i].copy_(torch.where(bad, scales[i], scale))


class AdamW8bit(Optimizer):
    """AdamW whose averages take two bytes a weight.

    Args:
        params: weights, or groups of them.
        lr, betas, eps, weight_decay: as of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Rate,
        betas: Betas = (0.9, 0.99),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        # `fused`: as of Muon
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, defaults)
        self.found_inf: Tensor | None = None  # on the device; 1: this step moves nothing
        self.books: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            small = [p for p in given if p.numel() < SMALL]
            if small:
                adamw_step(small, self.state, group, self.found_inf)
            for p in given:
                if p.numel() >= SMALL:
                    self.quantized(p, group)
        return loss

    def quantized(self, p: Tensor, group: dict[str, Any]) -> None:
        state, device = self.state[p], p.device
        if device not in self.books:
            self.books[device] = torch.stack((codebook(True), codebook(False))).to(device)
        if not state:
            blocks = -(-p.numel() // BLOCK)
            zeros = torch.tensor([int(book.abs().argmin()) for book in (codebook(True), codebook(False))])
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["codes"] = zeros.to(torch.uint8)[:, None, None].repeat(1, blocks, BLOCK).to(device)
            state["scales"] = torch.zeros(2, blocks, 1, device=device)
        bad = torch.zeros((), dtype=torch.bool, device=device)
        if self.found_inf is not None:
            bad = self.found_inf > 0
        state["step"] += ~bad
        (beta1, beta2), lr, kept = group["betas"], group["lr"], 1 - group["lr"] * group["weight_decay"]
        # filled on the device: copies of numbers would wait for it
        given = [torch.full((), x, device=device) for x in (lr, beta1, beta2, group["eps"], kept)]
        rates = torch.stack([*given, 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]])
        grad: Any = p.grad
        grad = grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
        step = compiled(quantized_step) if can_compile(device) else quantized_step
        step(in_memory(p), in_memory(grad), state["codes"], state["scales"], self.books[device], rates, bad)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch gives all that is kept the type of the weight; codes are whole numbers, and exact in any."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "codes" in state:
                state["codes"] = state["codes"].to(torch.uint8)
                state["scales"] = state["scales"].float()


def in_memory(t: Tensor) -> Float[Tensor, "N"]:
    """The numbers of a dense tensor in the order in which they lie in memory, no copy."""
    return t.detach().as_strided((t.numel(),), (1,))
