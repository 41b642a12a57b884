"""Tokenizers: ids within bounds, the end token where it belongs, and CLIP's own ids equal to open_clip's."""

import json
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.data.tokenizers import (
    CaptionTokenizer,
    ClipBPE,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_dict,
)
from dalle.errors import UserError

CAPTIONS = [
    f"a {size} {colour} {shape} {side} a blue square"
    for size in ("small", "large")
    for colour in ("red", "green", "yellow")
    for shape in ("circle", "ring")
    for side in ("above", "to the left of")
]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, vocab_size=400, context_length="auto")


@pytest.fixture(scope="module")
def clip_bpe() -> ClipBPE:
    pytest.importorskip("open_clip")
    return ClipBPE()


def test_a_known_word_is_one_token_wherever_it_stands(tokenizer):
    first, second = tokenizer(["red circle", "circle  RED\n"])
    assert first[0] == tokenizer.start_id == 1
    assert (first != 0).sum() == 4  # start, two words, end
    assert first[1:3].tolist() == second[1:3].flip(0).tolist()
    assert first[3] == tokenizer.end_id


def test_auto_context_is_the_longest_caption_in_eights(tokenizer):
    longest = max(len(caption.split()) for caption in CAPTIONS) + 2
    assert longest == 13
    assert tokenizer.context_length == 16
    assert not any(tokenizer.too_long(caption) for caption in CAPTIONS)
    assert CaptionTokenizer.train(["word " * 500], 300, "auto").context_length == 80


def test_vocabulary_is_bounded_and_deterministic(tokenizer):
    assert tokenizer.vocab_size <= 400
    assert CaptionTokenizer.train(["aa"], 5000, 8).vocab_size < 270
    again = CaptionTokenizer.train(iter(CAPTIONS), vocab_size=400, context_length="auto")
    assert again.to_dict() == tokenizer.to_dict()


@given(st.lists(st.text(max_size=60), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_has_ids_with_one_end(captions):
    tokenizer = _shared()
    text = tokenizer(captions)
    assert text.shape == (len(captions), tokenizer.context_length)
    assert text.dtype == torch.int64
    assert (text[:, 0] == tokenizer.start_id).all()
    assert ((text == tokenizer.end_id).sum(1) == 1).all()
    for row, caption in zip(text, captions, strict=True):
        end = int(row.argmax())
        assert row[end] == tokenizer.end_id == tokenizer.vocab_size - 1
        assert (row[end + 1 :] == 0).all()
        assert (row[1:end] > 1).all()
        if tokenizer.too_long(caption):
            assert end == tokenizer.context_length - 1


_cache: list[CaptionTokenizer] = []


def _shared() -> CaptionTokenizer:
    if not _cache:
        _cache.append(CaptionTokenizer.train(CAPTIONS, 400, "auto"))
    return _cache[0]


def test_cut_captions_keep_their_start_and_an_end(tokenizer):
    long, longer = "red " * 14, "red " * 15
    assert not tokenizer.too_long(long)
    assert tokenizer.too_long(longer)
    assert torch.equal(tokenizer([long]), tokenizer([longer]))


def test_no_text_spells_a_special_token(tokenizer):
    for text in ("<pad>", "<end_of_text>", "<|endoftext|>"):
        row = tokenizer([text])[0]
        assert (row == tokenizer.end_id).sum() == 1


def test_saved_and_loaded_tokenizers_agree(tokenizer, clip_bpe, tmp_path):
    for original in (tokenizer, clip_bpe):
        save_tokenizer(original, tmp_path / "tokenizer.json")
        for copy in (
            load_tokenizer(tmp_path / "tokenizer.json"),
            tokenizer_from_dict(json.loads(json.dumps(original.to_dict()))),
            pickle.loads(pickle.dumps(original)),
        ):
            assert type(copy) is type(original)
            assert copy.vocab_size == original.vocab_size
            assert torch.equal(copy([*CAPTIONS, "Ünseen wörds ☃"]), original([*CAPTIONS, "Ünseen wörds ☃"]))


def test_clip_bpe_equals_open_clip(clip_bpe):
    import open_clip

    theirs = open_clip.get_tokenizer("ViT-B-32")
    captions = ["A Photo of a   cat!", "", "&amp; naïve café ☃", "word " * 100]
    assert torch.equal(clip_bpe(captions), theirs(captions))
    assert (clip_bpe.vocab_size, clip_bpe.start_id, clip_bpe.end_id) == (49408, 49406, 49407)
    assert [clip_bpe.too_long(c) for c in captions] == [False, False, False, True]
    assert torch.equal(ClipBPE(16)(captions), theirs(captions, context_length=16))


def test_missing_open_clip_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(UserError, match=r"pip install dalle\[open_clip\]"):
        ClipBPE()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([], 300, 8), "no captions"), ((CAPTIONS, 100, 8), "259 at least"), ((CAPTIONS, 300, 2), "no room")],
)
def test_impossible_vocabularies_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        CaptionTokenizer.train(*arguments)


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="unknown tokenizer 'words'"):
        tokenizer_from_dict({"kind": "words"})
