"""How a codebook is used: perplexity, share in use, dead codes, and what to do when it collapses."""

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torchmetrics import Metric

from dalle.machine import precise

COLLAPSED = 0.05  # share of codes in use below which a codebook has collapsed
ENOUGH = 10  # codes to be seen for each code there is, before anything is said


def perplexity(counts: Int64[Tensor, "K"]) -> Float[Tensor, ""]:
    """exp(-sum p ln p): how many codes there would be, were all in use used equally; 1 to K."""
    p = precise(counts) / counts.sum().clamp(min=1)
    return torch.special.entr(p).sum().exp().float()


class CodeUse(Metric):
    """Counts how often each of K codes occurs, on all ranks, since the last reset; `compute()` gives (K,)."""

    full_state_update = False
    counts: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.add_state("counts", torch.zeros(vocab_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Int[Tensor, "B N"]) -> None:
        self.counts += torch.bincount(codes.flatten(), minlength=self.vocab_size)

    def compute(self) -> Int64[Tensor, "K"]:
        return self.counts


def code_use(counts: Int64[Tensor, "K"]) -> dict[str, Tensor]:
    """`code_perplexity`; `codes_used`, the share that occurs; `codes_dead`, how many never do."""
    dead = (counts == 0).sum()
    return {
        "code_perplexity": perplexity(counts),
        "codes_used": 1 - dead / len(counts),
        "codes_dead": dead.float(),
    }


def diagnose(counts: Int64[Tensor, "K"], advice: str) -> str | None:
    """One line when a codebook has collapsed, with what to change; None while it is well or too little is
    seen.
    """
    total, size, used = int(counts.sum()), len(counts), int((counts > 0).sum())
    if total < ENOUGH * size or used >= max(2, COLLAPSED * size):
        return None
    return (
        f"the codebook has collapsed: {used} of {size} codes are in use "
        f"(perplexity {perplexity(counts):.1f}); {advice}"
    )
