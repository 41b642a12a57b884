"""Metrics of evaluations: names, what a perfect CLIP finds, equal captions, broken features, own metrics."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.data.frozen import FrozenCLIP
from dalle.data.scenes import draw, parse
from dalle.data.shapes import prompts
from dalle.errors import UserError
from dalle.images import to_uint8
from dalle.metrics.clip_score import CLIPScore, ZeroShotAccuracy, recalls
from dalle.metrics.features import FeatureNet
from dalle.metrics.fid import FrechetDistance
from dalle.metrics.intervals import of_share
from dalle.metrics.judge_accuracy import JudgeAccuracy
from dalle.metrics.metric import PictureCount


class Head(nn.Module):
    """As Inception: a last layer whose logits the inception score reads."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3, bias=False)


def distances(
    name: str, prefix: str = "", metrics=("fid", "kid", "inception", "precision_recall")
) -> FrechetDistance:
    return FrechetDistance(FeatureNet(Head(), name, "none"), metrics, prefix)


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
    metric = distances("clip", metrics=("fid",))
    name = "fid_clip_biased" if biased else "fid_clip"
    assert set(metric.figures(*sets(made, real), [])) == {name}
    (note,) = metric.notes
    assert ("mostly bias" in note) == biased
    assert (f"the interval is of the estimate at n={made}" in note) != biased


def test_captions_of_any_letters_stay_with_their_pictures():
    captions = ["a\0b", "c\nd", "\ud800", "\u8d64"]
    metric = PictureCount()
    metric.update(torch.zeros(3, 3, 2, 2), captions[:3], [3, 2, 1])
    metric.update(torch.zeros(1, 3, 2, 2), captions[3:], [0])
    assert metric.seen("made")[1] == captions[::-1]


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
    metric = ZeroShotAccuracy(Colours(), ["zero_shot"], (classes, labels))
    rows = metric.rows(image, ["a red"] * 5)
    found = metric.figures({}, rows, [])
    assert found["zero_shot/top1"].value == 0.75
    assert metric.notes == ["zero_shot: 4 pictures of 3 classes"]


def words(image_size: int = 64):
    """Real pictures of single objects as 8 bits, and captions that name a colour and a shape."""
    captions, scenes = prompts("one", True, 60)
    return to_uint8(draw(scenes, image_size)), captions


class Knowing(FrozenCLIP):
    """A CLIP that reads both: a picture is embedded as the word counts of its own caption."""

    weights_hash = "knowing"

    def __init__(self, captions, blind=()):
        nn.Module.__init__(self)
        self.captions, self.blind = captions, blind
        claims = [parse(caption).things[0] for caption in captions]
        self.vectors = torch.stack([self.vector(*claim[:2]) for claim in claims])

    def vector(self, colour, shape):
        parts = [torch.eye(9)[8 if colour is None else colour], torch.eye(7)[6 if shape is None else shape]]
        return torch.cat([0 * part if k in self.blind else part for k, part in enumerate(parts)]) + 0.1

    def embed_captions(self, captions):
        return {"text_embed": torch.stack([self.vector(*parse(c).things[0][:2]) for c in captions])}

    def embed_image(self, image):
        return self.vectors[: len(image)]


def test_hard_negatives_see_the_word_that_a_clip_score_hardly_does():
    image, captions = words()
    sees, blind = Knowing(captions), Knowing(captions, blind=(1,))
    shares = {}
    for name, clip in {"sees": sees, "blind": blind}.items():
        metric = CLIPScore(clip, ["clip_score", "hard_negatives"])
        rows = metric.rows(image, captions)
        found = metric.figures(rows, rows, captions)
        shares[name] = {key.split("/")[1]: f.value for key, f in found.items() if "negatives/" in key}
        assert found["hard_negatives_real/colour"] == found["hard_negatives/colour"]
    assert shares["sees"]["colour"] == shares["sees"]["shape"] == 1
    assert shares["blind"]["colour"] == 1
    assert shares["blind"]["shape"] == 0  # a tie is no success
    assert shares["blind"]["all"] == 0
    metric = CLIPScore(sees, ["clip_score", "hard_negatives"])
    rows = metric.rows(image, captions)
    things = [parse(caption).things[0] for caption in captions]
    other = [sees.vector(thing.colour, (thing.shape + 1) % 6) for thing in things]
    wrong = {**rows, "image_embed": F.normalize(torch.stack(other), dim=1)}
    found = metric.figures(wrong, rows, captions)
    assert found["clip_score"].value > 0.4 * found["clip_score_real"].value
    assert found["hard_negatives/shape"].value == 0
    assert found["hard_negatives/colour"].value == 1


def test_verdicts_of_groups_chance_and_what_training_read():
    captions = ["a red circle", "a pink triangle", "a small pink shape", "a blue square"]
    metric = JudgeAccuracy(lambda: {"a red circle", "a pink triangle"})
    nan = torch.nan
    rows = {
        "all": torch.tensor([1.0, 0.0, 0.0, 0.0]), "size": torch.tensor([nan, nan, 1.0, nan]),
        "residual": torch.tensor([0.1, 0.2, 0.3, 0.4]),
    }  # fmt: skip
    found = metric.figures(rows, {}, captions)
    values = {name: figure.value for name, figure in found.items()}
    chances = {name: values.pop(name) for name in list(values) if name.startswith("chance/")}
    assert values == pytest.approx({
        "judge/all": 1 / 4, "judge/size": 1.0, "judge/seen/all": 1 / 3, "judge/seen/size": 1.0,
        "judge/unseen/all": 0.0, "judge/seen_new/all": 0.0, "judge/seen_new/size": 1.0,
        "seen_captions_read_in_training": 1 / 3, "judge_residual": 0.25,
    })  # fmt: skip
    assert {"chance/all", "chance/seen/all", "chance/unseen/all", "chance/shape"} <= set(chances)
    assert found["judge/all"] == of_share(torch.tensor([1, 0, 0, 0]))
    assert "judge/seen_new/all" not in JudgeAccuracy().figures(rows, {}, captions)
