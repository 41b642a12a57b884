"""Muon (Jordan et al. 2024): steps along the momentum with all its singular values made one.

For the matrices inside a network; embeddings, heads, gains and biases are left to AdamW, which one optimizer
does here together, so that a stage has one schedule and one state. A matrix's step is scaled to the size that
AdamW's usually has (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from dalle.ranges import Betas, Decay, NonNegative, Rate

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # a quintic that pulls singular values in (0, 1] to 1 +- 0.3 in 5 steps


def orthogonalize(matrices: Float[Tensor, "B M N"], steps: int = 5) -> Float[Tensor, "B M N"]:
    """U V^T of each matrix U S V^T, nearly: singular values of 0.7 to 1.2 in place of S.

    bf16 is enough for it where bf16 is fast, which on most CPUs it is not.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Muon for parameter groups with ``"matrices": True``, AdamW for the others.

    Args:
        params: parameter groups. What has more than two dimensions (kernels) is taken as (out, rest).
        lr: step size of AdamW's groups.
        muon_lr: step size of the matrices.
        betas, eps, weight_decay: AdamW's; `weight_decay` is for both, decoupled.
        momentum: of Muon, in Nesterov's form.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: Rate,
        muon_lr: Rate,
        betas: Betas = (0.9, 0.99),
        eps: NonNegative = 1e-8,
        weight_decay: NonNegative = 0.0,
        momentum: Decay = 0.95,
    ) -> None:
        groups = [{**g, "lr": muon_lr} if g.get("matrices") else g for g in params]
        # `fused` is read by load_state_dict, which then leaves AdamW's step counters on their device
        defaults = {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "momentum": momentum,
            "matrices": False, "fused": True,
        }  # fmt: skip
        super().__init__(groups, defaults)
        self.found_inf: Tensor | None = None  # on the device; 1: this step moves nothing

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            if given and group["matrices"]:
                self.muon(given, group)
            elif given:
                adamw_step(given, self.state, group, self.found_inf)
        return loss

    def muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            alike[p.flatten(1).shape].append(p)
        for some in alike.values():  # one shape in one product; one after the other, for what that takes
            self.muon_alike(some, group)

    def muon_alike(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """The step of matrices of one shape."""
        grads: Any = [p.grad for p in params]
        averages = [self.state[p]["momentum"] for p in params]
        kept = 1 - group["lr"] * group["weight_decay"]
        bad = None if self.found_inf is None else self.found_inf > 0
        if bad is not None:  # what is then done to averages and weights leaves them as they are
            grads = [torch.where(bad, average, grad) for average, grad in zip(averages, grads, strict=True)]
            kept = torch.where(bad, 1.0, kept)
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, averages, group["momentum"])
        del grads  # copies, where a step may be a bad one
        matrices = torch.stack([update.flatten(1) for update in updates])
        del updates
        matrices = orthogonalize(matrices)
        if bad is not None:
            matrices = torch.where(bad, 0.0, matrices)
        size = group["lr"] * 0.2 * max(matrices.shape[1:]) ** 0.5
        torch._foreach_mul_(params, kept)
        steps = [step.view_as(p) for step, p in zip(matrices, params, strict=True)]
        torch._foreach_add_(params, steps, alpha=-size)


def adamw_step(
    params: list[Tensor], states: dict[Any, Any], group: dict[str, Any], found_inf: Tensor | None
) -> None:
    """AdamW's step of some weights of a group, by torch's fused kernel.

    Args:
        states: of all weights of an optimizer; those of these are made where they are missing.
        found_inf: 1 where nothing is to move.
    """
    for p in params:
        if not states[p]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            states[p] |= {"step": step, **zeros}
    own = [states[p] for p in params]
    beta1, beta2 = group["betas"]
    grads: Any = [p.grad for p in params]
    adamw(
        params,
        grads,
        [s["exp_avg"] for s in own],
        [s["exp_avg_sq"] for s in own],
        [],
        [s["step"] for s in own],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        found_inf=found_inf,
    )
