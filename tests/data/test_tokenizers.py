"""Tokenizers: ids within bounds, the end token where it belongs, and CLIP's own ids equal to open_clip's."""

import json
import pickle
import random
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


def test_a_caption_that_is_a_book_is_learned_from_its_beginning():
    """Time grows with the square of the longest word: 200,000 letters without a space took minutes."""
    beginning = "x" * 10_000
    short, long = (CaptionTokenizer.train([c], 400, 16) for c in (beginning, beginning + " zebra" * 1000))
    assert short.bpe.get_vocab() == long.bpe.get_vocab()


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


WRITTEN = ["a small red circle above a blue square", "a Large  Green ring", "größer: 一只猫 😀!", "a"]


@pytest.fixture(scope="module")
def trained():
    return CaptionTokenizer.train(WRITTEN * 2, vocab_size=320, context_length=80)


def test_dropout_that_drops_nothing_is_the_bpe(trained):
    """Our own merging, with a share too small to matter, gives what the `tokenizers` package gives."""
    assert torch.equal(trained(WRITTEN, dropout=1e-12, seeds=range(4)), trained(WRITTEN))


def test_dropout_of_everything_leaves_the_bytes(trained):
    text = trained(["a small ring"], dropout=1.0, seeds=[0])
    assert (text > 0).sum() == 2 + len(" a small ring")


def test_dropout_writes_the_same_caption_in_other_tokens(trained):
    rows = {tuple(trained(WRITTEN[:1], dropout=0.3, seeds=[seed])[0].tolist()) for seed in range(20)}
    assert len(rows) > 10
    words = {trained.bpe.decode([i - 2 for i in row if i not in (0, 1, trained.end_id)]) for row in rows}
    assert len({"".join(text.split()) for text in words}) == 1
    again = trained(WRITTEN[:1], dropout=0.3, seeds=[7])
    assert torch.equal(again, trained(WRITTEN[:1], dropout=0.3, seeds=[7]))


def test_the_share_of_merges_left_out_is_as_asked(trained):
    """A word of two letters with one merge is split in as many cases as asked for."""
    bpe = CaptionTokenizer.train(["ab ab"], vocab_size=261, context_length=12)
    split = sum(len(bpe._split("ab", 0.3, random.Random(seed))) > 1 for seed in range(2000)) / 2000
    # " ab" takes two merges; it stays whole when neither is left out the moment it could be made
    assert split == pytest.approx(1 - 0.7**2, abs=0.04)


def test_a_caption_that_dropout_makes_too_long_is_taken_whole(trained):
    room = CaptionTokenizer(trained.bpe, int((trained(WRITTEN[:1]) > 0).sum()))
    for seed in range(10):
        assert torch.equal(room(WRITTEN[:1], dropout=0.9, seeds=[seed]), room(WRITTEN[:1]))
