"""Weights in bf16 for drawing, cast once.

An autocast casts the weights of matrix products and convolutions each time they are used: three times the
reading. With weights that are bf16 already it has nothing to cast, and gives the same numbers, bit for bit.
What it leaves in fp32 stays so: norms, embeddings, softmax, and unembeddings, whose logits DALL-E wants in
fp32 (sec. 2.4). Schedules and samplers never were anything else.
"""

import torch
from torch import nn

from dalle.nets.blocks import Unembedding

MULTIPLY = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def to_bf16(net: nn.Module) -> None:
    """In place, for drawing under an autocast to bf16; nothing is to be trained or saved afterwards."""
    for module in net.modules():
        if isinstance(module, MULTIPLY) and not isinstance(module, Unembedding):
            module.to(torch.bfloat16)
