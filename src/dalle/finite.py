"""Weights that are no numbers are neither kept nor used."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dalle.errors import UserError


def not_finite(tensors: Mapping[str, object]) -> list[str]:
    """The names of those that hold a nan or an infinity; what has no floating point is passed over."""
    return [
        name
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all()
    ]


def check_finite(weights: Mapping[str, object], path: str | Path, advice: str) -> None:
    """
    Raises:
        UserError: the weights in `path` are no numbers.
    """
    if names := not_finite(weights):
        raise UserError(f"{path} holds weights that are no numbers ({names[0]}); {advice}")
