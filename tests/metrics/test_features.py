import logging

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import nn
from torch.utils.data import Dataset
from torch_fidelity import feature_extractor_inceptionv3 as fidelity_inception
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from dalle.errors import UserError
from dalle.images import to_uint8
from dalle.metrics.features import CLIPFeatures, FeatureNet, find_inception, usual_features
from dalle.metrics.fid import FrechetDistance, frechet
from dalle.metrics.metric import update_all, values_of


def exact_sample(mean, covariance, count=40):
    """`count` rows whose mean and unbiased covariance are exactly these."""
    noise = np.random.default_rng(0).standard_normal((count, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise, rowvar=False))).T
    return torch.from_numpy(white @ np.linalg.cholesky(np.asarray(covariance, float)).T + mean)


def distance_of_tables(real, generated):
    return frechet(real, generated, interval=False).value


@pytest.mark.parametrize("offset", [0.0, 2000.0])
def test_features_far_from_zero(offset):
    real, generated = exact_sample([0, 0], np.eye(2)), exact_sample([1, 0], np.diag([4.0, 1.0]))
    assert distance_of_tables(real + offset, generated + offset) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(
    ("m1", "c1", "m2", "c2", "expected"),
    [
        ([0, 0], np.eye(2), [1, 0], np.diag([4.0, 1.0]), 2.0),  # closed form: 1 + (2 - 1)^2
        ([0, 0], [[2, 0.5], [0.5, 1]], [1, 2], [[1, -0.3], [-0.3, 2]], 5.575425893305008),
    ],
)
def test_exact_gaussians(m1, c1, m2, c2, expected):
    assert distance_of_tables(exact_sample(m1, c1), exact_sample(m2, c2)) == pytest.approx(expected, rel=1e-9)


def test_a_set_is_at_distance_zero_from_itself():
    table = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    assert distance_of_tables(table, table.flip(0)) == pytest.approx(0, abs=1e-6)


def small_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6))
    return net.requires_grad_(False)


class SmallFeatures(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.net = small_network()

    def forward(self, image):
        return self.net(image.float() / 255)


def small_features() -> FeatureNet:
    return FeatureNet(SmallFeatures(), "small", "none")


class FidelityFeatures(FeatureExtractorBase):
    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.net = small_network()

    @staticmethod
    def get_provided_features_list():
        return ("small",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "small"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, image):
        return (self.net(image.float() / 255),)


class Pictures(Dataset):
    def __init__(self, images):
        self.images = to_uint8(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_parity_with_torch_fidelity_on_the_same_pictures():
    torch.manual_seed(1)
    real, generated = torch.rand(60, 3, 16, 16) * 2 - 1, torch.rand(60, 3, 16, 16) ** 2 * 2 - 1
    torch_fidelity.register_feature_extractor("small-features", FidelityFeatures)
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(generated),
        input2=Pictures(real),
        fid=True,
        feature_extractor="small-features",
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
    )["frechet_inception_distance"]

    metric = FrechetDistance(small_features())
    for part in (range(20), range(20, 40), range(40, 60)):
        update_all([metric], generated[part], real[part], [""] * 20, part)
    assert expected > 0.01
    assert values_of([metric]) == pytest.approx({"fid_small": expected}, rel=1e-4)


def test_few_pictures_have_another_name_and_a_note():
    metric = FrechetDistance(small_features())
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    update_all([metric], -images, images, [""] * 5, range(5))
    assert metric.compute().keys() == {"fid_small_biased"}
    (note,) = metric.notes
    assert "5 pictures are too few for 6 features" in note


def test_without_a_covariance_the_distance_is_nan():
    assert np.isnan(frechet(torch.zeros(1, 3), torch.zeros(4, 3)).value)


class FakeCLIP(nn.Module):
    embed_dim, image_size = 2, 4

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def embed_image(self, image):
        return image.mean((2, 3))[:, :2].bfloat16()


def test_clip_features_name_the_figure_and_keep_the_clip_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network = usual_features(FakeCLIP())
    assert network.called("fid") == "fid_clip"
    assert not list(network.net.parameters())
    image = torch.tensor([[0.5, -0.5, 0]]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    features = CLIPFeatures(FakeCLIP())(to_uint8(image))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, torch.tensor([[0.5, -0.5]]), atol=0.01, rtol=0)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The Inception with random weights: the real file is not needed to compare two implementations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity_inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity_inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        net = fidelity_inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    torch.save(net.state_dict(), path)
    return path


def test_inception_features_equal_torch_fidelity(inception_file):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    theirs = fidelity_inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception_file)
    )
    ours = find_inception(inception_file)
    assert torch.equal(ours(image), theirs(image)[0])


def test_a_cached_inception_is_found_and_named_fid(inception_file, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(inception_file.parent.parent))
    network = usual_features(FakeCLIP())
    assert network.called("fid") == "fid"
    assert network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 2048)


def test_nothing_is_downloaded_without_being_asked(tmp_path, monkeypatch, caplog):
    asked = []

    def download(url, path, hash_prefix):
        asked.append(hash_prefix)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert find_inception() is None
    assert not asked
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="no network"):
        find_inception(download=True)
    assert asked == ["6726825d"]
    assert "downloading the FID Inception's weights" in caplog.text


def test_missing_and_damaged_weights_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no Inception weights at"):
        find_inception(tmp_path / "none.pth")
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match="does not hold"):
        find_inception(tmp_path / "half.pth")
    (tmp_path / "picture.pth").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"weights \(it is no file of tensors\); fetch"):
        find_inception(tmp_path / "picture.pth")
    torch.save({"conv": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold"):
        find_inception(tmp_path / "other.pth")
