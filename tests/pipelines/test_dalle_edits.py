"""DALL-E's pipeline completes any region of a picture, and extends it beyond its edges."""

import math

import pytest
import torch
from pipelines.test_dalle_pipeline import CELL, GRID, FakeCLIP, K, pipeline

from dalle.errors import UserError
from dalle.pipelines.masks import Sides, filled, kept_psnr, windows

SIZE = GRID * CELL


def picture(size: int = SIZE) -> torch.Tensor:
    """Gray cells, darker than a quarter: what is drawn is often lighter."""
    levels = torch.randint(2, (1, size // CELL, size // CELL), generator=torch.Generator().manual_seed(3))
    gray = levels.float() / (K - 1) * 2 - 1
    return gray.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).expand(3, -1, -1).clone()


def mask_of(*places: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for place in places:
        mask[place] = True
    return mask


def test_only_codes_whose_cell_the_mask_touches_are_drawn():
    made, image = pipeline(), picture()
    mask = mask_of((3, 2), (4, 4))  # one pixel of cell (1, 1), one of (2, 2)
    known = torch.tensor(made.known_codes(image, mask)).view(GRID, GRID)
    assert (known < 0).nonzero().tolist() == [[1, 1], [2, 2]]
    drawn = made.inpaint(image, mask, "a red ring", n=8, paste=False)
    cells = (drawn != image).any(0).any(0).view(GRID, CELL, GRID, CELL).any(3).any(1)
    assert cells.nonzero().tolist() == [[1, 1], [2, 2]]


def test_what_is_kept_is_pasted_back_pixel_by_pixel():
    made, mask = pipeline(), mask_of((3, 2), (4, 4))
    image = picture() + 0.05  # the codes cannot say that
    drawn = made.inpaint(image, mask, "a", n=4, seed=1, paste=False)
    images = made.inpaint(image, mask, "a", n=4, seed=1)
    assert torch.equal(images[..., ~mask], image[:, ~mask].expand(4, -1, -1))
    assert torch.equal(images[..., mask], drawn[..., mask])
    assert kept_psnr(images, image, mask).tolist() == [float("inf")] * 4


def test_the_psnr_of_what_was_to_stay_counts_redrawn_cells_as_well():
    made, image = pipeline(), picture() + 6 / 127.5
    cell = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    cell[2:4, 2:4] = True
    whole = kept_psnr(made.inpaint(image, cell, "a", paste=False), image, cell)
    assert whole.item() == pytest.approx(20 * math.log10(255 / 6), abs=1e-3)
    cell[2, 2] = False
    assert kept_psnr(made.inpaint(image, cell, "a", paste=False), image, cell) < whole - 1


def test_pictures_do_not_depend_on_the_batch():
    made, mask = pipeline(), mask_of((0, 0), (7, 7))
    whole = made.inpaint(picture(), mask, ["a", "a red ring"], n=3, seed=5)
    assert len(whole) == 6
    assert torch.equal(made.inpaint(picture(), mask, ["a", "a red ring"], n=3, seed=5, batch_size=2), whole)
    assert torch.equal(made.inpaint(picture(), mask, "a", n=1, seed=5)[0], whole[0])


def test_of_candidates_clip_keeps_the_one_nearest_to_the_prompt():
    made, mask = pipeline(FakeCLIP()), torch.ones(SIZE, SIZE, dtype=torch.bool)
    one, best = (made.inpaint(picture(), mask, "a", candidates=count) for count in (1, 8))
    assert made.scores(best, ["a"]) > made.scores(one, ["a"])


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (picture(), torch.ones(4, 8, dtype=torch.bool), r"the mask has 8 x 4 px, but the picture 8 x 8"),
        (picture(), mask_of(), "the mask is black all over"),
        (picture(16), torch.ones(16, 16, dtype=torch.bool), r"the picture has 16 x 16 px; .* draws 8 x 8"),
    ],
)
def test_masks_that_do_not_fit_are_one_line(image, mask, message):
    with pytest.raises(UserError, match=message):
        pipeline().inpaint(image, mask, "a")


def test_a_picture_grows_and_stays_as_it_was_in_its_place():
    image = picture()
    images = pipeline().outpaint(image, "a", left=2, right=10, top=4, bottom=6, n=2)
    assert images.shape == (2, 3, SIZE + 10, SIZE + 12)
    assert torch.equal(images[:, :, 4 : 4 + SIZE, 2 : 2 + SIZE], image.expand(2, -1, -1, -1))
    assert not torch.equal(images[0], images[1])
    around = images.clone()
    around[:, :, 4 : 4 + SIZE, 2 : 2 + SIZE] = float("nan")
    assert around[~around.isnan()].unique().numel() == K  # drawn everywhere, nothing left gray
    assert torch.equal(pipeline().outpaint(image, "a", left=2, right=10, top=4, bottom=6)[0], images[0])


def test_windows_leave_a_picture_half_a_window_at_a_time():
    assert windows((8, 8), Sides(right=10), 8) == [(0, 4), (0, 8), (0, 10)]
    assert windows((8, 8), Sides(left=3), 8) == [(0, 0)]
    assert windows((8, 8), Sides(left=6), 8) == [(0, 2), (0, 0)]
    assert windows((8, 8), Sides(top=4, right=4), 8) == [(4, 4), (0, 0), (0, 4)]
    assert windows((12, 8), Sides(right=4), 8) == [(0, 4), (4, 4)]


def test_every_window_sees_half_of_what_there_is_and_all_is_seen():
    for shape, more in (((8, 8), Sides(5, 9, 3, 11)), ((16, 11), Sides(0, 2, 20, 0))):
        blank = torch.ones(shape[0] + more.top + more.bottom, shape[1] + more.left + more.right)
        blank[more.top : more.top + shape[0], more.left : more.left + shape[1]] = 0
        for y, x in windows(shape, more, 8):
            assert blank[y : y + 8, x : x + 8].mean() <= 0.5
            blank[y : y + 8, x : x + 8] = 0
        assert not blank.any()


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "adds pixels at left, right, top or bottom"), ({"left": -1, "right": 2}, "got left=-1, right=2")],
)
def test_what_cannot_grow_is_one_line(more, message):
    with pytest.raises(UserError, match=message):
        pipeline().outpaint(picture(), "a", **more)
    with pytest.raises(UserError, match="the picture has 4 x 4 px, less than the 8 px"):
        pipeline().outpaint(picture(4), "a", right=4)


def test_unknown_pixels_are_as_their_nearest_neighbours():
    image = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]).expand(3, -1, -1)
    unknown = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert filled(image, unknown)[0].tolist() == [[2, 2, 2, 2], [5, 6, 7, 8], [5, 6, 7, 8]]
