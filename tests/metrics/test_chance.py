"""What chance has right: as the judge finds on pictures that were drawn for other captions."""

import pytest
import torch

from dalle.data.scenes import draw
from dalle.data.shapes import HELD_OUT, Shapes, unrelated
from dalle.metrics.chance import chance
from dalle.metrics.judge import Judge


def test_chance_is_what_the_judge_says_of_unrelated_pictures():
    captions = Shapes("test").captions_of(range(400))
    found = chance(captions)
    judged = Judge()(draw(unrelated(400, seed=1), 32), captions)
    for key in ("colour", "shape", "size", "background", "relation", "all"):
        assert found[key].nanmean() == pytest.approx(judged[key].nanmean().item(), abs=0.05), key
    assert 0.001 < found["all"].mean() < 0.03


def test_what_says_little_is_often_true():
    found = chance(["a shape", "a small shape", "a red circle", "a red circle above a blue square"])
    assert found["all"][0] > found["all"][1] > found["all"][2] >= found["all"][3]
    assert found["all"][0] == pytest.approx(0.5, abs=0.25)  # one object, not two
    assert found["relation"].isnan().tolist() == [True, True, True, False]


def test_unrelated_pictures_have_all_pairs_alike():
    scenes = unrelated(20_000)
    alone = scenes.count == 1
    shares = torch.bincount(scenes.colour[alone, 0] * 6 + scenes.shape[alone, 0], minlength=48) / alone.sum()
    assert shares.min() > 0.7 / 48
    assert shares.max() < 1.3 / 48
    assert len(HELD_OUT) == 8
