"""A network is compiled once for a whole training: whatever has other shapes runs as it is."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning
import pytest
import torch
from conftest import untrained
from tiny import configure
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from dalle import compiler
from dalle.data.buckets import shapes
from dalle.training import fit as training
from dalle.training.callbacks import Compile

UNET = (
    "model/net=unet", "model.net.width=16", "model.net.multipliers=[1,1]", "model.net.blocks=1",
    "model.net.attention=[4]", "model.net.head_dim=8", "callbacks.generation.items=4",
)  # fmt: skip


COMPILED = (
    "clip", "prior", "ar_prior", "decoder", "unet", "dit", "dalle", "upsampler", "vae", "dvae", "gan",
    "vqgan", "learned vqgan",
)  # fmt: skip
VQGAN = {
    "vqgan": ("model.disc_start=2", "model.net.levels=[8,4]"),
    "learned vqgan": ("model.disc_start=2",),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    for model in ("clip", "dvae"):
        untrained(model, logs)
    return logs


class Graphs(lightning.Callback):
    """How many have been captured, after each step and at the end."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(counters["stats"]["unique_graphs"])

    on_test_end = on_train_batch_end


@pytest.mark.compile
@pytest.mark.parametrize("model", COMPILED)
def test_compiling_happens_in_the_first_step_only(model, logs, monkeypatch):
    """With validations, pictures and a test in between, whose last batches are smaller."""
    torch.compiler.reset()
    counters.clear()
    compile_module, made, graphs = nn.Module.compile, training.make_trainer, Graphs()
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options)
    )

    def make_trainer(*args: Any) -> Any:
        trainer: Any = made(*args)
        trainer.callbacks.append(graphs)
        return trainer

    monkeypatch.setattr(training, "make_trainer", make_trainer)
    settings = (
        f"paths.run='{logs / 'run' / model}'", "compile=true", "trainer.max_steps=5",
        "trainer.val_check_interval=2", "callbacks.grid.every=2", "datamodule.val_items=10",
    )  # fmt: skip
    if model == "unet":
        config = configure("decoder", logs, *UNET, *settings, net=False)
    elif model in VQGAN:
        config = configure("vqgan", logs, *settings, *VQGAN[model])
    else:
        config = configure(model, logs, *settings)
    training.train(config)
    first, *later = graphs.seen
    assert first > 0
    assert later == [first] * len(later)
    assert not counters["graph_break"] or model == "learned vqgan"  # at its codebook


@pytest.mark.compile
def test_a_discriminators_weight_goes_back_through_a_compiled_network(logs, monkeypatch):
    torch.compiler.reset()
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
    place = f"paths.run='{logs / 'run' / 'weighed'}'"
    config = configure("vqgan", logs, place, "model.disc_start=1", "compile=true", "trainer.max_steps=3")
    with torch._functorch.config.patch(donated_buffer=True):
        training.train(config)
        assert torch._functorch.config.donated_buffer  # of other networks it stays as it was


def test_kernels_are_kept_with_what_else_is(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compiler.keep_kernels(tmp_path)
    assert compiler.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kernels")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    compiler.keep_kernels(tmp_path)
    assert compiler.os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


@pytest.mark.compile
def test_every_shape_of_buckets_is_compiled():
    """By default torch gives up after eight and runs the rest as it is."""
    seen = CompileCounter()
    net = nn.Conv2d(3, 3, 1)
    with torch._dynamo.config.patch(recompile_limit=8):
        Compile().on_fit_start(Mock(), Mock(net=net))
        net.compile(backend=seen, dynamic=False)
        for height, width in (found := shapes(256, 16)):
            net(torch.zeros(1, 3, height, width))
    assert seen.frame_count == len(found) > 8
