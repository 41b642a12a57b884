"""VQGAN: adaptive weight and hinge by formula, who learns from what, when the discriminator joins."""

import pytest
import torch
from tiny import column, train
from torch import nn

from dalle.metrics.perceptual import perceptual_distance
from dalle.nets.vqgan import VQGAN, PatchDiscriminator
from dalle.run_dir import load_stage
from dalle.stages.vqgan import VQGANStage, adaptive_weight, hinge


def random_distance() -> nn.Module:
    return perceptual_distance(features="random")


def make_stage(**options) -> VQGANStage:
    torch.manual_seed(0)
    net = VQGAN(
        image_size=16,
        vocab_size=12,
        width=8,
        multipliers=[1, 2],
        blocks=1,
        code_dim=6,
        patch=2,
        dead_below=0.0,
    )
    net.train()(make_batch(16)["image"])
    return VQGANStage(net, PatchDiscriminator(8, 2), random_distance, **({"disc_start": 0} | options))


def make_batch(size: int = 4) -> dict:
    image = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return {"image": image, "caption": [""] * size}


def test_hinge():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge(real, fake).item() == pytest.approx((0.25 + 0.5) / 2)


def test_adaptive_weight():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    nll, adversarial = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([0.0, 2.0])).sum()
    weight = adaptive_weight(nll, adversarial, w)
    assert weight.item() == pytest.approx(5 / (2 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(nll, 0 * adversarial, w).item() == 1e4


def test_loss_without_the_discriminator():
    stage, batch = make_stage(perceptual_weight=0.5).eval(), make_batch()
    out = stage.step(batch)
    made, codes, _ = stage.net(batch["image"])
    expected = (made - batch["image"]).abs().mean() + 0.5 * random_distance()(made, batch["image"]).mean()
    torch.testing.assert_close(out["loss"], expected)
    assert torch.equal(out["codes"], codes)
    torch.testing.assert_close(out["reconstruction"], stage.net.decode(codes))


def test_squared_error_alone():
    stage, batch = make_stage(perceptual_weight=0.0, pixel_loss="mse").eval(), make_batch()
    out = stage.step(batch)
    torch.testing.assert_close(out["loss"], (stage.net(batch["image"])[0] - batch["image"]).square().mean())
    assert "perceptual" not in out


def test_the_perceptual_network_is_no_part_of_the_stage():
    stage = make_stage()
    stage.step(make_batch())
    assert not any("perceptual" in key or "frozen" in key for key in stage.state_dict())
    assert {name for name, _ in stage.named_children()} == {"net", "discriminator"}


class TestTraining:
    def test_the_discriminator_joins(self, tmp_path):
        run = train("vqgan", tmp_path, "model.disc_start=2", "trainer.gradient_clip_val=1.0", steps=4)
        assert list(column(run, "train/loss")) == [0, 1, 2, 3]
        assert list(column(run, "train/loss_d")) == list(column(run, "train/adaptive_weight")) == [2, 3]
        state = torch.load(run.checkpoint, weights_only=True)
        assert state["global_step"] == 4
        assert any(key.startswith("discriminator.") for key in state["state_dict"])
        _, second = state["optimizer_states"]
        assert {int(s["step"]) for s in second["state"].values()} == {2}

    def test_saved_weights_are_the_autoencoders(self, tmp_path):
        stage, manifest = load_stage(train("vqgan", tmp_path).path, "vqgan")
        assert isinstance(stage.net, nn.Module)
        assert manifest["parameters"] == sum(p.numel() for p in stage.net.parameters())
        assert stage.net.encode(make_batch()["image"]).shape == (4, 16)

    def test_bf16_and_without_a_discriminator(self, tmp_path):
        options = ("precision=bf16", "model.adversarial_weight=0")
        run = train("vqgan", tmp_path, *options)
        assert column(run, "train/loss_d") == {}
        assert len(column(run, "train/loss")) == 2

    def test_patterns_and_colours_reach_the_transformer(self, tmp_path):
        net = ("model.net.levels=[[3,3],[3,4]]", "model.net.vocab_size=108", "model.net.patchwise=16")
        train("vqgan", tmp_path, *net, "model.adversarial_weight=0")
        run = train("dalle", tmp_path, "image_tokenizer=vqgan", "callbacks.generation.items=2")
        stage, _ = load_stage(run.path, "dalle")
        assert stage.net.digits.spread.shape == (108, (9 + 3 + 3) + (12 + 3 + 4))
        codes = stage.sample({"caption": ["a"], "text": torch.ones(1, stage.net.text_length).long()})
        assert codes.shape == (1, 16)
        assert codes.max() < 108
