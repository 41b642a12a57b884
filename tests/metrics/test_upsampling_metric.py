"""Made pictures against originals and small ones, beside bicubic."""

import pytest
import torch

from dalle.data.degradations import shrunk
from dalle.data.shapes import Shapes
from dalle.images import from_uint8, to_uint8
from dalle.metrics.upsampling import UpsamplingLikeness, bicubic, consistency, upsampling_rows


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    image = from_uint8(to_uint8(Shapes("val", image_size=32, size=6).images(range(6))))
    return image, from_uint8(to_uint8(shrunk(image, 2)))


def test_the_original_is_best_and_bicubic_is_its_own_baseline(pair):
    image, low = pair
    rows = upsampling_rows(bicubic(low, 2), image, low)
    for name in ("psnr", "ssim", "consistency"):
        assert torch.equal(rows[name], rows[f"bicubic_{name}"])
    best = upsampling_rows(image, image, low)
    assert best["ssim"].min() > 0.999
    assert (best["consistency"] < rows["consistency"]).all()


def test_consistency_is_in_levels(pair):
    image, low = pair
    flat = torch.zeros(2, 3, 8, 8)
    torch.testing.assert_close(consistency(flat + 20 / 127.5, flat[..., ::2, ::2]), torch.full((2,), 20.0))
    assert consistency(image, low).max() <= 1


def test_figures_do_not_depend_on_the_batches(pair):
    image, low = pair
    made = (bicubic(low, 2) * 0.9).clamp(-1, 1)
    together, apart = UpsamplingLikeness("random"), UpsamplingLikeness("random")
    together.update(made, image, low, range(6))
    for part in (range(4, 6), range(4)):
        apart.update(made[part], image[part], low[part], part)
    first, second = ({k: f.value for k, f in m.compute().items()} for m in (together, apart))
    assert first == pytest.approx(second)
    assert {"psnr", "perceptual_random", "consistency", "bicubic_psnr"} < first.keys()
    assert first["psnr"] < first["bicubic_psnr"]
    assert first["consistency"] > first["bicubic_consistency"]
