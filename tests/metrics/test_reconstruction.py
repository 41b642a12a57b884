"""Likeness of reconstructions: against formulas and torchmetrics, and as the 8 bits that are saved."""

import math

import pytest
import torch
from torchmetrics.image import StructuralSimilarityIndexMeasure

from dalle.images import from_uint8, to_uint8
from dalle.metrics.metric import values_of
from dalle.metrics.perceptual import perceptual_distance
from dalle.metrics.reconstruction import Likeness, likeness


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_the_mean_over_pictures():
    metric, image = Likeness(), torch.zeros(4, 3, 16, 16)
    metric.update(image[:3] + 0.2, image[:3], [0, 1, 2])
    metric.update(image[3:] + 0.4, image[3:], [3])
    each = [10 * math.log10(4 / (step / 127.5) ** 2) for step in (25, 25, 25, 50)]  # 0.2 and 0.4 in 8 bits
    assert metric.compute()["psnr"].value == pytest.approx(sum(each) / 4, abs=1e-3)


def test_ssim_is_that_of_torchmetrics():
    image = pictures(6)
    made = image + 0.3 * pictures(6, seed=1)
    theirs = StructuralSimilarityIndexMeasure(data_range=255.0)  # of values from 0: SSIM depends on the zero
    theirs.update(to_uint8(made).float(), to_uint8(image).float())
    metric = Likeness()
    metric.update(made, image, range(6))
    found = values_of([metric])
    assert 0.1 < found["ssim"] < 0.99
    assert found["ssim"] == pytest.approx(theirs.compute().item(), abs=1e-4)


def test_worse_pictures_are_further():
    image = pictures(4)
    near, far = (likeness(scale * image, image, "random") for scale in (0.9, 0.3))
    assert (near["psnr"] > far["psnr"]).all()
    assert (near["ssim"] > far["ssim"]).all()
    assert (near["perceptual_random"] < far["perceptual_random"]).all()


@pytest.mark.parametrize("features", ["random", "effnet"])
def test_a_distance_of_features_has_their_name(features):
    image, made = pictures(3), pictures(3, seed=1)
    metric = Likeness(features)
    metric.update(made.bfloat16(), image, range(3))
    saved = from_uint8(to_uint8(made.bfloat16())), from_uint8(to_uint8(image))
    expected = perceptual_distance(features=features)(*saved).mean().item()
    assert metric.compute()[f"perceptual_{features}"].value == pytest.approx(expected, rel=1e-4)
    assert likeness(image, image, features)[f"perceptual_{features}"].tolist() == [0, 0, 0]
