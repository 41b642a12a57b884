"""DALL-E's pipeline around fakes: noise of each picture's own, candidates, completion, progress."""

import logging

import pytest
import torch
from torch import nn

from dalle.data.frozen import FrozenTokenizer
from dalle.errors import UserError
from dalle.pipelines.dalle import DallePipeline

GRID, K, CELL = 4, 6, 2
N = GRID**2


class WordTokenizer:
    vocab_size, context_length, pad_id, start_id, end_id = 100, 8, 0, 1, 99

    def too_long(self, caption):
        return len(caption.split()) + 2 > self.context_length

    def __call__(self, captions):
        words = [[len(word) for word in caption.split()][:6] for caption in captions]
        return torch.tensor([[1, *some, 99] + [0] * (6 - len(some)) for some in words])

    to_dict = __call__


class Cells(nn.Module):
    """A code is a gray level: K of them from black to white, one for each cell."""

    image_size, vocab_size, grid = GRID * CELL, K, GRID

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, image):
        cells = image[:, 0, ::CELL, ::CELL].flatten(1)
        return ((cells + 1) / 2 * (K - 1)).round().long()

    def decode(self, codes):
        gray = codes.view(-1, 1, GRID, GRID).float() / (K - 1) * 2 - 1
        return gray.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3).expand(-1, 3, -1, -1).clone()


