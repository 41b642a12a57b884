"""What DALL-E of 1.3B holds in training on one device, and in drawing: counted on the meta device."""

from typing import Any

import pytest
import torch
from test_conf import config_of
from torch import nn

from dalle.instantiate import instantiate
from dalle.nets.half import to_bf16
from dalle.optim.adamw_8bit import SMALL
from dalle.training import costs
from dalle.training.fit import fill_sizes
from dalle.training.preflight import held, size

GB = 1e9
SIZES = {"image_size": 256, "text_vocab": 16384, "text_length": 128, "image_vocab": 8192, "grid": 32,
         "image_levels": None}  # fmt: skip
TOKENIZER = 97_616_006 * costs.WIDE  # the dVAE of dvae_paper, frozen


def made(*overrides: str) -> Any:
    """The stage of dalle_1b without weights."""
    config = config_of("model=dalle_1b", "data.size=100", "trainer.max_steps=10", *overrides)
    fill_sizes(config, SIZES)
    with torch.device("meta"):
        return instantiate(config["model"], "model")


def averages(stage: Any) -> int:
    """Bytes of the optimizer's, after a step."""
    optimizer, _ = stage.recipe.build(stage.net, 10)
    weights = list(stage.net.parameters())
    for p in weights:  # torch's fused kernel, for the small ones, is not for this device
        p.grad = torch.empty_like(p) if p.numel() >= SMALL else None
    optimizer.step()
    kept = sum(size(v) for state in optimizer.state.values() for v in state.values())
    return kept + sum(2 * size(p) for p in weights if p.grad is None)


def test_it_trains_in_24_gb():
    """Recomputed, averages in 8 bits, with the moving average, four pairs at once. An upper bound: all kinds
    are added up as if each were there in full at the same time, and activations as if all were fp32.
    """
    stage = made()
    short, other = (made("optimizer=adamw_8bit", f"model.net.depth={depth}") for depth in (1, 2))
    batch = costs.meta_batch("dalle", SIZES, stage.net)
    kept_short, kept_other = (costs.counted(one, batch)[1] for one in (short, other))
    kept = kept_short + 23 * (kept_other - kept_short)
    short.net.checkpoint = False
    layer = costs.counted(short, batch)[1] - kept_short  # one is computed anew at a time
    weights = held(stage)
    of_autocast = sum(m.weight.numel() * costs.HALF for m in stage.modules() if isinstance(m, nn.Linear))
    in_8_bits = averages(short) / held(short) * weights
    state = 3 * weights + in_8_bits + of_autocast  # weights, gradients, moving average
    activations = 4 * (kept + layer) * costs.WIDE / costs.HALF
    assert layer > 3 * (kept_other - kept_short)
    assert in_8_bits == pytest.approx(weights / 2, rel=0.03)
    assert state + activations + TOKENIZER < 24 * GB
    assert state + activations + 2 * weights - in_8_bits > 24 * GB  # with AdamW's it would not


def test_it_draws_in_4_gb():
    """In bf16, one picture with guidance, its tokenizer beside it."""
    stage = made()
    to_bf16(stage.net)
    net, streams = stage.net, 2
    cache = 2 * len(net.layers) * streams * (net.text_length + net.codes - 1) * net.width * costs.HALF
    assert held(stage) == pytest.approx(2.8 * GB, rel=0.03)
    assert held(stage) + cache + TOKENIZER < 4 * GB
