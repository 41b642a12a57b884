"""The discrete VAE's loss by hand: likelihood, divergence, schedules; codes soft in training, hard in use."""

import math
from typing import Any

import pytest
import torch

from dalle.nets.dvae import DVAE
from dalle.optim.factory import OptimizerFactory
from dalle.stages.dvae import DVAEStage, Ramp, kl_to_uniform, logit_laplace, logit_normal

RELEASED: dict[str, Any] = {"patch": 1, "gain": None, "logit_gain": None}


def make_stage(temperature: float = 1.0, beta: float = 0.0, seed: int = 0, **options) -> DVAEStage:
    torch.manual_seed(seed)
    net = DVAE(image_size=16, vocab_size=12, factor=4, width=8, code_dim=8, groups=2, blocks=1, **RELEASED)
    return DVAEStage(
        net,
        Ramp(temperature, temperature, 0),
        Ramp(beta, beta, 0),
        **({"likelihood": "laplace", "ln_b": None} | options),
    )


def make_batch(size: int = 3) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {"image": torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1}


@pytest.mark.parametrize(
    ("y", "mean", "ln_b", "expected"),
    [
        (0.5, 0, 0, 0.6931471805599453),
        (0.9, 0, 0, -0.4824261492442927),
        (0.1, -2, -1, 2.1786864433933664),
        (0.37, 0.5, -2, -4.86396739065783),
        (0.8, 1.0, 1.0, -0.002675470508099964),
    ],
)
def test_likelihood(y, mean, ln_b, expected):
    y, mean, ln_b = (torch.tensor([v], dtype=torch.float64) for v in (y, mean, ln_b))
    assert logit_laplace(y, mean, ln_b).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("likelihood", [logit_laplace, logit_normal])
def test_likelihood_integrates_to_one(likelihood):
    y = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    f = likelihood(y, torch.full_like(y, 0.5), torch.full_like(y, -0.3)).exp()
    assert torch.trapezoid(f, y).item() == pytest.approx(1, abs=1e-4)


def test_divergence_from_the_uniform():
    logits = torch.full((1, 8192, 1, 2), 0.0, dtype=torch.float64)
    logits[0, 7, 0, 0] = 1000
    certain, uniform = kl_to_uniform(logits)[0, 0].tolist()
    assert certain == pytest.approx(9.010913347279288)
    assert uniform == pytest.approx(0, abs=1e-9)


class TestRamp:
    @pytest.mark.parametrize(
        ("step", "expected"),
        [(0, 1.0), (37_500, 0.8627063036811942), (75_000, 0.53125), (112_500, 0.1997936963188059),
         (150_000, 0.0625), (200_000, 0.0625)],
    )  # fmt: skip
    def test_temperature_of_the_paper(self, step, expected):
        assert Ramp(1.0, 0.0625, 150_000)(step) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        ("step", "expected"), [(0, 0), (1250, 0.9665476220843932), (2500, 3.3), (5000, 6.6)]
    )
    def test_kl_weight_of_the_paper(self, step, expected):
        assert Ramp(0.0, 6.6, 5000)(step) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        ("step", "expected"),
        [(0, 1e-4), (300_000, 8.553839732108579e-05), (600_000, 5.0625e-05), (1_200_000, 1.25e-06),
         (2_000_000, 1.25e-06)],
    )  # fmt: skip
    def test_step_size_of_the_paper(self, step, expected):
        recipe = OptimizerFactory(
            torch.optim.AdamW,
            lr=1e-4,
            weight_decay=0.0,
            warmup=0,
            decay_start=0.0,
            decay_end=0.4,
            final=0.0125,
        )
        assert 1e-4 * recipe.factor(step, 3_000_000) == pytest.approx(expected, rel=1e-9)

    def test_without_steps_it_has_arrived(self):
        assert Ramp(3.0, 1.0, 0)(0) == 1.0


class TestStep:
    def test_training_draws_from_soft_codes(self):
        stage, batch = make_stage(temperature=0.7, beta=6.6).train(), make_batch()
        torch.manual_seed(3)
        out = stage.step(batch)
        torch.manual_seed(3)
        (mean, ln_b), logits = stage.net(batch["image"], torch.tensor(0.7))
        y = batch["image"] * 0.4 + 0.5
        b = ln_b.exp()
        nll = ((y.logit() - mean).abs() / b + (2 * b).log() + y.log() + (1 - y).log()).mean()
        q = logits.softmax(1)
        kl = (q * (q * 12).log()).sum(1).mean()
        torch.testing.assert_close(out["nll"], nll)
        torch.testing.assert_close(out["kl"], kl)
        # 16 codes over 3 * 16^2 numbers: 1 / (3 f^2) with f = 4
        torch.testing.assert_close(out["loss"], nll + 6.6 / 48 * kl)
        assert out["temperature"] == torch.tensor(0.7)
        assert "codes" not in out

    def test_validation_uses_hard_codes_and_shows_them(self):
        stage, batch = make_stage().eval(), make_batch()
        out = stage.step(batch)
        assert torch.equal(out["codes"], stage.net.encode(batch["image"]))
        torch.testing.assert_close(out["reconstruction"], stage.net.decode(out["codes"]))
        mean, ln_b = stage.net.likelihood(out["codes"])
        y = stage.net.map_pixels(batch["image"])
        torch.testing.assert_close(out["nll"], -logit_laplace(y, mean, ln_b).mean())
        assert torch.equal(out["loss"], stage.step(batch)["loss"])  # nothing is drawn

    def test_the_kl_weight_of_the_paper_is_one_192nd_of_beta(self):
        stage = make_stage(beta=6.6).train()
        stage.net = DVAE(
            image_size=32, vocab_size=12, factor=8, width=4, code_dim=4, groups=3, blocks=1, **RELEASED
        )
        out = stage.step({"image": torch.zeros(1, 3, 32, 32)})
        torch.testing.assert_close(out["loss"] - out["nll"], 6.6 / 192 * out["kl"])

    @pytest.mark.parametrize("likelihood", ["laplace", "normal"])
    def test_fixed_scale(self, likelihood):
        free, fixed = make_stage().eval(), make_stage(ln_b=-1.5, likelihood=likelihood).eval()
        batch = make_batch()
        mean, _ = free.net.likelihood(free.net.encode(batch["image"]))
        y = free.net.map_pixels(batch["image"])
        law = getattr(torch.distributions, likelihood.capitalize())(mean, math.exp(-1.5))
        expected = -(law.log_prob(y.logit()) - (y * (1 - y)).log()).mean()  # dlogit(y) / dy = 1 / (y (1 - y))
        torch.testing.assert_close(fixed.step(batch)["nll"], expected)
        assert not math.isclose(free.step(batch)["nll"].item(), expected.item())


def test_every_parameter_gets_a_gradient():
    stage = make_stage(beta=1.0).train()
    stage.step(make_batch())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.net.parameters())


def test_learns_flat_pictures():
    """Two colours, two codes: each has its own, and comes back, from most seeds (one of eight finds a single
    code for both).
    """
    image = torch.tensor([-0.8, 0.6]).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    learned = 0
    for seed in range(5):
        stage = make_stage(seed=seed, ln_b=-1.0, likelihood="normal").train()
        optimizer = torch.optim.Adam(stage.net.parameters(), lr=5e-3)
        for _ in range(150):
            optimizer.zero_grad()
            stage.step({"image": image})["loss"].backward()
            optimizer.step()
        out = stage.eval().step({"image": image})
        apart = (out["codes"][0] != out["codes"][1]).all()
        learned += bool(apart and (out["reconstruction"] - image).abs().max() < 0.3)
    assert learned >= 3