class FakeDalle(nn.Module):
    """Codes are noise alone; keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def sample(self, batch, randn, prefix=None, known=None, on_step=None, **options):
        self.calls.append((batch, prefix, options, torch.is_autocast_enabled("cpu")))
        codes = torch.zeros(len(batch["text"]), N, dtype=torch.int64)
        if known is not None:
            drawn = randn(torch.empty(len(codes), N, K)).argmax(2)
            return torch.where(known < 0, drawn, known)
        given = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            codes[:, :given] = prefix
        for i in range(given, N):
            codes[:, i] = randn(torch.empty(len(codes), K)).argmax(1)
            if on_step is not None:
                on_step(i + 1, codes)
        return codes


class FakeCLIP(nn.Module):
    """Likes pictures as light as the caption is long: both are an angle."""

    embed_dim = 2

    def angle(self, x):
        return torch.stack((torch.cos(x), torch.sin(x)), 1)

    def embed_image(self, image):
        return self.angle(image.mean((1, 2, 3)))

    def embed_captions(self, captions):
        return {"text_embed": self.angle(torch.tensor([float(len(c)) for c in captions]))}


CAPTIONS = ["", "a red ring", "a"]


def pipeline(clip=None):
    return DallePipeline(FakeDalle(), FrozenTokenizer(Cells()), WordTokenizer(), clip)


def test_shape_and_order():
    images = pipeline().sample(CAPTIONS, n=2)
    assert images.shape == (6, 3, GRID * CELL, GRID * CELL)
    assert images.unique(dim=0).shape == images.shape
    made = pipeline()
    made.sample(CAPTIONS, n=2, batch_size=4)
    assert [batch["caption"] for batch, *_ in made.dalle.calls] == [
        ["", "", "a red ring", "a red ring"],
        ["a", "a"],
    ]
    assert torch.equal(made.dalle.calls[1][0]["text"], WordTokenizer()(["a", "a"]))


def test_pictures_do_not_depend_on_the_batch_nor_on_the_company():
    whole = pipeline().sample(CAPTIONS, n=3, seed=5, batch_size=100)
    for batch_size in (1, 2, 4):
        assert torch.equal(pipeline().sample(CAPTIONS, n=3, seed=5, batch_size=batch_size), whole)
    fewer = pipeline().sample(CAPTIONS[:2], n=2, seed=5).unflatten(0, (2, 2))
    assert torch.equal(fewer, whole.unflatten(0, (3, 3))[:2, :2])
    assert not torch.equal(pipeline().sample(CAPTIONS, n=3, seed=6), whole)


def test_of_candidates_the_one_that_clip_finds_nearest_is_kept():
    clip = FakeCLIP()
    one = pipeline().sample(CAPTIONS, n=2)
    best = pipeline(clip).sample(CAPTIONS, n=2, candidates=8, batch_size=5)
    assert best.shape == one.shape
    said = [caption for caption in CAPTIONS for _ in range(2)]
    scores = [torch.tensor(pipeline(clip).scores(images, said)) for images in (one, best)]
    assert (scores[1] >= scores[0]).all()  # the one is the first of the eight
    assert (scores[1] > scores[0]).any()
    assert torch.equal(pipeline(clip).sample(CAPTIONS, n=2, candidates=1), one)


def test_candidates_ask_for_a_clip():
    with pytest.raises(UserError, match=r"candidates=2 need a CLIP that chooses among them"):
        pipeline().sample(CAPTIONS, candidates=2)


def test_first_rows_are_kept():
    made = pipeline()
    picture = made.sample(["a"], seed=3)
    prefix = made.init_codes(picture, 2)
    assert prefix == made.image_tokenizer.encode(picture)[0, : 2 * GRID].tolist()
    images = made.sample(CAPTIONS, n=2, prefix=prefix)
    top = 2 * CELL
    assert torch.equal(images[:, :, :top], picture[:, :, :top].expand(6, -1, -1, -1))
    assert images[:, :, top:].unique(dim=0).shape[0] == 6
    assert len(made.init_codes(picture)) == 2 * GRID  # 7 of 16, rounded


@pytest.mark.parametrize("rows", [0, GRID, -1])
def test_rows_that_leave_nothing_to_keep_or_to_draw(rows):
    with pytest.raises(UserError, match=rf"init_rows={rows}: a picture has 4 rows of codes; give 1 to 3"):
        pipeline().init_codes(torch.zeros(1, 3, 8, 8), rows)


def test_frames_show_a_picture_as_it_comes_about():
    frames = pipeline().frames(CAPTIONS, n=2, seed=1, batch_size=4, frames=4)
    final = pipeline().sample(CAPTIONS, n=2, seed=1)
    assert frames.shape == (6, 4, *final.shape[1:])
    for quarter in range(1, 5):
        done = quarter * CELL
        assert torch.equal(frames[:, quarter - 1, :, :done], final[:, :, :done])
        assert (frames[:, quarter - 1, :, done:] == 0).all()


def test_frames_of_a_picture_that_is_completed_are_of_what_is_drawn():
    frames = pipeline().frames(["a"], prefix=[1] * GRID * 2, frames=4)
    assert frames.shape[1] == 2  # two rows are left
    assert (frames[:, 0, :, 3 * CELL :] == 0).all()
    assert (frames[:, 0, :, : 3 * CELL] != 0).any()


def test_frames_belong_to_the_candidate_that_is_kept():
    frames = pipeline(FakeCLIP()).frames(CAPTIONS, candidates=5, frames=2)
    half = GRID * CELL // 2
    assert torch.equal(frames[:, 0, :, :half], frames[:, 1, :, :half])


def test_stage_settings_and_precision_are_handed_on():
    made = pipeline()
    made.sample(CAPTIONS, precision="bf16", dalle={"top_k": 3})
    made.sample(CAPTIONS, dalle={"temperature": 0.5})
    assert [(options, autocast) for *_, options, autocast in made.dalle.calls] == [
        ({"top_k": 3}, True),
        ({"temperature": 0.5}, False),
    ]


def test_no_prompt_and_impossible_numbers_are_user_errors():
    with pytest.raises(UserError, match="no prompt"):
        pipeline().sample([])
    with pytest.raises(UserError, match=r"at least 1, not 0, 16 and 1"):
        pipeline().sample(CAPTIONS, n=0)


def test_long_prompts_are_cut_with_one_warning_that_counts(caplog):
    long = "one two three four five six seven eight nine ten"
    with caplog.at_level(logging.WARNING):
        images = pipeline().sample([long, "short", long])
    assert len(images) == 3
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 3 prompts are longer than the 8 tokens that the transformer reads and were cut"
    ]
