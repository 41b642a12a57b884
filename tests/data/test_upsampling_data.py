"""Batches of an upsampler: crops in training, whole pictures else, each with its own small picture."""

from functools import partial

import pytest
import torch

from dalle.data.degradations import shrunk
from dalle.data.shapes import Shapes
from dalle.data.upsampling import UpsamplingDataModule
from dalle.errors import UserError

SOURCE = partial(Shapes, image_size=32, size=64)


def make(**options) -> UpsamplingDataModule:
    items = {"val_items": 8, "test_items": 8, "train_items": None}
    return UpsamplingDataModule(SOURCE, batch_size=8, **items, **{"degradation": "none", **options})


def test_training_sees_crops_and_their_small_pictures():
    data = make(crop=0.25)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 8, 8)
    torch.testing.assert_close(batch["low"], shrunk(batch["image"], 2))
    whole = data.split("train").images(batch["index"].tolist())
    for crop, image in zip(batch["image"], whole, strict=True):
        places = image.unfold(1, 8, 2).unfold(2, 8, 2)  # at pixels of the small picture
        assert (places == crop[:, None, None]).flatten(3).all(3).all(0).any()


def test_validation_and_test_see_whole_pictures_that_nothing_has_spoilt():
    data = make(crop=0.25, degradation="bsr")
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch["image"].shape == (8, 3, 32, 32)
        torch.testing.assert_close(batch["low"], shrunk(batch["image"], 2))


def test_a_crop_is_a_function_of_seed_epoch_and_item():
    data = make(crop=0.5, degradation="bsr")
    dataset, n = data.dataset("train"), len(data.split("train"))
    together, alone = dataset.__getitems__([3, 5]), dataset.__getitems__([5])
    assert torch.equal(together["low"][1], alone["low"][0])
    assert torch.equal(together["image"][1], alone["image"][0])
    for other in (dataset.__getitems__([n + 5]), make(crop=0.5, seed=1).dataset("train").__getitems__([5])):
        assert not torch.equal(other["image"], alone["image"])


def test_facts():
    data = make(factor=4, crop=0.5)
    assert data.sizes == {"image_size": 32, "factor": 4}
    assert data.describe()["factor"] == 4


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"factor": 1}, "factor=1 makes no small pictures of 32 px"),
        ({"factor": 5}, "factor=5 makes no small pictures of 32 px"),
        ({"factor": 4, "crop": 0.2}, "crop=0.2 of 32 px is 6 px, which datamodule.factor=4 must divide"),
        ({"factor": 4, "crop": 0.125}, "crop=0.125 of 32 px is 4 px"),
    ],
)
def test_what_does_not_fit(options, line):
    with pytest.raises(UserError, match=line):
        make(**options).train_dataloader()
