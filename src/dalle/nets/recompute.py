"""Less memory for more time: what a backward pass needs of a layer is computed anew there, not kept."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# A setting of networks. selective: products and attention, which take long, are kept, the rest is not
Checkpoint = bool | Literal["selective"]

aten = torch.ops.aten
KEPT = {
    getattr(packet, overload)
    for packet, overload in (
        (aten.mm, "default"), (aten.addmm, "default"), (aten.bmm, "default"), (aten.convolution, "default"),
        (aten._scaled_dot_product_flash_attention, "default"),
        (aten._scaled_dot_product_flash_attention_for_cpu, "default"),
        (aten._scaled_dot_product_efficient_attention, "default"),
        (aten._scaled_dot_product_cudnn_attention, "default"),
    )
} | {torch.ops.higher_order.flex_attention}  # fmt: skip


def keep_products(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = operation in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(how: bool | str, layer: Callable[..., Any], *inputs: Any) -> Any:
    """`layer(*inputs)`, of which only the inputs are kept, or also what `how`, a `Checkpoint`, says."""
    if how == "selective":
        contexts = partial(create_selective_checkpoint_contexts, keep_products)
        return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
    return checkpoint(layer, *inputs, use_reentrant=False)
