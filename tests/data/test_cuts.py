"""Captions that are cut are counted once, whichever stage reads them."""

import warnings

import pytest

from dalle.data.datamodules import TextImageDataModule
from dalle.data.shapes import Shapes
from dalle.data.tokenizers import CaptionTokenizer


def data(context_length):
    def source(split):
        return Shapes(split, 16, size=40)

    def tokenizer(captions):
        return CaptionTokenizer.train(captions, 300, context_length)

    return TextImageDataModule(
        source, tokenizer, batch_size=8, val_items=None, test_items=None, train_items=None
    )


def test_cut_captions_are_counted_with_their_share():
    with pytest.warns(UserWarning, match=r"^40 of 40 captions .* the 4 tokens .*\(100%\); tokenizer.context"):
        data(4).prepare_data()


def test_nothing_is_said_where_nothing_is_cut():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data("auto").prepare_data()
