"""Order, ranks, resuming and captions: what a run sees is a pure function of seed, epoch and position."""

from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dalle.data.sources import EpochSampler, Source, SourceDataset, identity_collate, mix

counts = st.integers(1, 60)
sizes = st.integers(1, 7)
worlds = st.integers(1, 4)


class Numbers:
    """Item i is a picture full of i / 100; its captions say i and their own number."""

    image_size, fixed = 2, True

    def __init__(self, n=10, captions=3):
        self.n, self.number = n, captions

    def __len__(self):
        return self.n

    def captions(self, item):
        return [f"{item}:{k}" for k in range(self.number)]

    def images(self, items, epoch=0):
        return torch.tensor(items)[:, None, None, None].expand(-1, 3, 2, 2) / 100

    def fingerprint(self):
        return f"numbers{self.n}"


def test_the_fake_is_a_source():
    assert isinstance(Numbers(), Source)


@given(counts, sizes, st.booleans(), st.integers(0, 9))
def test_an_epoch_shows_every_item_once(n, batch, shuffle, epoch):
    sampler = EpochSampler(n, batch, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(v for b in batches for v in b) == list(range(epoch * n, (epoch + 1) * n))


@given(st.integers(8, 60), sizes, worlds, st.booleans(), st.booleans())
def test_ranks_have_equal_work_and_share_all_items(n, batch, world, shuffle, drop):
    ranks = [
        list(EpochSampler(n, batch, shuffle=shuffle, drop_last=drop, rank=r, world=world))
        for r in range(world)
    ]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    seen = Counter(v for batches in ranks for b in batches for v in b)
    if drop:
        assert set(seen.values()) <= {1}
        assert len(seen) == n // (batch * world) * batch * world
    else:
        assert len(seen) == n
        assert seen.total() - n < world


@given(st.integers(8, 60), st.integers(1, 3), st.integers(2, 4))
def test_ranks_together_see_the_batches_of_one_large_process(n, batch, world):
    one = EpochSampler(n, batch * world, shuffle=True, drop_last=True)
    many = [EpochSampler(n, batch, shuffle=True, drop_last=True, rank=r, world=world) for r in range(world)]
    together = [sorted(chain(*batches)) for batches in zip(*many, strict=True)]
    assert together == [sorted(batch) for batch in one]


@given(st.integers(5, 60), sizes, st.integers(0, 5), st.data())
def test_a_resumed_epoch_shows_exactly_the_rest(n, batch, epoch, data):
    whole = EpochSampler(n, batch, shuffle=True, seed=3)
    whole.set_epoch(epoch)
    start = data.draw(st.integers(0, len(whole)))
    resumed = EpochSampler(n, batch, shuffle=True, seed=3, position=lambda: (epoch, start))
    assert list(resumed) == list(whole)[start:]
    assert len(resumed) == len(whole)


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        sampler = EpochSampler(100, 10, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return [v - 100 * epoch for b in sampler for v in b]

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_limit_bounds_the_items():
    assert [v for b in EpochSampler(100, 4, limit=6) for v in b] == list(range(6))
    assert len(EpochSampler(3, 4, limit=6)) == 1


def test_one_batch_of_virtual_indices():
    batch = SourceDataset(Numbers(), lambda c: torch.tensor([[len(x)] for x in c])).__getitems__([23, 20])
    assert batch["index"].tolist() == [3, 0]
    assert batch["caption"] == ["3:0", "0:0"]
    assert batch["image"][:, 0, 0, 0].tolist() == pytest.approx([0.03, 0.0])
    assert batch["text"].tolist() == [[3], [3]]


def test_captions_are_drawn_per_epoch_and_all_of_them():
    dataset = SourceDataset(Numbers(n=4, captions=3), images=False, seed=0)
    drawn = [dataset.__getitems__(range(e * 4, e * 4 + 4))["caption"] for e in range(60)]
    assert drawn[5] == dataset.__getitems__(range(20, 24))["caption"]
    uses = Counter(c for epoch in drawn for c in epoch)
    assert len(uses) == 12
    assert min(uses.values()) > 8  # 20 expected


def test_captions_made_together_are_the_same():
    class Together(Numbers):
        def captions_of(self, items):
            return [f"{item}:0" for item in items]

    one, other = SourceDataset(Numbers(captions=1), seed=0), SourceDataset(Together(captions=1), seed=0)
    assert one.__getitems__([3, 1])["caption"] == other.__getitems__([3, 1])["caption"]


def test_workers_see_the_epoch():
    dataset = SourceDataset(Numbers(), seed=1)

    def captions(workers):
        sampler = EpochSampler(10, 4, shuffle=True)
        sampler.set_epoch(7)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=identity_collate, num_workers=workers)
        return [batch["caption"] for batch in loader]

    assert captions(0) == captions(1)


def test_mix_is_splitmix64():
    # First outputs of the published generator (state += golden gamma) seeded with 0 and 1234567.
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317
