"""FID, KID, inception score, precision and recall: equal to torch-fidelity's, to known values, and sure."""

import json

import numpy as np
import pytest
import torch
import torch_fidelity
from tiny import ROOT
from torch import nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from dalle.images import from_uint8
from dalle.metrics.features import FeatureNet, random_features
from dalle.metrics.fid import (
    FrechetDistance,
    enough_for_infinity,
    frechet,
    frechet_infinity,
    inception_score,
    kid,
    precision_recall,
)
from dalle.metrics.metric import values_of
from dalle.metrics.perceptual import RandomFeatures

KNOWN = json.loads((ROOT / "tests" / "metrics" / "known_values.json").read_text())


class TheirFeatures(FeatureExtractorBase):
    """The random network as torch-fidelity wants it, with its features as logits, too."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.net = RandomFeatures()

    @staticmethod
    def get_provided_features_list():
        return ("all",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "all"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, image):
        return (self.net(image),)


class Pictures(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (90, 3, 16, 16), dtype=torch.uint8, generator=generator)
    other = torch.randint(0, 200, (70, 3, 16, 16), dtype=torch.uint8, generator=generator)
    other[:40] = real[:40]
    other[:40, :, :2] = 128
    return real, other


def test_equal_to_torch_fidelity_on_the_same_pictures_and_features(pictures):
    real, generated = pictures
    torch_fidelity.register_feature_extractor("random-features", TheirFeatures)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(generated), input2=Pictures(real), fid=True, kid=True, isc=True, prc=True,
        feature_extractor="random-features", kid_subset_size=70, cuda=False, verbose=False, cache=False,
    )  # fmt: skip
    network = random_features()
    ours = [network(images) for images in (real, generated)]
    precision, recall = precision_recall(*ours)
    assert frechet(*ours).value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert kid(*ours).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert inception_score(ours[1]).value == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert (precision.value, recall.value) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < precision.value < 1
    assert 0 < recall.value < 1


def test_equal_to_the_distance_of_torchmetrics(pictures):
    real, generated = pictures
    theirs = FrechetInceptionDistance(RandomFeatures())
    theirs.update(real, real=True)
    theirs.update(generated, real=False)
    metric = FrechetDistance(random_features(), intervals=False)
    metric.update(generated, [], range(70))
    metric.update(from_uint8(real), [], range(90), real=True)
    (value,) = values_of([metric]).values()
    assert value == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_exact_gaussians():
    known = KNOWN["frechet_full"]

    def sample(mean, covariance, count=40):
        noise = np.random.default_rng(0).standard_normal((count, 2))
        noise -= noise.mean(0)
        white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise, rowvar=False))).T
        return torch.from_numpy(white @ np.linalg.cholesky(np.asarray(covariance)).T + mean)

    real, generated = sample(known["m1"], known["S1"]), sample(known["m2"], known["S2"])
    assert frechet(real, generated).value == pytest.approx(known["value"], rel=1e-9)


@pytest.mark.parametrize(("real", "generated"), [(50, 12), (12, 50), (12, 12), (5, 4), (20, 20)])
def test_equal_to_torch_fidelity_with_few_pictures(real, generated):
    """More and fewer pictures than the twenty features take other ways to the same number."""
    generator = torch.Generator().manual_seed(4)
    sets = [
        torch.randn(n, 20, generator=generator, dtype=torch.float64) * (1 + k) + k
        for k, n in enumerate((real, generated))
    ]
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, sets), verbose=False)
    assert frechet(*sets).value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_known_values():
    tiny = {key: torch.tensor(KNOWN["kid_tiny"][key], dtype=torch.float32) for key in "XY"}
    assert kid(tiny["X"], tiny["Y"]).value == pytest.approx(KNOWN["kid_tiny"]["value"], rel=1e-6)
    logits = torch.tensor(KNOWN["inception_score"]["logits"], dtype=torch.float64)
    ten = logits.repeat(10, 1)  # each of the ten splits is ...
    order = np.random.RandomState(2020).permutation(40)  # ... the whole set, once their shuffling is undone
    unshuffled = torch.empty_like(ten)
    unshuffled[torch.from_numpy(order)] = ten
    assert inception_score(unshuffled).value == pytest.approx(KNOWN["inception_score"]["value"], rel=1e-9)
    balls = {key: torch.tensor(KNOWN["precision_recall_k1"][key])[:, None] for key in ("real", "fake")}
    found = precision_recall(balls["real"].double(), balls["fake"].double(), neighbours=1)
    assert [figure.value for figure in found] == KNOWN["precision_recall_k1"]["precision_recall"]


@pytest.mark.parametrize("statistic", [frechet, kid])
def test_intervals_are_as_wide_as_fresh_samples_scatter(statistic):
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(300, 4, generator=generator)
    fresh = [statistic(real, torch.randn(200, 4, generator=generator) + 0.5) for _ in range(20)]
    scatter = torch.tensor([figure.value for figure in fresh]).std().item()
    width = torch.tensor([(figure.high - figure.low) / (2 * 1.96) for figure in fresh]).mean().item()
    assert width == pytest.approx(scatter, rel=0.5)


def gaussians(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 16 dimensions, with a distance of 0.5^2 + 16 (1.2 - 1)^2 = 0.89."""
    real, generated = torch.randn(2, n, 16, generator=generator, dtype=torch.float64)
    generated = 1.2 * generated
    generated[:, 0] += 0.5
    return real, generated


