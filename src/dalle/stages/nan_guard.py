"""Steps without numbers are left out and counted, and too many in a row end a run.

A loss that is nan, infinite, or has exploded makes its whole gradient nan, and with that the norm of the
gradient on all ranks, as they average their gradients: one look at the norm, and all agree without asking one
another. On a GPU not even the host looks, which would make it wait for the device in every step: fused
optimizers can be told by a number on the device to move nothing. A step that is left out counts as a step for
the schedule, as under fp16, but moves nothing: neither weights nor the optimizer's state, buffers, or a
moving average.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.sharded import sum_of_squares

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
        deferred: nobody waits for the device: it leaves out bad steps by itself, and is looked at one step
            late. Then `left_out` is not known within a step, and `bad` is.
        bad: of this step so far, on the device.
    """

    def __init__(self) -> None:
        self.skipped, self.in_a_row, self.left_out = 0, 0, False
        self.deferred, self.step = False, 0
        self.news: list[int] = []  # numbers of steps that were left out, of which nothing has been said yet
        self.limits: dict[int, float | Tensor] = {}  # by optimizer: a loss that reaches it has exploded
        self.losses: dict[int, Tensor] = {}
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []
        self.bad: Tensor | None = None
        self.unread: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def begin(self, stage: Any) -> None:
        """Before a step: keeps what a forward pass may move, statistics and codebooks."""
        self.left_out, self.bad, self.step = False, None, stage.global_step
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
    def decide(self, norm: Tensor, optimizer: Any, which: int = 0) -> None:
        """The same without waiting: tells the optimizer, by its `found_inf`, to move nothing after all."""
        bad = ~norm.isfinite()
        self.bad = bad if self.bad is None else self.bad | bad
        first = EXPLODED * self.losses[which].float().abs().clamp(min=1.0)
        limit = self.limits.get(which, torch.inf)
        if not isinstance(limit, Tensor):
            limit = torch.full_like(first, limit)
        self.limits[which] = torch.where(~self.bad & limit.isinf(), first, limit)
        for module, name, buffer in self.buffers:
            now = getattr(module, name)
            now.copy_(torch.where(self.bad, buffer, now))
        optimizer.found_inf = self.bad.float()

    @torch.no_grad()
    def leave_out(self, weights: list[nn.Parameter]) -> None:
        """Without gradients an optimizer moves nothing."""
        for p in weights:
            p.grad = None
        for module, name, buffer in self.buffers:
            getattr(module, name).copy_(buffer)

    def end(self) -> None:
        """After a step. A deferred guard counts the step before: the device has long got so far."""
        if not self.deferred:
            self.count(self.step, self.left_out)
        elif self.bad is not None:
            flag, event = self.bad.to("cpu", non_blocking=True), None
            if self.bad.is_cuda:
                event = torch.cuda.Event()
                event.record()
            self.unread.append((self.step, flag, event))
            self.read(newest=False)

    def read(self, newest: bool = True) -> None:
        """Counts the steps that the device has been asked about: all, or all but the newest."""
        while len(self.unread) > (not newest):
            step, flag, event = self.unread.pop(0)
            if event is not None:
                event.synchronize()
            self.count(step, bool(flag.numpy()))

    def count(self, step: int, left_out: bool) -> None:
        self.skipped += left_out
        self.in_a_row = self.in_a_row + 1 if left_out else 0
        if left_out:
            self.news.append(step)

    def state_dict(self) -> dict[str, Any]:
        self.read()
        limits = {which: float(limit) for which, limit in self.limits.items()}
        known = {which: limit for which, limit in limits.items() if math.isfinite(limit)}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "limits": known}

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
    size = (sum_of_squares(weights) / sum(p.numel() for p in weights)).sqrt()
    buffers = [buffer for _, _, buffer in kept_buffers(stage) if buffer.is_floating_point()]
    return bool(size < LARGEST) and all(bool(torch.isfinite(b).all()) for b in buffers)
