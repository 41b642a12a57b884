"""How a stage is optimised: the algorithm, the step size over time, and what is decayed."""

import copy
import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dalle.errors import UserError
from dalle.optim.adamw_8bit import AdamW8bit
from dalle.optim.muon import Muon
from dalle.ranges import Betas, Decay, Fraction, NonNegative, NonNegativeInt, Rate


class Options(TypedDict, total=False):
    """What presets tune of one optimizer or another; null: the optimizer's own way."""

    betas: Betas
    eps: NonNegative
    momentum: Decay
    dampening: Fraction
    nesterov: bool
    fused: bool | None
    foreach: bool | None
    amsgrad: bool
    muon_lr: Rate


class OptimizerFactory:
    """An optimizer and its learning-rate schedule, before the network and the number of steps are known.

    Args:
        algorithm: makes the optimizer from parameter groups, e.g. ``torch.optim.AdamW``.
        lr: peak learning rate.
        weight_decay: applied to matrices and kernels only, never to gains, biases or one-dimensional
            embeddings.
        warmup: optimizer steps of linear warm-up from zero.
        decay: shape of the way down to ``final * lr``, from ``decay_start`` to ``decay_end``.
        decay_start, decay_end: fractions of all steps at which the learning rate begins and ends to fall.
        options: further arguments of the algorithm (betas, eps, fused, momentum ...). Those it does not have
            are left out: a model's preset may tune AdamW's betas, and `optimizer=sgd` still works.
    """

    def __init__(
        self,
        algorithm: Callable[..., Optimizer],
        lr: Rate,
        weight_decay: NonNegative = 0.01,
        warmup: NonNegativeInt = 100,
        decay: Literal["constant", "linear", "cosine"] = "cosine",
        decay_start: Fraction = 0.5,
        decay_end: Fraction = 1.0,
        final: Fraction = 0.0,
        **options: Unpack[Options],
    ) -> None:
        self.algorithm, self.lr, self.weight_decay = algorithm, lr, weight_decay
        self.options: dict[str, Any] = {**options}
        if "betas" in options:  # torch refuses a whole number beside a fraction
            self.options["betas"] = tuple(float(beta) for beta in options["betas"])
        self.warmup, self.decay, self.decay_start = warmup, decay, decay_start
        self.decay_end, self.final = decay_end, final
        if decay_start > decay_end:
            raise UserError(
                f"optimizer.decay_start={decay_start} comes after optimizer.decay_end={decay_end}"
            )
        for name in self.options.keys() - Options.__annotations__.keys() - {*self.known}:
            raise UserError(f"optimizer.{name} is an option of no optimizer here; there are {self.names()}")
        try:
            self.build(nn.ParameterList([torch.zeros(1, 1), torch.zeros(1)]), 1)  # draws no random number
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer: {error}") from None

    def names(self) -> str:
        own = [name for name in self.known if name not in ("params", "lr", "weight_decay")]
        return ", ".join(sorted({*own, *Options.__annotations__}))

    def scale_lr(self, lr: float, memory: float = 1.0) -> "OptimizerFactory":
        """A copy with all step sizes times `lr` and the decays of all averages to the power of `memory`."""
        made = copy.copy(self)
        made.lr, made.options = lr * self.lr, dict(self.options)
        for key, value in self.options.items():
            if key == "muon_lr":
                made.options[key] = lr * value
            elif key == "momentum":
                made.options[key] = value**memory
            elif key == "betas":
                made.options[key] = [beta**memory for beta in value]
        return made

    @property
    def known(self) -> Collection[str]:
        """The options that the algorithm has."""
        return inspect.signature(self.algorithm).parameters

    @property
    def is_muon(self) -> bool:
        """Whether some matrices go to `muon.Muon`, which needs them whole."""
        return "muon_lr" in self.known

    def check(self, net: nn.Module) -> None:
        """Raises UserError where Muon would have nothing to do in this network."""
        if self.is_muon and not hidden_matrices(net):
            raise UserError(
                f"optimizer=muon finds no matrix in {type(net).__name__}: it takes the Linear and Conv2d "
                "layers in lists and sequences of layers (nn.ModuleList, nn.Sequential); give optimizer=adamw"
            )

    def build(self, net: nn.Module, total_steps: float) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of `net`'s trainable parameters and its schedule over `total_steps` (or inf)."""
        trainable = [p for p in net.parameters() if p.requires_grad]
        hidden = {id(p) for p in hidden_matrices(net)} if self.is_muon else set()
        inner = [p for p in trainable if id(p) in hidden]
        outer = [p for p in trainable if id(p) not in hidden]
        groups = [
            {"params": [p for p in outer if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in outer if p.ndim < 2], "weight_decay": 0.0},
            {"params": inner, "weight_decay": self.weight_decay, "matrices": True},
        ]
        options = {key: value for key, value in self.options.items() if key in self.known}
        optimizer = self.algorithm([g for g in groups if g["params"]], lr=self.lr, **options)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total_steps))

    def factor(self, step: int, total_steps: float) -> float:
        """Multiplier of the peak learning rate at optimizer step `step`."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay == "constant" or math.isinf(total_steps):
            return rising
        start = max(self.warmup, self.decay_start * total_steps)
        done = min(max((step - start) / max(self.decay_end * total_steps - start, 1), 0.0), 1.0)
        falling = 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return rising * (self.final + (1 - self.final) * falling)


def can_skip(optimizer: Any) -> bool:
    """Whether a step moves nothing where the optimizer's `found_inf`, on the device, is 1."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | Muon | AdamW8bit) and bool(
        optimizer.defaults["fused"]
    )


def hidden_matrices(net: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers and convolutions in a network's lists and sequences of layers, for Muon:
    not embeddings, nor the maps in and out that stand alone.
    """
    found = []
    for name, module in net.named_modules():
        repeated = any(part.isdigit() for part in name.split("."))
        if repeated and isinstance(module, nn.Linear | nn.Conv2d):
            found.append(module.weight)
    return found
