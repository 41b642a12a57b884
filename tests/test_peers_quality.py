"""`benchmarks/peers_quality.py` without the peers' packages: training by the clock, sampling and judging."""

import sys

import torch
from tiny import ROOT
from torch import Tensor, nn

sys.path.append(str(ROOT / "benchmarks"))

import peers_quality

from dalle.data.scenes import draw
from dalle.data.shapes import prompts
from dalle.evaluation.demo import KINDS


def test_training_ends_with_its_time_and_counts_what_it_saw():
    data, network = peers_quality.Pictures(), nn.Conv2d(3, 1, 1)
    start = network.weight.detach().clone()

    def loss_of(image: Tensor, captions: list[str], passed: float) -> Tensor:
        assert len(captions) == len(image) == 4
        assert 0 <= passed < 1
        data.read.update(captions)
        return network(image).square().mean()

    part = peers_quality.fit(network, loss_of, data.batches(4, 0), 0.3, 1e-2)
    assert part.parameters == 4
    assert part.pictures == 4 * part.steps > 0
    assert part.seconds >= 0.3
    assert 0 < len(data.read) <= part.pictures
    assert not torch.equal(network.weight, start)


def test_options_are_chosen_on_the_validation_split_and_judged_on_the_test_split():
    scenes, asked = {}, set()
    for split in ("val", "test"):
        for kind in KINDS.values():
            for seen in (True, False):
                captions, made = prompts(kind, seen=seen, n=4, split=split)
                scenes |= dict(zip(captions, draw(made, peers_quality.SIDE), strict=True))

    def sample(captions: list[str], options: dict[str, bool]) -> Tensor:
        asked.update(captions)
        pictures = torch.stack([scenes[caption] for caption in captions])
        return pictures if options["right"] else torch.zeros_like(pictures)

    row = peers_quality.judged(sample, [{"right": False}, {"right": True}], set(), n=4, choose_n=4)
    assert asked == set(scenes)
    assert row["options"] == {"right": True}
    assert row["tried"][0]["right"] < row["judge/all"] == 1
    assert row["judge/two objects, relation, unseen/low"] < row["judge/two objects, relation, unseen/all"]
