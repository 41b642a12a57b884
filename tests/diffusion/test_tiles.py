"""Large pictures tile by tile: every place once, no seams, the same as whole inside what a network sees."""

import pytest
import torch
import torch.nn.functional as F

from dalle.diffusion.tiles import starts, tiled, window
from dalle.errors import UserError


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "step"), [(64, 32, 8, 4), (70, 32, 8, 4), (33, 32, 4, 1), (100, 24, 8, 8)]
)
def test_tiles_cover_a_side_and_fade_into_each_other(size, tile, overlap, step):
    total = torch.zeros(size)
    for start in starts(size, tile, overlap, step):
        assert start % step == 0
        end = min(start + tile, size)
        assert end - start > tile - step
        total[start:end] += window(start, end, size, overlap)
    assert total.min() > 0.5
    assert starts(size, size, overlap, step) == [0]


def test_neighbours_add_up_to_one():
    left, right = window(0, 32, 56, 8), window(24, 56, 56, 8)
    torch.testing.assert_close(left[24:] + right[:8], torch.ones(8))
    assert not left[-2:].any()  # the outer quarter of the overlap
    assert left[:24].eq(1).all()


def local(x, t, low):
    """Sees two pixels around each, and the small picture."""
    kernel = torch.arange(25.0).view(1, 1, 5, 5).expand(3, 1, 5, 5) / 300
    near = F.conv2d(F.pad(x, (2,) * 4, mode="replicate"), kernel, groups=3)
    return near * t.view(-1, 1, 1, 1) + F.interpolate(low, x.shape[-2:], mode="nearest")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 40), (20, 100)])
def test_equal_to_the_whole_where_tiles_see_enough(height, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, height, width, generator=generator)
    low = torch.randn(2, 3, height // 4, width // 4, generator=generator)
    t = torch.tensor([0.3, 0.8])
    made = tiled(local, low, tile=32, overlap=8, step=4)(x, t)
    torch.testing.assert_close(made, local(x, t, low))


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, 5), (16, 2)])
def test_tiles_too_small(tile, overlap):
    with pytest.raises(UserError, match=f"tile={tile} with an overlap of {overlap} is too small"):
        tiled(local, torch.zeros(1, 3, 8, 8), tile, overlap, step=4)
