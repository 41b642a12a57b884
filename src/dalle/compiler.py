"""What torch.compile is asked for: parts of networks that are otherwise eager, and where its work is kept."""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
VARIANTS = 64  # of one part: types, layouts, ranks of tensors


def can_compile(device: torch.device) -> bool:
    """Whether parts of an eager network can be kernels of their own: on a GPU, where nobody watches single
    operations (to count them, or to keep some for a backward pass), which kernels hide.
    """
    if device.type != "cuda" or not HAS_TRITON:
        return False
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A few operations as kernels of their own, for tensors of all sizes."""
    allow_variants()
    return torch.compile(function, dynamic=True)


@cache
def compiled_for_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, anew for each size."""
    allow_variants()
    return torch.compile(function, dynamic=False)


def allow_variants() -> None:
    """Without it the ninth size and all later ones would run as if they were not compiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)


def keep_kernels(directory: str | Path) -> None:
    """Compiled kernels are kept there for later runs, unless the user has said where."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(directory, "kernels").absolute()))
