"""Aspect-ratio buckets: their shapes, what of a picture is kept, and batches of one shape for every rank."""

from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from made_tars import tar
from PIL import Image
from test_datamodules import ALL, TinyCLIP
from torch import nn

from dalle.data.buckets import Buckets, nearest, shapes, with_enough
from dalle.data.datamodules import (
    EmbeddingDataModule,
    ImageDataModule,
    ImageEmbeddingDataModule,
    SourceDataModule,
)
from dalle.data.folder import Folder
from dalle.data.frozen import FrozenCLIP
from dalle.data.mixture import Mixture
from dalle.data.sources import EpochSampler
from dalle.data.tokenizers import CaptionTokenizer
from dalle.data.upsampling import UpsamplingDataModule
from dalle.data.webdataset import WebDataset
from dalle.errors import UserError

UPRIGHT, SQUARE, WIDE = (16, 32), (22, 22), (32, 16)  # width and height of three kinds of pictures
EXACT = {"val_fraction": 0.0, "test_fraction": 0.0}


def ramp(width: int, height: int, k: int = 0) -> Image.Image:
    """Red grows from left to right, green from top to bottom, blue is the picture's own."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[..., 2] = k
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 wide, 8 upright and 4 square pictures; one of the wide ones is stored upright and turned by EXIF."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, (width, height) in enumerate([WIDE] * 12 + [UPRIGHT] * 8 + [SQUARE] * 4):
        picture, exif = ramp(width, height, 10 * k), Image.Exif()
        if k == 0:
            picture, exif[274] = picture.transpose(Image.Transpose.ROTATE_90), 6  # seen turned to the right
        picture.save(folder / f"{k:02d}.png", exif=exif)
        (folder / f"{k:02d}.txt").write_text(f"thing {k}")
    return folder


@pytest.mark.parametrize(
    ("size", "whole"), [(16, 4), (32, 4), (64, 8), (64, 16), (256, 8), (256, 64), (100, 4)]
)
def test_shapes_have_as_many_pixels_and_sides_that_the_network_needs(size, whole):
    found = shapes(size, whole)
    assert (size, size) in found
    assert 3 <= len(found) <= 19
    assert sorted(found) == sorted((w, h) for h, w in found)
    for height, width in found:
        assert height * width == pytest.approx(size**2, rel=0.15)
        assert max(height, width) <= 2 * min(height, width)
        assert (height, width) == (size, size) or height % whole == width % whole == 0


def test_a_picture_goes_where_least_of_it_is_lost_and_few_join_their_neighbours():
    three = [(32, 16), (22, 22), (16, 32)]
    aspects = np.array([0.1, 0.6, 0.8, 1.0, 1.3, 1.6, 1.7, 9.0])
    assert nearest(aspects, three).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert with_enough(aspects, three, 2) == three
    assert with_enough(aspects, three, 3) == [(22, 22), (16, 32)]
    assert len(with_enough(aspects, three, 8)) == 1


counts = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(lambda some: sum(some) > 8)


def numbers(counts: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@given(counts, st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_batches_of_all_ranks_are_of_one_bucket_and_as_one_process_sees_them(some, batch, world, drop, epoch):
    kinds = numbers(some)
    n = len(kinds)

    def batches(batch: int, rank: int, world: int) -> list[list[int]]:
        sampler = EpochSampler(n, batch, shuffle=True, drop_last=drop, rank=rank, world=world, buckets=kinds)
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        return [[v - epoch * n for v in items] for items in found]

    ranks = [batches(batch, rank, world) for rank in range(world)]
    assert len({tuple(map(len, found)) for found in ranks}) == 1
    alone = batches(batch * world, 0, 1)
    for together, one in zip(zip(*ranks, strict=True), alone, strict=True):
        items = [item for part in together for item in part]
        assert len(set(kinds[items])) == 1
        assert set(items) == set(one)
    seen = Counter(item for items in alone for item in items)
    assert set(seen.values()) <= {1}
    left = np.bincount(kinds[[k for k in range(n) if k not in seen]], minlength=1)
    assert left.max(initial=0) < batch * world if drop else not left.any()


def test_an_epoch_of_buckets_is_entered_anywhere_and_mixes_them():
    kinds = numbers([40, 40, 40])
    sampler = EpochSampler(120, 4, shuffle=True, drop_last=True, buckets=kinds, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    for start in (0, 7, 29, 30):
        sampler.set_epoch(2, start)
        assert list(sampler) == whole[start:]
    order = [int(kinds[items[0] % 120]) for items in whole]
    assert sum(a != b for a, b in pairwise(order)) > 10
    sampler.set_epoch(3)
    assert list(sampler) != whole


def source(folder, **more):
    return partial(Folder, root=folder, image_size=22, buckets=True, **{**EXACT, **more})


def test_whole_pictures_are_seen_in_their_shape_also_those_that_exif_turns(folder):
    train = source(folder)(split="train")
    assert train.aspects.tolist() == [2.0] * 12 + [0.5] * 8 + [1.0] * 4
    for item, shape in ((0, (16, 32)), (1, (16, 32)), (12, (32, 16))):
        (picture,) = train.oblong([item], shape).float()
        assert picture.shape == (3, *shape)
        for channel in (0, 1):  # from edge to edge
            assert picture[channel].min() < 5
            assert picture[channel].max() > 250
        assert (picture[2] == 10 * item).all()
    assert torch.equal(train.oblong([1], (16, 32)), train.oblong([1], (16, 32)))  # the second from memory
    (middle,) = train.oblong([1], (22, 22))
    assert middle[0].min() > 40  # of another shape the middle
    plain = Folder("train", folder, 22, **EXACT)
    assert train.fingerprint() == plain.fingerprint()
    assert torch.equal(train.images([0, 12]), plain.images([0, 12]))


def test_shards_know_the_shapes_of_their_pictures(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [{f.name: f.read_bytes(), f"{f.stem}.txt": b"thing"} for f in sorted(folder.glob("*.png"))]
    shard = tar(tmp_path / "0.tar", *files)
    make = partial(WebDataset, "train", str(shard), 22, **EXACT)
    for _ in range(2):  # the second time they are known
        assert make(buckets=True).aspects.tolist() == [2.0] * 12 + [0.5] * 8 + [1.0] * 4
    with pytest.raises(UserError, match="once in an epoch"):
        make(buckets=True, resample=True)


class Net(nn.Module):
    whole = 16


class SquareCLIP(TinyCLIP):
    def encode_image(self, image):
        assert image.shape[2] == image.shape[3] == 22
        return super().encode_image(F.adaptive_avg_pool2d(image, 4))


def decoder_data(folder, tmp_path, batch_size=4, **more) -> ImageEmbeddingDataModule:
    clip = FrozenCLIP(SquareCLIP(), CaptionTokenizer.train(["thing 1"], 300, 12))
    data = ImageEmbeddingDataModule(
        source(folder), clip, batch_size, tmp_path, **ALL, image_embed_norm="none", **more
    )
    data.suit(Net())
    data.prepare_data()
    data.setup("fit")
    return data


def batches(data: SourceDataModule, name: str = "train") -> list[dict]:
    return [data.on_after_batch_transfer(batch, 0) for batch in getattr(data, f"{name}_dataloader")()]


def test_a_decoder_sees_shapes_and_its_clip_squares(folder, tmp_path, capsys):
    data = decoder_data(folder, tmp_path)
    found = batches(data)
    assert "buckets, width x height (pictures): 16x32 (8), 22x22 (4), 32x16 (12)" in capsys.readouterr().out
    shapes = Counter(tuple(batch["image"].shape[2:]) for batch in found)
    assert shapes == {(16, 32): 3, (32, 16): 2, (22, 22): 1}
    assert data.describe()["buckets"] == [(32, 16), (22, 22), (16, 32)]
    fresh = batches(decoder_data(folder, tmp_path, cache_items=0))  # embedded batch by batch
    for kept, made in zip(found, fresh, strict=True):
        assert torch.equal(kept["image"], made["image"])
        assert "square" not in made
        torch.testing.assert_close(kept["image_embed"], made["image_embed"])
    squares = data.split("train").images(found[0]["index"].tolist())
    torch.testing.assert_close(data.clip.embed_image(squares), found[0]["image_embed"])


def test_validation_is_in_the_shapes_of_training_and_tests_draw_squares(folder, tmp_path):
    data = decoder_data(folder, tmp_path)
    data._splits["val"] = data._splits["test"] = data.split("train")
    data._caches["val"] = data._caches["train"]
    seen = [tuple(batch["image"].shape[2:]) for batch in batches(data, "val")]
    assert set(seen) == {(16, 32), (32, 16), (22, 22)}
    assert {tuple(batch["image"].shape[2:]) for batch in batches(data, "test")} == {(22, 22)}


def test_shapes_with_less_than_a_batch_join_their_neighbours(folder, tmp_path, capsys):
    data = decoder_data(folder, tmp_path, batch_size=8)
    found = batches(data)
    assert "1 shapes with less than a batch are joined to their neighbours" in capsys.readouterr().out
    assert (22, 22) not in {tuple(batch["image"].shape[2:]) for batch in found}
    assert sum(data._buckets["train", 1].told(24).count(n) for n in ("(12)", "(16)", "(8)")) == 2


def test_an_upsampler_sees_crops_of_the_same_share_of_each_side(folder):
    data = UpsamplingDataModule(source(folder, fit="squash"), 4, factor=2, crop=12 / 22, **ALL)
    data.suit(Net())
    shapes = {(tuple(b["image"].shape[2:]), tuple(b["low"].shape[2:])) for b in batches(data)}
    assert shapes == {((8, 18), (4, 9)), ((18, 8), (9, 4)), ((12, 12), (6, 6))}


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda f: ImageDataModule(source(f), 4, **ALL).split("val"), "network reads squares; buckets are"),
        (lambda f: UpsamplingDataModule(source(f), 4, **ALL).suit(nn.Identity()), "Identity draws squares"),
        (lambda f: source(f, crop="random")(split="train"), "data.crop=random cuts squares"),
        (lambda f: Mixture("train", {"a": source(f)}, 22), "places of a mixture are shared out one by one"),
    ],
)  # fmt: skip
def test_what_needs_squares_says_so(folder, make, line):
    with pytest.raises(UserError, match=line):
        make(folder)


def test_a_prior_sees_what_clip_sees(folder, tmp_path, capsys):
    clip = FrozenCLIP(SquareCLIP(), CaptionTokenizer.train(["thing 1"], 300, 12))
    EmbeddingDataModule(source(folder), clip, 4, tmp_path, **ALL).split("train")
    assert "CLIP sees squares, so this stage does" in capsys.readouterr().out


def test_numbers_of_buckets_are_told():
    assert Buckets([(8, 4), (4, 8)], np.array([0, 1, 1, 0])).told(3) == "4x8 (1), 8x4 (2)"
