"""The cache on disk: kept, found again, told apart, never half there."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dalle.data.embedding_cache import BrokenCache, EmbeddingCache, cached_embeddings
from dalle.data.frozen import FrozenCLIP
from dalle.data.tokenizers import CaptionTokenizer

PLENTY = 2**30


class Grays:
    """300 gray pictures, more than one chunk, with one to three captions."""

    image_size, fixed = 2, True

    def __init__(self, version=0, fail_at=None):
        self.version, self.fail_at, self.drawn = version, fail_at, 0

    def __len__(self):
        return 300

    def captions(self, item):
        return [f"gray {item} {k}" for k in range(1 + item % 3)]

    def images(self, items, epoch=0):
        if self.fail_at is not None and self.fail_at in items:
            raise KeyboardInterrupt
        self.drawn += len(items)
        return torch.tensor(items)[:, None, None, None].expand(-1, 3, 2, 2) / 300.0

    def fingerprint(self):
        return f"grays {self.version}"


class TinyCLIP(nn.Module):
    image_size, embed_dim, text_width, context_length = 2, 3, 4, 8

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.see, self.word = nn.Linear(12, 3), nn.Embedding(300, 4)

    def encode_image(self, image):
        return self.see(image.flatten(1))

    def encode_text(self, text):
        hidden = self.word(text)
        return hidden[:, 0, :3], hidden, text > 0


def make_clip(seed=0, caption="gray 0 1 2"):
    return FrozenCLIP(TinyCLIP(seed), CaptionTokenizer.train([caption], vocab_size=280, context_length=8))


@pytest.fixture
def clip():
    return make_clip()


def embed(folder, clip, source, items=300, text_bytes=PLENTY, **options):
    return cached_embeddings(folder, source, clip, items, text_bytes, **options)


def test_holds_exactly_what_the_network_says(tmp_path, clip):
    source = Grays()
    cache = embed(tmp_path, clip, source)
    items = [299, 0, 17]
    torch.testing.assert_close(cache.images(items), clip.embed_image(source.images(items)), atol=1e-6, rtol=0)
    rows = [int(cache.first[17]) + 2, 0]
    assert [cache.captions[row] for row in rows] == ["gray 17 2", "gray 0 0"]
    expected = clip.embed_captions(["gray 17 2", "gray 0 0"])
    for name, values in cache.texts(rows).items():
        assert values.dtype == expected[name].dtype
        torch.testing.assert_close(values, expected[name], atol=2e-3, rtol=0)
    assert cache.first[-1] == sum(len(source.captions(i)) for i in range(300)) == len(cache.captions)


def test_is_found_again_and_said_so(tmp_path, clip, capfd, caplog):
    embed(tmp_path, clip, Grays())
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    again = Grays()
    cache = embed(tmp_path, clip, again)
    assert again.drawn == 0
    assert len(cache) == 300
    assert "read from" in caplog.text + capfd.readouterr().err


def test_everything_it_depends_on_has_its_own(tmp_path, clip):
    small = Grays()
    small.image_size = 4
    embed(tmp_path, clip, Grays())
    embed(tmp_path, clip, Grays(version=1))
    embed(tmp_path, clip, small)
    embed(tmp_path, make_clip(seed=1), Grays())
    embed(tmp_path, make_clip(caption="other words here"), Grays())
    embed(tmp_path, clip, Grays(), items=100)
    embed(tmp_path, clip, Grays(), first_only=True)
    assert len(list(tmp_path.iterdir())) == 7


def test_only_first_captions_and_only_the_items_asked_for(tmp_path, clip):
    cache = embed(tmp_path, clip, Grays(), items=5, first_only=True)
    assert cache.captions == [f"gray {i} 0" for i in range(5)]
    assert len(cache) == 5


def test_text_states_that_are_too_large_are_left_out(tmp_path, clip):
    per_caption = 4 * 8 + 4 * 3 + 2 * 8 * 4 + 8  # ids, embedding, states, mask
    assert embed(tmp_path, clip, Grays(), items=1, text_bytes=per_caption).has_text
    cache = embed(tmp_path, clip, Grays(), items=1, text_bytes=per_caption - 1)
    assert not cache.has_text
    assert {p.name for p in cache.path.iterdir()} == {"image_embed.npy", "meta.json"}


def test_an_interrupted_build_leaves_nothing_and_can_be_done_again(tmp_path, clip):
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path, clip, Grays(fail_at=280))
    assert list(tmp_path.iterdir()) == []
    assert len(embed(tmp_path, clip, Grays())) == 300


@pytest.mark.parametrize(
    "name", ["image_embed.npy", "text_hidden.npy", "first.npy", "captions.json", "meta.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_noticed_and_repaired(tmp_path, clip, name, damage):
    file = embed(tmp_path, clip, Grays()).path / name
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-5])
    elif damage == "flip":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    else:
        file.unlink()
    with pytest.raises(BrokenCache):
        EmbeddingCache(file.parent, verify=True)
    again = Grays()
    assert len(embed(tmp_path, clip, again)) == 300
    assert again.drawn == 300
    assert file.read_bytes() == content


def test_a_cache_of_another_format_is_rebuilt(tmp_path, clip):
    file = embed(tmp_path, clip, Grays()).path / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))
    again = Grays()
    embed(tmp_path, clip, again)
    assert again.drawn == 300


def test_loses_a_race_gracefully(tmp_path, clip):
    """Another process finishes the same cache while this one is still at it."""

    class Racing(Grays):
        def captions(self, item):
            if item == 0 and not list(tmp_path.glob("[0-9a-f]" * 24)):
                (tmp_path / "elsewhere").mkdir()
                embed(tmp_path / "elsewhere", clip, Grays()).path.rename(
                    tmp_path / next((tmp_path / "elsewhere").iterdir()).name
                )
            return super().captions(item)

    assert len(embed(tmp_path, clip, Racing())) == 300
    assert not list(tmp_path.glob("*.partial"))


def test_is_memory_mapped_read_only_and_travels_to_workers_by_path(tmp_path, clip):
    cache = embed(tmp_path, clip, Grays())
    assert isinstance(cache.image_embed, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        cache.image_embed[0] = 0
    parcel = pickle.dumps(cache)
    assert len(parcel) < 1000
    assert torch.equal(pickle.loads(parcel).images([5, 6]), cache.images([5, 6]))
