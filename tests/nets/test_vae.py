"""The convolutional VAE: shapes, the reparametrised draw, sizes that do not fit."""

import pytest
import torch

from dalle.errors import UserError
from dalle.nets.vae import VAE


def make(**options) -> VAE:
    torch.manual_seed(0)
    return VAE(**({"image_size": 16, "latent_dim": 5, "width": 8, "halvings": 2} | options))


@pytest.mark.parametrize(("size", "halvings"), [(16, 2), (32, 3), (24, 3), (16, 1)])
def test_shapes(size, halvings):
    net = make(image_size=size, halvings=halvings)
    image = torch.rand(3, 3, size, size)
    made, mean, log_variance = net(image)
    assert made.shape == image.shape
    assert mean.shape == log_variance.shape == (3, 5)
    assert net.decode(torch.zeros(2, 5)).shape == (2, 3, size, size)


def test_draws_around_the_mean():
    net, image = make(), torch.rand(2, 3, 16, 16)
    torch.manual_seed(4)
    made, mean, log_variance = net(image)
    torch.manual_seed(4)
    z = mean + torch.randn(2, 5) * log_variance.exp().sqrt()
    torch.testing.assert_close(made, net.decode(z))
    torch.testing.assert_close(net.encode(image)[0], mean)


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="image_size=20 cannot be folded by patch 1 and then halved 5 times"):
        make(image_size=20, halvings=5)
    with pytest.raises(UserError, match="takes pictures of 16 px, not 32 x 32"):
        make().encode(torch.rand(1, 3, 32, 32))
