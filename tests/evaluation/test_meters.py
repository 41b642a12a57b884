"""Meters: names of figures, what a perfect CLIP finds, captions that are the same, broken features."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.data.frozen import FrozenCLIP
from dalle.errors import UserError
from dalle.evaluation.meters import Distances, Verdicts, ZeroShot, recalls
from dalle.metrics.features import FeatureNet


class Head(nn.Module):
    """As Inception: a last layer whose logits the inception score reads."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3, bias=False)


def distances(
    name: str, prefix: str = "", metrics=("fid", "kid", "inception", "precision_recall")
) -> Distances:
    return Distances(metrics, FeatureNet(Head(), name, "none"), prefix)


def sets(n: int, m: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"features": torch.randn(k, 4, generator=generator)} for k in (n, m)]


def test_figures_of_inception_have_the_plain_names():
    found = distances("").figures(*sets(30, 40), [])
    assert set(found) == {"fid", "kid", "inception_score", "precision", "recall"}
    assert found["inception_score"].value >= 1


def test_other_networks_and_reconstructions_are_named():
    assert set(distances("clip").figures(*sets(30, 40), [])) == {
        "fid_clip",
        "kid_clip",
        "precision_clip",
        "recall_clip",
    }
    assert set(distances("", "r", ("fid",)).figures(*sets(30, 40), [])) == {"rfid"}


@pytest.mark.parametrize(("made", "real", "biased"), [(5, 5, False), (4, 40, True), (40, 4, True)])
def test_a_distance_of_too_few_pictures_says_so_in_its_name(made, real, biased):
    meter = distances("clip", metrics=("fid",))
    name = "fid_clip_biased" if biased else "fid_clip"
    assert set(meter.figures(*sets(made, real), [])) == {name}
    (note,) = meter.notes
    assert ("mostly bias" in note) == biased
    assert (f"the interval is of the estimate at n={made}" in note) != biased


def test_features_that_are_no_numbers_are_counted():
    made, real = sets(5, 6)
    made["features"][2, 1] = torch.inf
    with pytest.raises(UserError, match="the features of 1 of 5 evaluated pictures are not finite"):
        distances("").figures(made, real, [])


def test_recalls_count_equal_captions_once():
    image = text = torch.eye(4)[[0, 0, 1, 2]]
    found = recalls({"image_embed": image, "text_embed": text}, ["a", "a", "b", "c"])
    assert {name: figure.value for name, figure in found.items()} == {
        "retrieval/image_to_text_r1": 1.0,
        "retrieval/text_to_image_r1": 1.0,
    }  # of three captions five or ten nearest would be all


class Colours(FrozenCLIP):
    """A CLIP that embeds a picture as its mean colour, and words as what they name."""

    weights_hash = "colours"

    def __init__(self):
        nn.Module.__init__(self)

    def embed_captions(self, captions):
        return {
            "text_embed": torch.stack(
                [torch.eye(3)[["red", "green", "blue"].index(c.split()[-1])] for c in captions]
            )
        }

    def embed_image(self, image):
        return image.mean((2, 3)) + 1


def test_zero_shot_classes_of_a_clip_that_sees_colours():
    classes = [("a red", "the red"), ("a green", "the green"), ("a blue", "the blue")]
    labels = torch.tensor([0, 1, 2, 1, -1])
    shown = torch.tensor([0, 1, 2, 0, 0])  # the fourth looks like another class, the fifth has none
    image = (F.one_hot(shown, 3) * 255).to(torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4)
    meter = ZeroShot(["zero_shot"], Colours(), (classes, labels))
    rows = meter.rows(image, ["a red"] * 5, list(range(5)))
    found = meter.figures({}, rows, [])
    assert found["zero_shot/top1"].value == 0.75
    assert meter.notes == ["zero_shot: 4 pictures of 3 classes"]


def test_verdicts_of_groups():
    meter = Verdicts(["judge"], lambda items: ["seen" if item < 2 else "unseen" for item in items])
    nan = torch.nan
    rows = {"all": torch.tensor([1.0, 0.0, 0.0]), "size": torch.tensor([nan, 1.0, nan])}
    found = {name: figure.value for name, figure in meter.figures(rows, {}, ["x"] * 3).items()}
    assert found == {
        "judge/all": pytest.approx(1 / 3), "judge/size": 1.0,
        "judge/seen/all": 0.5, "judge/seen/size": 1.0, "judge/unseen/all": 0.0,
    }  # fmt: skip
