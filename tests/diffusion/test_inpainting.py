"""Random masks, and what is known beside them."""

import pytest
import torch

from dalle.diffusion.inpainting import known_of, random_masks


def test_what_is_known_are_pixels_and_where_they_are():
    image = torch.full((2, 3, 2, 2), 0.5)
    mask = torch.tensor([[[True, False], [False, False]], [[True, True], [True, True]]])
    known = known_of(image, mask)
    assert known[0].tolist() == [[[0, 0.5], [0.5, 0.5]]] * 3 + [[[0, 1], [1, 1]]]
    assert not known[1].any()


@pytest.mark.parametrize("size", [(16, 16), (37, 37), (24, 40)])
def test_masks_hide_parts_of_all_sizes_and_everything_in_a_share(size):
    torch.manual_seed(0)
    masks = random_masks(2000, *size, all_hidden=0.3)
    assert masks.shape == (2000, *size)
    hidden = masks.flatten(1).float().mean(1)
    assert (hidden == 1).float().mean() == pytest.approx(0.3, abs=0.03)
    assert hidden.min() > 0.02
    part = hidden[hidden < 1]
    assert {round(share, 1) for share in part.tolist()} >= {0.1, 0.3, 0.5, 0.7, 0.9}
    assert part.mean() == pytest.approx(0.5, abs=0.1)
    kept = ~masks[hidden < 1]
    assert kept.float().mean(0).std() < 0.1  # every place is as likely to be seen


def test_masks_follow_the_seed():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(random_masks(4, 16, 16, 0.25))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
