"""The VAE's loss against formulas, and pictures from the prior."""

import math

import pytest
import torch

from dalle.nets.vae import VAE
from dalle.stages.vae import VAEStage, bce_nll, gaussian_nll, kl_to_normal


def make_stage(**options) -> VAEStage:
    torch.manual_seed(0)
    return VAEStage(VAE(image_size=16, latent_dim=5, width=8, halvings=2), **options)


def make_batch() -> dict:
    image = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return {"image": image, "caption": ["a", "b", "c", "d"]}


def test_divergence_from_the_normal():
    mean, log_variance = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl_to_normal(mean, log_variance), expected)


def test_gaussian_with_the_best_spread():
    made, image = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    sigma = (made - image).square().mean().sqrt()
    nll = gaussian_nll(made, image)
    expected = -torch.distributions.Normal(made, sigma).log_prob(image).flatten(1).sum(1)
    torch.testing.assert_close(nll, expected)
    for other in (0.9 * sigma, 1.1 * sigma):
        assert nll.sum() < -torch.distributions.Normal(made, other).log_prob(image).sum()
    d = image[0].numel()
    assert nll.mean().item() == pytest.approx(d / 2 * (1 + math.log(2 * math.pi * sigma.item() ** 2)))


def test_cross_entropy_of_pixels():
    logits, image = torch.tensor([[0.3, -2.0]]), torch.tensor([[-0.4, 1.0]])
    p, x = logits.sigmoid(), (image + 1) / 2
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1)
    torch.testing.assert_close(bce_nll(logits, image), expected)


@pytest.mark.parametrize(("likelihood", "nll"), [("gaussian", gaussian_nll), ("bce", bce_nll)])
def test_loss(likelihood, nll):
    stage, batch = make_stage(likelihood=likelihood, kl_weight=0.5).train(), make_batch()
    torch.manual_seed(1)
    out = stage.step(batch)
    torch.manual_seed(1)
    made, mean, log_variance = stage.net(batch["image"])
    expected = (nll(made, batch["image"]) + 0.5 * kl_to_normal(mean, log_variance)).mean()
    torch.testing.assert_close(out["loss"], expected, rtol=1e-5, atol=1e-4)
    assert "reconstruction" not in out


@pytest.mark.parametrize("likelihood", ["gaussian", "bce"])
def test_validation_shows_the_mean(likelihood):
    stage, batch = make_stage(likelihood=likelihood).eval(), make_batch()
    seen = stage.step(batch)["reconstruction"]
    made = stage.net.decode(stage.net.encode(batch["image"])[0])
    expected = made.clamp(-1, 1) if likelihood == "gaussian" else 2 * made.sigmoid() - 1
    torch.testing.assert_close(seen, expected)


def test_samples_come_from_the_prior():
    stage, batch = make_stage().eval(), make_batch()
    drawn = []

    def randn(like):
        drawn.append(torch.ones_like(like))
        return drawn[-1]

    made = stage.sample(batch, randn=randn)
    assert drawn[0].shape == (4, 5)
    torch.testing.assert_close(made, stage.net.decode(torch.ones(4, 5)).clamp(-1, 1))
    assert stage.makes_images
