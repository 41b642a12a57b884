"""Simulated costs: what is counted without memory is what a real step takes; the rest is arithmetic."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import NETS, ROOT, configure
from torch.utils.flop_counter import FlopCounterMode

from dalle.errors import UserError
from dalle.instantiate import instantiate
from dalle.training import costs
from dalle.training.costs import Device, Step, plans
from dalle.training.fit import fill_sizes
from dalle.training.memory import Saved
from dalle.training.preflight import count

SIZES = {"image_size": 16, "context_length": 6, "vocab_size": 32, "embed_dim": 8, "text_width": 16,
         "dims": 7, "buckets": 32, "text_vocab": 40, "text_length": 6, "image_vocab": 32, "grid": 4,
         "image_levels": None}  # fmt: skip
STAGES = ("clip", "prior", "ar_prior", "decoder", "dit", "upsampler", "vae", "dvae", "dalle")
STEP = Step(parameters=1_000_000_000, block=40_000_000, rest=40_000_000, flops=6e11, kept=1e9,
            recomputed=(8e11, 1e8), batch=64, steps=1000, average=True, caches=False)  # fmt: skip


def built(model: str, tmp_path: Any, device: str) -> tuple[Any, dict[str, Any]]:
    config = configure(model, tmp_path, "trainer.max_steps=10", "optimizer=adamw")
    fill_sizes(config, SIZES)
    torch.manual_seed(0)
    with torch.device(device):
        return instantiate(config["model"], "model"), config


@pytest.mark.parametrize("model", STAGES)
def test_a_step_of_nothing_is_counted_as_a_real_one(tmp_path, model):
    """Operations to the last one, and the bytes that are kept; attention alone is counted as a GPU's."""
    stage, config = built(model, tmp_path, "meta")
    step = costs.simulate(config, stage, SIZES)
    real, _ = built(model, tmp_path, "cpu")
    batch = {
        name: torch.zeros(like.shape, dtype=like.dtype)
        if not like.is_floating_point()
        else torch.rand(like.shape)
        for name, like in costs.meta_batch(config["stage"], SIZES, real.net).items()
    }
    saved = Saved({p.untyped_storage().data_ptr() for p in real.parameters()})
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        real.step(batch)["loss"].backward()
    assert step.parameters == count(real)
    assert step.flops * costs.SIMULATED == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert step.kept * costs.SIMULATED * 2 == pytest.approx(saved.peak, rel=0.1)
    assert (step.recomputed is None) == (model in ("vae", "dvae"))
    if step.recomputed and model != "clip":
        assert step.recomputed[0] > step.flops


def test_the_fastest_way_that_fits():
    """At first one device's memory is too small for its weights, then for what it keeps."""
    device = Device(memory=80e9, near=400e9, far=50e9, machine=8)
    large = replace(STEP, batch=1024)
    (first, *_) = plans(large, 8, device)
    assert (first.strategy, first.recompute, first.parts, first.part) == ("ddp", False, 3, 43)
    assert first.state == 1e9 * (4 * 6 + 2)
    assert first.compute == pytest.approx(128 * 6e11 / (989e12 * 0.4))
    assert first.traffic == pytest.approx(2 * 4 * 1e9 * 7 / 8 / 400e9)
    assert first.seconds >= first.compute
    (small, *_) = plans(large, 8, replace(device, memory=24e9))
    assert small.strategy == "fsdp2_bf16"
    assert small.state == pytest.approx(1e9 * 20 / 8 + 120e6 * 2 + 80e6 * 4)
    (smaller, *_) = plans(large, 8, replace(device, memory=3.8e9))
    assert smaller.recompute
    assert plans(large, 8, replace(device, memory=2e9)) == []


def test_traffic_between_machines_is_slower():
    device = Device(near=400e9, far=50e9, machine=8)
    inside, between = plans(STEP, 8, device)[0], plans(STEP, 16, device)[0]
    assert between.traffic > 8 * inside.traffic


def test_parts_of_a_contrastive_batch_are_computed_twice():
    device, large = Device(), replace(STEP, recomputed=None, batch=1024)
    (parts, *_) = plans(large, 8, device)
    (twice, *_) = plans(replace(large, caches=True), 8, device)
    assert parts.parts > 1
    assert twice.compute == pytest.approx(parts.compute * 4 / 3)


def test_the_command_prints_a_table(command_line, tmp_path):
    words = ("model=vae", "data.size=32", "data.image_size=16", *NETS["vae"], "batch_size=8", "memory=16e9")
    lines = command_line(*words, "devices=1,8,64").splitlines()
    assert lines[0].startswith("devices of 16 GB and 989 TFLOP/s in bf16, of which 40% are reached")
    assert lines[2:4] == list(costs.HEAD)
    assert [line.split(" | ")[1] for line in lines[4:]] == ["1", "8", "64"]
    assert "ddp | 1 x 8" in lines[4]
    assert " | 1 x 1 | " in lines[5]
    assert "more devices than items" in lines[6]


def test_a_network_that_other_stages_freeze_is_counted(command_line):
    *_, line = command_line(
        "model=clip", "data.size=32", "data.image_size=16", *NETS["clip"], "devices=8"
    ).splitlines()
    assert line.startswith("| `clip` | 8 | ddp | 1 x ")


def test_a_public_clip_does_without_its_weights(command_line):
    pytest.importorskip("open_clip")
    rows = command_line("model=prior", "clip=open_clip", "devices=8").splitlines()
    assert rows[-1].startswith("| `prior` | 8 |")
    with pytest.raises(UserError, match="open_clip knows no model 'ViT-Z'; close to it: ViT-"):
        command_line("model=prior", "clip=open_clip", "clip.name=ViT-Z")
    with pytest.raises(UserError, match=r"open_clip knows no model '\?'; open_clip.list_models"):
        command_line("model=prior", "clip=open_clip", "clip.name='?'")


def test_recipes_whose_pictures_and_devices_are_not_here(command_line):
    recipe = ("experiment=coco_1gpu", "data.root=NOWHERE", "clip=run", "devices=1", "items=118000")
    (row,) = [line for line in command_line("model=decoder", *recipe).splitlines() if "`decoder`" in line]
    assert "| 1 x 64 |" in row


@pytest.mark.parametrize("preset", ["dvae_paper", pytest.param("dalle_paper", marks=pytest.mark.slow)])
def test_the_table_of_the_papers_presets_is_what_the_command_says(command_line, preset):
    """dalle_paper, of 12B, is sharded."""
    rows = [line for line in command_line(f"model={preset}").splitlines() if f"`{preset}`" in line]
    assert len(rows) == 5
    assert set(rows) <= set((ROOT / "docs" / "paper_presets.md").read_text(encoding="utf-8").splitlines())


@pytest.fixture
def command_line(capsys):
    from dalle.cli.costs import main

    def run(*words: str) -> str:
        main(list(words))
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("word", "line"),
    [("devices=0", "devices=0: give a number above 0"), ("share=2", "share must be"),
     ("rate=fast", "rate=fast: give a number above 0"), ("model=gan", "costs of model=gan are not known"),
     ("model=nothing", "nothing")],
)  # fmt: skip
def test_mistakes_are_one_line(command_line, word, line):
    with pytest.raises(Exception, match=line) as raised:
        command_line(word, *(() if word.startswith("model") else ("model=vae",)))
    assert isinstance(raised.value, UserError) or "hydra" in type(raised.value).__module__
