"""Mixtures: shares are exact in every epoch; what a place stands for depends on nothing but its number."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from dalle.data.mixture import Mixture
from dalle.data.shuffling import ShardOrder
from dalle.data.sources import EpochSampler, Source, SourceDataset, first_captions
from dalle.errors import UserError


class Plain:
    """Item i of a source says its name and i; its picture is full of i / 100."""

    fixed = True

    def __init__(self, split, image_size, name, n):
        self.image_size, self.name, self.n = image_size, name, n if split == "train" else max(1, n // 10)

    def __len__(self):
        return self.n

    def captions(self, item):
        return [f"{self.name} {item}"]

    def images(self, items, epoch=0):
        size = self.image_size
        return torch.tensor(items)[:, None, None, None].expand(-1, 3, size, size) / 100

    def fingerprint(self):
        return f"{self.name} {self.n}"


class Bytes(Plain):
    def pixels(self, items, epoch=0):
        return torch.tensor(items, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


class Shards(Plain):
    """Has an order of its own: shards of 5 one after another."""

    def order(self, seed, epoch, items):
        first = np.minimum(np.arange(0, self.n + 5, 5), self.n)
        return ShardOrder(first, 1, False, seed, epoch, items)


def mixture(split="train", weights=None, window=100_000, kinds=None, **sizes):
    sizes = sizes or {"a": 60, "b": 20, "c": 40}
    kinds = kinds or {}

    def factory(name, n):
        return lambda split, image_size: kinds.get(name, Plain)(split, image_size, name, n)

    sources = {name: factory(name, n) for name, n in sizes.items()}
    return Mixture(split, sources, 2, weights, window)


def epochs(source, number, seed=0, limit=None):
    """Captions of so many epochs, a list each."""
    items = len(source) if limit is None else limit
    orders = [source.order(seed, epoch, items) for epoch in range(number)]
    return [[source.captions(int(k))[0] for k in order(np.arange(items))] for order in orders]


WEIGHTS = {"a": 1, "b": 2, "c": 1}


def test_is_a_source_in_which_the_first_items_hold_all_by_their_size():
    source = mixture()
    assert isinstance(source, Source)
    assert len(source) == 120
    assert len(set(first_captions(source, range(120)))) == 120
    for first in (6, 12, 60, 120):
        counts = Counter(caption[0] for caption in first_captions(source, range(first)))
        assert counts == {"a": first / 2, "b": first / 6, "c": first / 3}


@pytest.mark.parametrize("window", [1, 40, 100_000])
def test_every_epoch_and_window_has_the_shares_of_the_weights(window):
    for epoch in epochs(mixture(weights=WEIGHTS, window=window), 7):
        assert Counter(caption[0] for caption in epoch) == {"a": 30, "b": 60, "c": 30}
        length = max(window, 9) if window < 120 else 120
        for start in range(0, 120 - 2 * length, length):
            counts = Counter(caption[0] for caption in epoch[start : start + length])
            assert all(abs(counts[n] - length * w / 4) < 2 for n, w in WEIGHTS.items())


@pytest.mark.parametrize("window", [40, 100_000])
def test_a_source_is_gone_through_before_an_item_comes_again(window):
    seen = [caption for epoch in epochs(mixture(weights=WEIGHTS, window=window), 6) for caption in epoch]
    for name, n in {"a": 60, "b": 20, "c": 40}.items():
        counts = Counter(caption for caption in seen if caption[0] == name)
        passes = counts.total() // n
        assert len(counts) == n
        assert set(counts.values()) <= {passes - 1, passes, passes + 1}
    a = [caption for caption in seen[:240] if caption[0] == "a"]
    assert len(set(a)) == 60  # half of a in each epoch: two are one pass
    b = [caption for caption in seen[:120] if caption[0] == "b"]
    assert set(Counter(b).values()) == {3}


def test_without_weights_an_epoch_is_each_item_once_in_another_order():
    for window in (30, 100_000):
        one, other = epochs(mixture(window=window), 2)
        assert len(set(one)) == len(set(other)) == 120
        assert one != other
        assert epochs(mixture(window=window), 1) == [one]
        assert epochs(mixture(window=window), 1, seed=1) != [one]


def test_fractions_of_an_item_add_up_over_epochs():
    seen = [c for epoch in epochs(mixture(weights={"x": 1, "y": 2}, x=10, y=10), 30) for c in epoch]
    counts = Counter(caption[0] for caption in seen)
    assert abs(counts["x"] - 200) <= 1
    assert counts.total() == 600


@pytest.mark.parametrize("window", [40, 100_000])
def test_any_place_can_be_entered_alone(window):
    source = mixture(weights=WEIGHTS, window=window, kinds={"a": Shards})
    for epoch in (0, 3):
        whole = source.order(5, epoch, 120)(np.arange(120))
        alone = [int(source.order(5, epoch, 120)(np.array([place]))[0]) for place in range(120)]
        assert alone == whole.tolist()


def test_a_source_keeps_its_own_order_of_shards():
    source = mixture(weights={"a": 1, "b": 1}, window=8, kinds={"a": Shards}, a=20, b=20)
    (epoch,) = epochs(source, 1)
    shards = [int(caption[2:]) // 5 for caption in epoch if caption[0] == "a"]
    assert len(set(shards[:8])) <= 3  # in windows of 8 places, four of them of this source


def test_ranks_and_a_resumed_run_see_what_one_process_would():
    source = mixture(weights=WEIGHTS, window=40)
    make = {"shuffle": True, "drop_last": True, "order": source.order, "seed": 3}
    one = EpochSampler(120, 8, **make)
    one.set_epoch(2)
    ranks = [EpochSampler(120, 4, rank=rank, world=2, **make) for rank in (0, 1)]
    for rank in ranks:
        rank.set_epoch(2)
    whole = list(one)
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole]
    one.set_epoch(2, start=9)
    assert list(one) == whole[9:]


def test_a_limit_keeps_the_first_items_of_each_source():
    source = mixture(weights=WEIGHTS)
    (epoch,) = epochs(source, 1, limit=60)
    assert Counter(caption[0] for caption in epoch) == {"a": 15, "b": 30, "c": 15}
    assert {int(caption[2:]) for caption in epoch if caption[0] == "b"} == set(range(10))


def test_validation_is_every_picture_once_whatever_the_weights():
    source = mixture("val", weights=WEIGHTS)
    assert sorted(first_captions(source, range(len(source)))) == sorted(
        f"{name} {k}" for name, n in {"a": 6, "b": 2, "c": 4}.items() for k in range(n)
    )


def test_pictures_are_those_of_their_captions_and_bytes_where_all_have_bytes():
    source = mixture()
    items = [7, 3, 119, 3, 50]
    images, captions = source.images(items), first_captions(source, items)
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([int(c[2:]) for c in captions]) / 100)
    assert not hasattr(source, "pixels")
    assert not hasattr(mixture(kinds={"a": Bytes, "b": Bytes}), "pixels")
    batch = SourceDataset(mixture(kinds=dict.fromkeys("abc", Bytes))).__getitems__(items)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"][:, 0, 0, 0].tolist() == [int(caption[2:]) for caption in batch["caption"]]


def test_shares_are_said(capsys):
    mixture(weights={"x": 3, "y": 1}, x=10, y=30)
    assert "x 75.0% (10 items, 3 passes an epoch), y 25.0% (30 items, 0.33 passes" in capsys.readouterr().out


def test_the_fingerprint_follows_weights_and_sources():
    made = [mixture(), mixture(weights=WEIGHTS), mixture(a=3, b=2), mixture(b=2, a=3)]
    assert len({source.fingerprint() for source in made}) == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"weights": {"a": 1, "b": 1, "d": 1}}, "no weight of c; give one for each of a, b, c"),
        ({"weights": {"a": 1, "b": 1, "c": 1, "d": 1}}, "no source d; give"),
        ({"weights": {"a": 0, "b": 1, "c": 1}}, "data.weights.a must be a positive number, got 0"),
        ({"weights": {"a": 1, "b": -1, "c": 1}}, "data.weights.b must be a positive number, got -1"),
        ({"weights": {"a": 1, "b": 1, "c": math.inf}}, "data.weights.c must be a positive number"),
        ({"weights": {"a": "x", "b": 1, "c": 1}}, "data.weights.a must be a positive number, got x"),
        ({"weights": {"a": 1e308, "b": 1e308, "c": 1}}, "data.weights.a must be .* the largest is 1e\\+100"),
        ({"a": 0, "b": 3}, "data.sources.a has nothing to train on"),
    ],
)
def test_mistakes_are_one_line(options, error):
    with pytest.raises(UserError, match=error):
        mixture(**options)


def test_a_weight_that_is_next_to_nothing_is_refused():
    source = mixture(weights={"x": 1, "y": 1000}, x=10, y=10)
    with pytest.raises(UserError, match="less than 2 of the 20 places"):
        source.order(0, 0, 20)


def test_no_sources():
    with pytest.raises(UserError, match="data=mixture has no sources"):
        Mixture("train", {}, 64)


def test_a_name_of_a_kind_is_no_source():
    with pytest.raises(UserError, match=r"data.sources.a is no source; \+data@data.sources.a=folder"):
        Mixture("train", {"a": "folder"}, 64)


def test_a_source_that_cannot_be_made_is_named():
    def broken(**_):
        raise UserError("data.root=nowhere does not exist")

    with pytest.raises(UserError, match=r"\Adata.sources.b: data.root=nowhere does not exist\Z"):
        Mixture("train", {"b": broken}, 8)