def test_the_distance_at_infinity_is_that_of_the_distributions():
    """The bias of FID falls like 1/n; the line through several n leaves little of it."""
    generator = torch.Generator().manual_seed(5)
    pairs = [gaussians(160, generator) for _ in range(8)]
    finite = torch.tensor([frechet(*pair).value for pair in pairs[:5]])
    endless = [frechet_infinity(*pair) for pair in pairs]
    bias = finite.mean().item() - 0.89
    left = torch.tensor([figure.value for figure in endless]).mean().item() - 0.89
    assert bias > 0.2
    assert abs(left) < bias / 3
    assert sum(figure.low <= 0.89 <= figure.high for figure in endless) >= 7
    assert all(figure.low < figure.value < figure.high for figure in endless)


def test_the_distance_at_infinity_is_the_same_on_every_call_and_needs_enough_pictures():
    pair = gaussians(150, torch.Generator().manual_seed(6))
    assert frechet_infinity(*pair) == frechet_infinity(*pair)
    assert enough_for_infinity(16) == 81
    assert enough_for_infinity(2048) > 9000


@pytest.mark.parametrize("offset", [0.0, 2000.0, 50_000.0])
def test_features_far_from_zero(offset):
    """Differences of float32 features survive; squares of them do not."""
    generator = torch.Generator().manual_seed(7)
    grid = 1 / 64  # what float32 still holds at the largest offset
    real, generated = (
        ((torch.randn(400, 6, generator=generator) * scale / grid).round() * grid + offset).float()
        for scale in (1.0, 1.6)
    )
    exact = [real.double() - offset, generated.double() - offset]

    def brute(points, others):
        radius = (others[:, None] - others).square().sum(2).kthvalue(4, dim=1).values
        return ((points[:, None] - others).square().sum(2) <= radius).any(1).double().mean().item()

    precision, recall = precision_recall(real, generated)
    assert (precision.value, recall.value) == (brute(exact[1], exact[0]), brute(exact[0], exact[1]))
    assert 0.3 < precision.value < 0.9
    assert frechet(real, generated).value == pytest.approx(frechet(*exact).value, rel=1e-5)


def test_the_interval_of_the_inception_score_holds_it():
    value, low, high = inception_score(torch.randn(100, 5, generator=torch.Generator().manual_seed(2)) * 2)
    assert 1 < low < value < high < 5


def test_names_and_facts():
    network = random_features()
    assert network.called("fid") == "fid_random"
    assert network.facts["dimension"] == RandomFeatures.num_features
    assert network.facts["weights"] == random_features().facts["weights"]
    assert network.head is None
    inception = FeatureNet(nn.ModuleDict({"fc": nn.Linear(2048, 3)}), "", "none")
    assert inception.called("fid") == "fid"
    assert inception.head.shape == (3, 2048)
