"""Stages that draw fast: the same as ever, batch after batch, and on a GPU without a word to the host."""

from typing import Any

import pytest
import test_ar_prior_stage
import test_decoder_stage
import test_prior_stage
import torch
from torch import nn

from dalle.autoregressive.static import Static
from dalle.diffusion.noise import per_sample
from dalle.diffusion.samplers import Sampler
from dalle.nets.dalle import DALLE
from dalle.nets.half import to_bf16
from dalle.stages.dalle import DalleStage


def dalle() -> Any:
    torch.manual_seed(0)
    net = DALLE(20, 6, 32, 3, 32, 2, 4, attention="dalle", style="llama", shift=True, image_levels=[8, 4])
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return DalleStage(net, top_k=20, top_p=0.9).eval()


def captions(size: int) -> dict[str, Any]:
    text = torch.randint(2, 19, (size, 6), generator=torch.Generator().manual_seed(size))
    text[:, 3] = 19
    return {"text": text}


STAGES = {
    "dalle": (dalle, captions),
    "ar_prior": (lambda: test_ar_prior_stage.make_stage(guidance=2.0), test_ar_prior_stage.make_batch),
    "prior": (lambda: test_prior_stage.make_stage(guidance=2.0, candidates=2), test_prior_stage.make_batch),
    "decoder": (
        lambda: test_decoder_stage.make_stage("cosine", "eps", True, guidance=2.0),
        test_decoder_stage.make_batch,
    ),
}


def draw(stage: Any, batch: dict[str, Any], seed: int) -> torch.Tensor:
    size = len(next(iter(batch.values())))
    return stage.sample(batch, randn=per_sample(range(seed, seed + size), next(iter(batch.values())).device))


@pytest.mark.parametrize("name", STAGES)
def test_the_same_is_drawn(name):
    """By batches up to the first one's size, larger ones, and after the speeding up is undone."""
    make, batch_of = STAGES[name]
    stage, usual = make(), make()
    stage.speed_up("graphs")
    for size in (4, 4, 3, 1, 5, 4):
        batch = batch_of(size)
        torch.testing.assert_close(draw(stage, batch, size), draw(usual, batch, size), rtol=1e-4, atol=1e-4)
    stage.speed_up("none")
    assert torch.equal(draw(stage, batch, 1), draw(usual, batch, 1))


def refusing(run: Any) -> Any:
    """`run`, in which an operation that waits for the GPU is an error."""

    def refused(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", ["graphs", "full"])
@pytest.mark.parametrize("name", STAGES)
def test_no_word_to_the_host_on_a_gpu(name, how, monkeypatch):
    """While codes or estimates are made one after another, and what comes out is what the CPU draws."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)  # trainings before have allowed it
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    make, batch_of = STAGES[name]
    stage, usual, batch = make().cuda(), make(), batch_of(4)
    stage.speed_up(how)
    there = {key: value.cuda() for key, value in batch.items()}
    draw(stage, there, 1)  # kernels, tables and graphs are made
    monkeypatch.setattr(Static, "__call__", refusing(Static.__call__))
    monkeypatch.setattr(Sampler, "__call__", refusing(Sampler.__call__))
    drawn = draw(stage, there, 2)
    torch.testing.assert_close(drawn.cpu(), draw(usual, batch, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STAGES)
def test_in_bf16_graphs_draw_what_is_drawn_without(name):
    make, batch_of = STAGES[name]
    stage, usual = make().cuda(), make().cuda()
    to_bf16(stage.net)
    stage.speed_up("graphs")
    for size in (4, 3, 4):
        batch = {key: value.cuda() for key, value in batch_of(size).items()}
        with torch.autocast("cuda", torch.bfloat16):
            fast, slow = draw(stage, batch, size), draw(usual, batch, size)
        if name == "dalle":
            assert (fast == slow).float().mean() > 0.8  # likely codes may tie in bf16
        else:
            torch.testing.assert_close(fast, slow, rtol=0.05, atol=0.05 * slow.abs().max().item())
