"""Codes on disk: exactly what the tokenizer says, kept, told apart, never half there, with their captions."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dalle.data.code_cache import CodeCache, CodeDataset, cached_codes
from dalle.data.embedding_cache import BrokenCache
from dalle.data.frozen import FrozenTokenizer
from dalle.data.tokenizers import CaptionTokenizer


class Grays:
    """300 gray pictures, more than one chunk, with one to three captions; some turn out broken when read."""

    image_size, fixed = 2, True

    def __init__(self, version=0, fail_at=None, broken=()):
        self.version, self.fail_at, self.broken, self.drawn = version, fail_at, set(broken), 0
        self.found: set[int] = set()

    def __len__(self):
        return 300

    def captions(self, item):
        item += item in self.found  # the next picture takes the place of a broken one
        return [f"gray {item} {k}" for k in range(1 + item % 3)]

    def images(self, items, epoch=0):
        if self.fail_at is not None and self.fail_at in items:
            raise KeyboardInterrupt
        self.drawn += len(items)
        self.found |= self.broken & set(items)
        level = torch.tensor([item + (item in self.found) for item in items])
        return level[:, None, None, None].expand(-1, 3, 2, 2) / 300.0

    def fingerprint(self):
        return f"grays {self.version}"


class Levels(nn.Module):
    """Four codes a picture: its gray level, shifted by the place."""

    image_size, grid = 2, 2

    def __init__(self, vocab_size=512):
        super().__init__()
        self.vocab_size = vocab_size
        self.shift = nn.Parameter(torch.arange(4.0))

    def encode(self, image):
        return ((image[:, 0] * 300).round().flatten(1) + self.shift).long() % self.vocab_size

    def decode(self, codes):
        return (codes / 300).view(-1, 1, 2, 2).expand(-1, 3, -1, -1)


@pytest.fixture
def tokenizer():
    return FrozenTokenizer(Levels())


def test_holds_exactly_what_the_tokenizer_says(tmp_path, tokenizer):
    cache = cached_codes(tmp_path, Grays(), tokenizer, 300)
    items = [299, 0, 17]
    assert torch.equal(cache(items), tokenizer.encode(Grays().images(items)))
    assert cache(items).dtype == torch.int64
    assert cache.codes.dtype == np.uint16
    assert cache.captions[17] == ["gray 17 0", "gray 17 1", "gray 17 2"]
    assert len(cache) == 300


def test_a_large_vocabulary_is_not_cut_to_16_bits(tmp_path):
    class Large(Levels):
        def encode(self, image):
            return super().encode(image) + 70_000

    cache = cached_codes(tmp_path, Grays(), FrozenTokenizer(Large(70_600)), 5)
    assert cache([4]).tolist() == [[70_004, 70_005, 70_006, 70_007]]


def test_is_found_again_and_all_it_depends_on_has_its_own(tmp_path, tokenizer):
    cached_codes(tmp_path, Grays(), tokenizer, 300)
    again = Grays()
    cached_codes(tmp_path, again, tokenizer, 300)
    assert again.drawn == 0
    other = FrozenTokenizer(Levels())
    with torch.no_grad():
        other.net.shift += 1
    cached_codes(tmp_path, Grays(), other, 300)
    cached_codes(tmp_path, Grays(version=1), tokenizer, 300)
    cached_codes(tmp_path, Grays(), tokenizer, 100)
    assert len(list(tmp_path.iterdir())) == 4


def test_an_interrupted_build_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        cached_codes(tmp_path, Grays(fail_at=280), tokenizer, 300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["codes.npy", "captions.json", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_noticed_and_repaired(tmp_path, tokenizer, name, damage):
    file = cached_codes(tmp_path, Grays(), tokenizer, 300).path / name
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-5])
    elif damage == "flip":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    else:
        file.unlink()
    with pytest.raises(BrokenCache):
        CodeCache(file.parent, verify=True)
    again = Grays()
    assert len(cached_codes(tmp_path, again, tokenizer, 300)) == 300
    assert again.drawn == 300
    assert file.read_bytes() == content


def test_a_cache_of_another_format_is_rebuilt(tmp_path, tokenizer):
    file = cached_codes(tmp_path, Grays(), tokenizer, 300).path / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))
    again = Grays()
    cached_codes(tmp_path, again, tokenizer, 300)
    assert again.drawn == 300


def test_travels_to_workers_by_path(tmp_path, tokenizer):
    cache = cached_codes(tmp_path, Grays(), tokenizer, 300)
    parcel = pickle.dumps(cache)
    assert len(parcel) < 1000
    assert torch.equal(pickle.loads(parcel)([5, 6]), cache([5, 6]))


def text_tokenizer():
    return CaptionTokenizer.train([f"gray {i} {k}" for i in range(99) for k in range(3)], 400, 12)


def test_a_batch_does_not_read_the_pictures(tmp_path, tokenizer):
    cache = cached_codes(tmp_path, Grays(), tokenizer, 300)
    source = Grays()
    batch = CodeDataset(source, text_tokenizer(), cache, images=False, seed=0, dropout=0.0)[305]
    assert batch.keys() == {"index", "codes", "caption", "text"}
    assert batch["codes"].tolist() == [[5, 6, 7, 8]]
    assert batch["caption"][0] in source.captions(5)
    assert source.drawn == 0


def test_a_broken_picture_takes_its_caption_with_it(tmp_path, tokenizer):
    """The codes are another picture's, so the caption must be too: also for who never reads the pictures."""
    cache = cached_codes(tmp_path, Grays(broken=[5]), tokenizer, 300)
    batch = CodeDataset(Grays(), text_tokenizer(), cache, images=False, seed=None, dropout=0.0)[5]
    assert batch["codes"].tolist() == [[6, 7, 8, 9]]
    assert batch["caption"] == ["gray 6 0"]


def test_dropout_is_a_function_of_seed_epoch_and_item(tmp_path, tokenizer):
    cache = cached_codes(tmp_path, Grays(), tokenizer, 300)

    def texts(seed, dropout=0.5, indices=(3, 4, 5)):
        data = CodeDataset(Grays(), text_tokenizer(), cache, images=False, seed=seed, dropout=dropout)
        return data.__getitems__(list(indices))["text"]

    assert torch.equal(texts(0), texts(0))
    assert torch.equal(texts(0)[1:2], texts(0, indices=[4]))
    assert not torch.equal(texts(0), texts(1))
    assert not torch.equal(texts(0, indices=range(3)), texts(0, indices=range(300, 303)))
    assert torch.equal(texts(None, 0.0), text_tokenizer()([f"gray {i} 0" for i in (3, 4, 5)]))
