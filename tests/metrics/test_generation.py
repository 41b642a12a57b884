import json
import math

import pytest
import torch
from torch import distributed

from dalle.images import from_uint8, to_uint8
from dalle.metrics.generation import GenerationMetrics, _over_ranks


class FakeCLIP:
    """Colour as embedding: a picture's mean colour, a caption's colour word."""

    embed_dim = 3
    words = ("red", "green", "blue")

    def embed_image(self, image):
        return image.mean((2, 3)) + 1

    def embed_captions(self, captions):
        said = [[word in caption for word in self.words].index(True) for caption in captions]
        return {"text_embed": torch.eye(3)[said]}


def judge(images, captions):
    """Right in colour where the caption's channel is the brightest; no circle is ever right."""
    colour = FakeCLIP().embed_captions(captions)["text_embed"].argmax(-1)
    right = (images.mean((2, 3)).argmax(-1) == colour).float()
    shape = torch.tensor([0.0 if "circle" in caption else math.nan for caption in captions])
    return {
        "colour": right,
        "shape": shape,
        "all": right * shape.nan_to_num(1.0),
        "relation": shape * math.nan,
    }


def pictures(*channels):
    return torch.eye(3)[list(channels)].mul(2).sub(1).view(-1, 3, 1, 1).expand(-1, 3, 4, 4)


@pytest.fixture(autouse=True)
def no_inception(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def test_without_a_clip_there_is_only_the_judge():
    metrics = GenerationMetrics(None, judge).to("cpu")
    metrics.update(pictures(0, 2), pictures(0, 2), ["red", "green"])
    assert metrics.compute() == {"judge/all": 0.5, "judge/colour": 0.5, "pictures": 2}
    metrics.reset()
    assert metrics.compute() == {"pictures": 0}


CAPTIONS = ["a red circle", "green", "blue", "a blue circle"]
GROUPS = ["seen", "seen", "unseen", "unseen"]


def test_the_table_of_a_small_example():
    metrics = GenerationMetrics(FakeCLIP(), judge)
    metrics.update(pictures(0, 1), pictures(0, 1), CAPTIONS[:2], GROUPS[:2])
    metrics.update(pictures(0, 2), pictures(2, 2), CAPTIONS[2:], GROUPS[2:])
    table = metrics.compute()
    assert table.pop("fid_clip") > 0
    assert table == pytest.approx(
        {
            "clip_score": 75.0,
            "clip_score_real": 100.0,
            "pictures": 4,
            "judge/all": 0.25,
            "judge/colour": 0.75,
            "judge/shape": 0.0,  # over the two captions that name one
            "judge/seen/all": 0.5,
            "judge/seen/colour": 1.0,
            "judge/seen/shape": 0.0,
            "judge/unseen/all": 0.0,
            "judge/unseen/colour": 0.5,
            "judge/unseen/shape": 0.0,
        },
        abs=1e-4,
    )
    assert all(type(value) is float for value in table.values())
    json.dumps(table)


def test_generated_equal_to_real_is_at_distance_zero():
    metrics = GenerationMetrics(FakeCLIP())
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    metrics.update(images, images, ["red"] * 16)
    table = metrics.compute()
    assert table["fid_clip"] == pytest.approx(0, abs=1e-6)
    assert table["clip_score"] == table["clip_score_real"]
    assert not any(name.startswith("judge") for name in table)


def test_everything_is_measured_on_the_pictures_as_saved():
    torch.manual_seed(0)
    generated, real = torch.randn(8, 3, 8, 8), torch.rand(8, 3, 8, 8) * 2 - 1  # beyond [-1, 1] too
    tables = []
    for images in (generated, from_uint8(to_uint8(generated))):
        metrics = GenerationMetrics(FakeCLIP(), judge)
        metrics.update(images, real, ["a red circle"] * 8)
        tables.append(metrics.compute())
    assert tables[0] == tables[1]


def test_reset_forgets():
    metrics = GenerationMetrics(FakeCLIP(), judge)
    metrics.update(pictures(1, 1), pictures(0, 0), CAPTIONS[:2], GROUPS[:2])
    metrics.reset()
    metrics.update(pictures(0, 1), pictures(0, 1), CAPTIONS[:2])
    table = metrics.compute()
    assert table["pictures"] == 2
    assert table["judge/colour"] == 1
    assert "judge/seen/colour" not in table


def test_inference_tensors_are_taken():
    metrics = GenerationMetrics(FakeCLIP(), judge)
    with torch.inference_mode():
        generated = pictures(0, 1).clone()
    metrics.update(generated, pictures(0, 1), CAPTIONS[:2])
    assert metrics.compute()["judge/colour"] == 1


def test_verdicts_are_added_up_over_ranks_that_know_different_names(monkeypatch):
    ranks = [GenerationMetrics(FakeCLIP(), judge) for _ in range(2)]
    ranks[0].update(pictures(0, 1, 0), pictures(0, 1, 2), CAPTIONS[:3], GROUPS[:3])
    ranks[1].update(pictures(2), pictures(2), CAPTIONS[3:], GROUPS[3:])
    whole = GenerationMetrics(FakeCLIP(), judge)
    whole.update(pictures(0, 1, 0, 2), pictures(0, 1, 2, 2), CAPTIONS, GROUPS)

    def gather(into, _):
        into[:] = [dict(rank.tally) for rank in ranks]

    expected = _over_ranks(whole.tally)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    total = _over_ranks(ranks[0].tally)
    assert set(ranks[1].tally) < set(total)
    assert list(total) == list(expected)
    for name, counts in expected.items():
        assert total[name].tolist() == counts.tolist()
