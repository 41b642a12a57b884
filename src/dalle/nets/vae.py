"""The convolutional VAE of many tutorials: strided convolutions to one vector, and back from it.

Kingma and Welling 2014, App. C, with convolutions in place of their MLPs. The mean picture comes out as it
is, in the units of whatever likelihood the stage has.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.nets.sizes import cut, levels_for, map_sides, padded
from dalle.ranges import Depth, Side, Width


class VAE(nn.Module):
    """Pictures to Gaussians over vectors, vectors to pictures.

    Args:
        image_size: side of the pictures.
        latent_dim: Z, length of the vector.
        width: channels at half the side; each next halving doubles them.
        halvings: how often the side is halved.

    Raises:
        UserError: no halving at all, or pictures of another size.
    """

    def __init__(self, image_size: Side, latent_dim: Width, width: Width, halvings: Depth):
        super().__init__()
        if halvings < 1:
            raise UserError(f"halvings={halvings}: give at least 1.")
        side = map_sides(image_size, 1, halvings + 1)[-1]
        self.image_size, self.latent_dim, self.factor = image_size, latent_dim, 1 << halvings
        widths = [width << i for i in range(halvings)]

        down: list[nn.Module] = []
        for n_in, n_out in zip([3, *widths], widths, strict=False):
            down += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), nn.SiLU()]
        self.down = nn.Sequential(*down, nn.Flatten(), nn.Linear(widths[-1] * side**2, 2 * latent_dim))

        up: list[nn.Module] = [
            nn.Linear(latent_dim, widths[-1] * side**2),
            nn.Unflatten(1, (widths[-1], side, side)),
        ]
        widths = widths[::-1]
        for n_in, n_out in zip(widths, [*widths[1:], 3], strict=True):
            up += [nn.SiLU(), nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)]
        self.up = nn.Sequential(*up)

    @staticmethod
    def suited(image_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `auto` is for pictures of this size, beside the settings that are `given`."""
        halvings = given.get("halvings") or max(3, levels_for(image_size) - 1)
        return {"halvings": halvings, "width": 32 if halvings <= 4 else 16}

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B Z"], Float[Tensor, "B Z"]]:
        """Mean and log variance of q(z | image)."""
        height, width = image.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(f"this VAE takes pictures of {self.image_size} px, not {width} x {height}.")
        mean, log_variance = self.down(padded(image, self.factor)).float().chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B 3 H W"]:
        return cut(self.up(z).float(), self.image_size)

    def forward(
        self, image: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B Z"], Float[Tensor, "B Z"]]:
        """A reconstruction from a z drawn from q, and q's mean and log variance."""
        mean, log_variance = self.encode(image)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decode(z), mean, log_variance
