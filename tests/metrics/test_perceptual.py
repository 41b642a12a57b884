"""LPIPS from a file of weights against torchmetrics, and its stand-in that needs none."""

import logging

import pytest
import torch
from torchmetrics.functional.image.lpips import _NoTrainLpips

from dalle.errors import UserError
from dalle.metrics.effnet import EffNetFeatures
from dalle.metrics.perceptual import (
    LPIPS,
    VGG_FILE,
    FeatureDistance,
    RandomFeatures,
    perceptual_distance,
    unit,
)


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A network as torchmetrics makes it, with random kernels, and torchvision's file of the same."""
    torch.manual_seed(0)
    net = _NoTrainLpips(net="vgg", pnet_rand=True)
    state = {f"features.{key.split('.', 1)[1]}": value for key, value in net.net.state_dict().items()}
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / VGG_FILE
    path.parent.mkdir()
    torch.save(state, path)
    return net, path


@pytest.mark.slow
def test_lpips_of_given_weights(vgg, pictures):
    net, path = vgg
    a, b = pictures[:2], pictures[2:]
    made = perceptual_distance(str(path))
    assert isinstance(made, LPIPS)
    torch.testing.assert_close(made(a, b), net(a, b).flatten())
    assert made(a, a).tolist() == [0, 0]
    assert not any(p.requires_grad for p in made.parameters())


@pytest.mark.slow
def test_weights_in_the_cache_are_found(vgg, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(vgg[1].parents[1]))
    assert isinstance(perceptual_distance(), LPIPS)


@pytest.mark.slow
def test_a_file_that_is_something_else(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth does not hold torchvision's VGG16"):
        perceptual_distance(str(tmp_path / "x.pth"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no VGG16 weights at"):
        perceptual_distance(str(tmp_path / "nothing.pth"))


def test_without_weights_it_says_what_it_is(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert isinstance(perceptual_distance().features, RandomFeatures)
    (record,) = caplog.records
    assert "a fixed random network's, not LPIPS" in record.message


def test_features_are_chosen_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert isinstance(perceptual_distance(features="effnet").features, EffNetFeatures)
    assert isinstance(perceptual_distance(features="random").features, RandomFeatures)
    with pytest.raises(UserError, match=r"no VGG16 weights at .*features=effnet"):
        perceptual_distance(features="vgg")
    with pytest.raises(UserError, match="are VGG16's, but features=effnet"):
        perceptual_distance(str(tmp_path / "vgg.pth"), features="effnet")


def random_distance() -> FeatureDistance:
    return FeatureDistance(RandomFeatures())


class TestRandomDistance:
    def test_is_a_distance_with_gradients(self, pictures):
        net = random_distance()
        a, b = pictures[:2], pictures[2:].requires_grad_()
        d = net(a, b)
        torch.testing.assert_close(d, net(b, a))
        assert (d > 0).all()
        assert net(a, a).tolist() == [0, 0]
        d.sum().backward()
        assert b.grad is not None
        assert b.grad.abs().sum() > 0

    def test_by_its_formula(self, pictures):
        a, b = pictures[:1], pictures[1:2]
        net = random_distance()
        parts = []
        for x, y in zip(net.features.maps(a), net.features.maps(b), strict=True):
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=1)
            some = (x.norm(dim=1) > 1e-3) & (y.norm(dim=1) > 1e-3)
            torch.testing.assert_close(
                (unit(x) - unit(y)).square().sum(1)[some], (2 - 2 * cosine)[some], atol=1e-3, rtol=0
            )
            parts.append((unit(x) - unit(y)).square().sum(1).mean())
        torch.testing.assert_close(net(a, b)[0], torch.stack(parts).mean())

    def test_is_the_same_everywhere_and_trains_nothing(self, pictures):
        torch.manual_seed(1)
        one = random_distance()
        torch.manual_seed(2)
        two = random_distance()
        assert torch.equal(one(pictures, pictures.flip(0)), two(pictures, pictures.flip(0)))
        assert not list(one.parameters())

    def test_sees_a_shift_of_an_edge(self):
        """Blurring an edge is further than the same squared error spread over the picture."""
        image = torch.full((1, 3, 32, 32), -1.0)
        image[..., 16:] = 1
        blurred = image.clone()
        blurred[..., 15:17] = 0
        error = (blurred - image).square().mean().sqrt()
        assert random_distance()(image, blurred) > 2 * random_distance()(image, image + error)


def test_features():
    image = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    features = RandomFeatures()(image)
    assert features.shape == (5, RandomFeatures.num_features)
