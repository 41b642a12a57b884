"""Steps without numbers are left out and counted, and too many in a row end a run.

A loss that is nan, infinite, or has exploded makes its whole gradient nan, and with that the norm of the
gradient on all ranks, as they average their gradients: one look at the norm, and all agree without asking one
another. A step that is left out counts as a step for the schedule, as under fp16, but moves nothing: neither
weights nor the optimizer's state, buffers, or a moving average.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dalle.errors import UserError

PATIENCE = 20  # steps in a row; fp16 may need 16 to find the scale of a loss
EXPLODED = 1e6  # times the first loss of a run: divergence, not data
LARGEST = 100.0  # root mean square of a network's weights: a sound one's is below 1


class Diverged(UserError):
    """Training has come to nothing. What is in memory is not worth keeping."""


class Guard:
    """Says which steps are taken.

    Attributes:
        skipped: how many were left out.
        in_a_row: how many of those just now, with none between them.
        left_out: whether the last one was.
    """

    def __init__(self) -> None:
        self.skipped, self.in_a_row, self.left_out = 0, 0, False
        self.limits: dict[int, float] = {}  # by optimizer: a loss that reaches it has exploded
        self.losses: dict[int, Tensor] = {}
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []

    def begin(self, stage: nn.Module) -> None:
        """Before a step: keeps what a forward pass may move, statistics and codebooks."""
        self.left_out = False
        self.buffers = [(module, name, buffer.clone()) for module, name, buffer in kept_buffers(stage)]

    def marked(self, loss: Tensor, which: int = 0) -> Tensor:
        """The loss of optimizer `which`; one that is no number, or has exploded, gets a gradient of nan."""
        self.losses[which] = loss.detach()
        good = self.losses[which].abs() < self.limits.get(which, torch.inf)
        return loss * torch.where(good, 1.0, torch.nan).to(loss.dtype)

    def passes(self, norm: Tensor, which: int = 0) -> bool:
        """Whether a step down a gradient of this norm may be taken. Waits for the device: the optimizer must
        not begin before this is known.
        """
        if torch.isfinite(norm):
            if which not in self.limits:
                self.limits[which] = EXPLODED * max(1.0, abs(self.losses[which].item()))
            return True
        self.left_out = True
        return False

    @torch.no_grad()
    def leave_out(self, weights: list[nn.Parameter]) -> None:
        """Without gradients an optimizer moves nothing."""
        for p in weights:
            p.grad = None
        for module, name, buffer in self.buffers:
            getattr(module, name).copy_(buffer)

    def end(self) -> None:
        """After a step."""
        self.skipped += self.left_out
        self.in_a_row = self.in_a_row + 1 if self.left_out else 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "limits": dict(self.limits)}

    @staticmethod
    def fits(state: Any) -> bool:
        """Whether it is what `state_dict` gives."""
        return (
            isinstance(state, dict)
            and all(type(state.get(key)) is int and state[key] >= 0 for key in ("skipped", "in_a_row"))
            and isinstance(state.get("limits"), dict)
            and all(type(k) is int and type(v) is float for k, v in state["limits"].items())
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.limits = state["skipped"], state["in_a_row"], dict(state["limits"])


def kept_buffers(stage: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """What is saved of a stage besides its weights, each with its owner and its name there."""
    for module in stage.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield module, name, buffer


def worth_keeping(stage: nn.Module) -> bool:
    """Whether all that is saved of a stage are numbers, and its weights not far larger than any that work.

    Too high a learning rate can leave finite weights, and even a loss that looks harmless.
    """
    weights = [p.detach() for p in stage.parameters()]
    squares = torch.stack([p.float().square().sum() for p in weights]).sum()
    size = (squares / sum(p.numel() for p in weights)).sqrt()
    buffers = [buffer for _, _, buffer in kept_buffers(stage) if buffer.is_floating_point()]
    return bool(size < LARGEST) and all(bool(torch.isfinite(b).all()) for b in buffers)
