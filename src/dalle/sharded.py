"""Tensors of which each rank holds a part (FSDP2), and those of which it does not, alike.

A sharded parameter is a DTensor: it has the shape of the whole, and a slice of its first dimension is here.
What works on every entry alone (an average, a scaling) is done on that slice: an operation on DTensors takes
ten times as long to begin.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part that is here, in the same memory; all of a tensor that is not sharded."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on the CPU where it was sharded. On all ranks alike."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def all_whole(nest: Any, keep: bool = True) -> Any:
    """The same of all tensors in a nest of dicts and lists; one at a time, and empty ones without `keep`."""
    if isinstance(nest, DTensor):
        full = whole(nest)
        return full if keep else full.new_empty(0)
    if isinstance(nest, Mapping):
        return {key: all_whole(value, keep) for key, value in nest.items()}
    return [all_whole(value, keep) for value in nest] if isinstance(nest, list | tuple) else nest


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all ranks have, sharded as another of its shape is; itself where none is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """Over all entries on all ranks, in fp32; on all ranks alike."""
    tensors = list(tensors)
    total = torch.stack([local(t).float().square().sum() for t in tensors]).sum()
    if isinstance(tensors[0], DTensor):
        mesh = tensors[0].device_mesh
        dist.all_reduce(total, group=mesh.get_group(mesh.ndim - 1))  # before it are copies
    return total


def clip_sharded(weights: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients so that their norm over all ranks is at most `limit` -> the norm before."""
    grads = [p.grad for p in weights if p.grad is not None]
    norm = sum_of_squares(grads).sqrt()
    torch._foreach_mul_([local(g) for g in grads], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gather(net: nn.Module) -> None:
    """Puts all of the weights on each rank until `release`: whatever is called of a network then works, and
    no rank waits for another. Nothing to do for a network that is not sharded.
    """
    if isinstance(net, FSDPModule):
        net.set_reshard_after_forward(False)
        with torch.inference_mode(False), torch.no_grad():
            for module in _sharded(net):
                module.unshard()


def release(net: nn.Module) -> None:
    """Leaves each rank its part."""
    if isinstance(net, FSDPModule):
        net.set_reshard_after_forward(True)
        for module in _sharded(net):
            module.reshard()


def _sharded(net: nn.Module) -> list[FSDPModule]:
    return [module for module in net.modules() if isinstance(module, FSDPModule)]
