"""Steps go down the gradient: fused optimizers walk memory, so a gradient in another layout than its weight
sends each number to another place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import untrained
from tiny import NETS, train
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from two_ranks import watch


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """logs/ with the networks that others need."""
    logs = tmp_path_factory.mktemp("logs")
    for model in ("clip", "dvae"):
        untrained(model, logs)
    return logs


@pytest.fixture
def shares() -> Iterator[list[float]]:
    """For each optimizer step: the share of weights that move against their gradient, where there is one."""
    before: list[dict[Tensor, Tensor]] = []
    found: list[float] = []

    def first(optimizer: Any, *_: Any) -> None:
        before.append({p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]})

    def then(*_: Any) -> None:
        """Lightning's gradients are only there now: its optimizers compute them within their step."""
        moved = [((old - p) * p.grad)[p.grad != 0] for p, old in before.pop().items() if p.grad is not None]
        found.append((torch.cat(moved) > 0).double().mean().item())

    hooks = [register_optimizer_step_pre_hook(first), register_optimizer_step_post_hook(then)]
    yield found
    for hook in hooks:
        hook.remove()


ADAMW = ("optimizer=adamw", "optimizer.weight_decay=0", "optimizer.warmup=0", "optimizer.lr=1e-3")


@pytest.mark.parametrize("model", NETS)
def test_first_step(model, logs, shares):
    """AdamW's first step from fresh is lr times the sign of the gradient."""
    options = [f"paths.run='{logs / 'first' / model}'", *ADAMW]
    if model == "gan":  # without momentum every step is as the first, the penalty's too
        options += ["model.r1_gamma=1", "model.r1_every=1", "model.beta1=0"]
    if model == "vqgan":
        options += ["model.disc_start=0"]
    train(model, logs, *options, steps=1)
    assert len(shares) == {"gan": 3, "vqgan": 2}.get(model, 1)
    assert min(shares) > 0.99


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_other_optimizers(optimizer, logs, shares):
    options = (f"paths.run='{logs / optimizer}'", f"optimizer={optimizer}", "optimizer.warmup=0")
    train("vqgan", logs, *options, "model.disc_start=0", steps=1)
    assert len(shares) == 2
    assert min(shares) > (0.7 if optimizer == "muon" else 0.99)  # Muon's are not signs


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("gan", "model.conditioning=projection", "model.r1_every=1", "model.beta1=0"),
        ("vqgan", "model.net.levels=[8,4]", "model.adversarial_weight=0"),  # whose weight is each rank's own
    ],
)
def test_two_ranks_step_as_one_does_with_twice_the_batch(options, logs, tmp_path):
    one, two = (watch(n, logs, tmp_path, *options, *ADAMW, "trainer.max_steps=1")["weights"] for n in (1, 2))
    assert torch.equal(one[0, 0], two[0, 0])
    steps = [(seen[1] - seen[0])[0] for seen in (one, two)]
    assert torch.cosine_similarity(*steps, dim=0) > 0.99
    assert torch.equal(two[1, 0], two[1, 1])


@pytest.mark.slow
def test_codebooks_are_the_same_on_all_ranks(logs, tmp_path):
    """From k-means on, and with dead codes drawn anew."""
    options = ("model.net.dead_below=0.5", "model.disc_start=0", "trainer.max_steps=4")
    seen = watch(2, logs, tmp_path, "vqgan", *options)["buffers"]
    assert not torch.equal(seen[1, 0], seen[4, 0])
    assert torch.equal(seen[1:, 0], seen[1:, 1])
