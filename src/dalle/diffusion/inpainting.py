"""What a decoder that inpaints is told of a picture, and the random masks that it is trained with (GLIDE,
Nichol et al. 2021, sec. 2.4). Masks are true where a picture is hidden.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

STROKE = 5  # points of the line of a brush


def known_of(image: Float[Tensor, "#B 3 H W"], mask: Bool[Tensor, "#B H W"]) -> Float[Tensor, "B 4 H W"]:
    """What is known of images where masks are false, and where that is."""
    kept = ~mask[:, None]
    return torch.cat((image * kept, kept.to(image).expand(len(image), -1, -1, -1)), dim=1)


def random_masks(
    n: int, height: int, width: int, all_hidden: float, device: torch.device | str = "cpu"
) -> Bool[Tensor, "N H W"]:
    """Masks of these sides: all is hidden in a share `all_hidden` of them, the others are, equally often, a
    rectangle, all but a rectangle, a part of 1/4 to 3/4 at one of the sides, and a free stroke of a brush.
    """
    rows, columns = _places(height, device), _places(width, device)
    kinds = [make(n, rows, columns) for make in (_rectangles, _sides, _strokes)]
    masks = torch.stack([kinds[0], ~kinds[0], *kinds[1:]], dim=1)
    chosen = masks[torch.arange(n, device=device), torch.randint(masks.shape[1], (n,), device=device)]
    return chosen | (torch.rand(n, 1, 1, device=device) < all_hidden)


def _rectangles(n: int, rows: Float[Tensor, "H"], columns: Float[Tensor, "W"]) -> Bool[Tensor, "N H W"]:
    """Sides of 1/4 to 3/4 of the picture's, all within it."""
    side = 0.25 + 0.5 * torch.rand(n, 2, 1, device=rows.device)
    start = (1 - side) * torch.rand(n, 2, 1, device=rows.device)
    (top, left), (height, width) = start.unbind(1), side.unbind(1)
    within_rows = (rows >= top) & (rows < top + height)
    within_columns = (columns >= left) & (columns < left + width)
    return within_rows[:, :, None] & within_columns[:, None, :]


def _sides(n: int, rows: Float[Tensor, "H"], columns: Float[Tensor, "W"]) -> Bool[Tensor, "N H W"]:
    far = torch.rand(n, 1, device=rows.device) >= 0.5
    depth = 0.25 + 0.5 * torch.rand(n, 1, device=rows.device)
    across, down = (torch.where(far, 1 - place, place) < depth for place in (columns, rows))
    upright = torch.rand(n, 1, 1, device=rows.device) < 0.5
    return torch.where(upright, across[:, None, :], down[:, :, None])


def _strokes(n: int, rows: Float[Tensor, "H"], columns: Float[Tensor, "W"]) -> Bool[Tensor, "N H W"]:
    """A line through random points, of 1/6 to 1/3 of the picture's side."""
    points = torch.rand(n, STROKE, 2, device=rows.device)
    begin, end = points[:, :-1, None, None], points[:, 1:, None, None]  # (N, lines, 1, 1, 2)
    pixels = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    along = end - begin
    share = ((pixels - begin) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
    nearest = begin + share.clamp(0, 1)[..., None] * along
    distance = (pixels - nearest).square().sum(-1).amin(1).sqrt()
    return distance < (1 + torch.rand(n, 1, 1, device=rows.device)) / 12


def _places(size: int, device: torch.device | str) -> Float[Tensor, "S"]:
    """The middle of each pixel in a row."""
    return (torch.arange(size, device=device) + 0.5) / size
