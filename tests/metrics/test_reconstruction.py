"""The table of reconstructions: against formulas, and as the 8 bits that are saved."""

import math

import pytest
import torch

from dalle.metrics.reconstruction import ReconstructionMetrics


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(autouse=True)
def without_inception(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def test_psnr_over_all_pixels():
    metrics = ReconstructionMetrics()
    image = torch.zeros(4, 3, 16, 16)
    metrics.update(image[:3] + 0.2, image[:3], [""] * 3)
    metrics.update(image[3:], image[3:], [""])
    step = 25 / 127.5  # 0.2 in 8 bits
    assert metrics.compute()["psnr"].item() == pytest.approx(10 * math.log10(4 / (0.75 * step**2)), abs=1e-3)


def test_equal_pictures():
    metrics = ReconstructionMetrics(judge=lambda made, captions: {"all": torch.ones(len(made))})
    image = pictures(300)
    metrics.update(image + 0.001, image, [""] * 300)  # less than half a step of 8 bits
    table = metrics.compute()
    assert table["ssim"] > 0.999
    assert table["psnr"] > 40
    assert table["rfid_random"].item() == pytest.approx(0, abs=1e-2)
    assert table["judge_reconstruction"] == 1


def test_worse_pictures_are_further():
    near, far = ReconstructionMetrics(), ReconstructionMetrics()
    image = pictures(300)
    near.update(image * 0.9, image, [""] * 300)
    far.update(image * 0.3, image, [""] * 300)
    near, far = near.compute(), far.compute()
    assert near["psnr"] > far["psnr"]
    assert near["ssim"] > far["ssim"]
    assert near["rfid_random"] < far["rfid_random"]
    assert "judge_reconstruction" not in near


def test_too_few_pictures_have_no_distance():
    metrics = ReconstructionMetrics()
    metrics.update(pictures(8), pictures(8), [""] * 8)
    assert metrics.compute().keys() == {"psnr", "ssim"}


def test_the_share_that_the_judge_accepts():
    metrics = ReconstructionMetrics(
        judge=lambda made, captions: {"all": torch.tensor([float(c == "yes") for c in captions])}
    )
    metrics.update(pictures(3), pictures(3), ["yes", "no", "yes"])
    metrics.update(pictures(1), pictures(1), ["yes"])
    assert metrics.compute()["judge_reconstruction"] == 0.75
