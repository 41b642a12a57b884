import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dalle.data.embed_norm import EmbedNorm
from dalle.data.tokenizers import CaptionTokenizer
from dalle.errors import UserError
from dalle.pipelines.load import check_fit
from dalle.pipelines.unclip import UnCLIP

E = 4
UNIT, SQRT = EmbedNorm("unit"), EmbedNorm("unit_times_sqrt_dim")
STANDARD = EmbedNorm("standardized", torch.full((E,), 0.5), torch.full((E,), 2.0))


class WordTokenizer:
    vocab_size, context_length, pad_id, start_id, end_id = 100, 8, 0, 1, 99

    def too_long(self, caption):
        return len(caption.split()) + 2 > 8

    def __call__(self, captions):
        raise NotImplementedError  # the fake CLIP below reads captions itself

    to_dict = __call__


class FakeCLIP(nn.Module):
    """A caption's embedding depends on its letters only."""

    tokenizer, context_length = WordTokenizer(), 8

    def embed_captions(self, captions):
        text = torch.tensor([[len(c), c.count("a"), c.count("e"), 1] for c in captions])
        hidden = text.float()[:, :, None].expand(-1, -1, 3).clone()
        mask = torch.ones(len(text), 4, dtype=torch.bool)
        return {"text": text, "text_embed": text.float(), "text_hidden": hidden, "text_mask": mask}


class FakePrior(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.calls = norm, []

    def sample(self, batch, sampler=None, guidance=None, candidates=None, randn=torch.randn_like):
        self.calls.append({"guidance": guidance, "candidates": candidates})
        for _ in range(candidates or 1):  # each candidate draws from the same streams
            noise = randn(torch.empty_like(batch["text_embed"]))
        return self.norm.encode(batch["text_embed"] + noise)


class FakeDecoder(nn.Module):
    """The channels of a picture show its image embedding, its caption, its noise."""

    def __init__(self):
        super().__init__()
        self.weight, self.batches = nn.Parameter(torch.ones(())), []

    def sample(self, batch, sampler=None, guidance=None, text_guidance=None, randn=torch.randn_like):
        self.batches.append((batch, torch.is_autocast_enabled("cpu"), guidance))
        shown = batch.get("image_embed", torch.zeros_like(batch["text_embed"]))
        noise = randn(torch.empty(len(shown), E))
        channels = torch.stack([shown, batch["text_embed"] / 50, noise], 1)
        return (channels * self.weight).view(-1, 3, 2, 2) / 10


def pipeline(prior_norm=UNIT, decoder_norm=UNIT, prior=True):
    return UnCLIP(
        FakeCLIP(), FakePrior(prior_norm) if prior else None, FakeDecoder(), prior_norm, decoder_norm
    )


CAPTIONS = ["a red circle", "a blue square", "rings"]


def test_shape_order_and_range():
    images = pipeline().sample(CAPTIONS, n=2)
    assert images.shape == (6, 3, 2, 2)
    assert images.abs().max() <= 1
    lengths = (images[:, 1, 0, 0] * 10 * 50).round().tolist()
    assert lengths == [12, 12, 13, 13, 5, 5]  # pictures of one caption are adjacent
    assert not torch.equal(images[0, 2], images[1, 2])


def test_images_do_not_depend_on_the_batch_size():
    whole = pipeline().sample(CAPTIONS, n=3, seed=5, batch_size=100)
    for batch_size in (1, 2, 4):
        torch.testing.assert_close(pipeline().sample(CAPTIONS, n=3, seed=5, batch_size=batch_size), whole)


def test_image_j_of_prompt_i_is_the_same_alone_and_in_company():
    many = pipeline().sample(CAPTIONS, n=3, seed=5).unflatten(0, (3, 3))
    fewer = pipeline().sample(CAPTIONS[:2], n=2, seed=5).unflatten(0, (2, 2))
    torch.testing.assert_close(fewer, many[:2, :2])


def test_seeds_matter_and_repeat():
    first = pipeline().sample(CAPTIONS, seed=1)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(pipeline().sample(CAPTIONS, seed=1), first)
    assert not torch.equal(pipeline().sample(CAPTIONS, seed=2)[:, 2], first[:, 2])


def test_the_decoders_noise_does_not_depend_on_the_priors():
    one, four = (pipeline().sample(CAPTIONS, prior={"candidates": k}) for k in (1, 4))
    assert not torch.equal(one[:, 0], four[:, 0])
    assert torch.equal(one[:, 2], four[:, 2])


def test_without_a_prior_the_decoder_gets_no_image_embedding():
    unclip = pipeline(prior=False)
    unclip.sample(CAPTIONS)
    (batch, _, _), *_ = unclip.decoder.batches
    assert "image_embed" not in batch
    assert {"text_embed", "text_hidden", "text_mask", "caption"} <= batch.keys()


@pytest.mark.parametrize(
    ("prior_norm", "decoder_norm"),
    [(UNIT, SQRT), (SQRT, UNIT), (STANDARD, UNIT), (STANDARD, EmbedNorm("none"))],
)
def test_embeddings_are_carried_over_to_the_decoders_normalisation(prior_norm, decoder_norm):
    unclip = pipeline(prior_norm, decoder_norm)
    unclip.sample(["a red circle"])
    given = unclip.decoder.batches[0][0]["image_embed"]
    straight = pipeline(EmbedNorm("none"), decoder_norm)  # the same embedding, normalised once
    straight.sample(["a red circle"])
    torch.testing.assert_close(given, straight.decoder.batches[0][0]["image_embed"])


def test_stage_settings_and_precision_are_handed_on():
    unclip = pipeline()
    settings = {"prior": {"guidance": 3.0}, "decoder": {"guidance": 4.0}}
    unclip.sample(CAPTIONS, precision="bf16", **settings)
    unclip.sample(CAPTIONS, **settings)
    assert unclip.prior.calls[0]["guidance"] == 3
    assert [(autocast, guidance) for _, autocast, guidance in unclip.decoder.batches] == [
        (True, 4),
        (False, 4),
    ]


def test_no_prompt_and_impossible_numbers_are_user_errors():
    with pytest.raises(UserError, match="no prompt"):
        pipeline().sample([])
    with pytest.raises(UserError, match="at least 1, not 0 and 16"):
        pipeline().sample(CAPTIONS, n=0)


def test_a_prompt_in_letters_that_the_tokenizer_has_not_seen_says_so():
    tokenizer = CaptionTokenizer.train(["a red circle on a branch at dusk"], 400, 24)
    clip = SimpleNamespace(context_length=24)
    said = UnCLIP._too_long(SimpleNamespace(tokenizer=tokenizer, clip=clip), "красный круг на синем фоне")
    assert "fall to bytes; train CLIP on captions that have them" in said
    assert "bytes" not in UnCLIP._too_long(SimpleNamespace(tokenizer=tokenizer, clip=clip), "a red " * 30)


def test_a_long_prompt_is_refused_or_cut_with_one_warning(caplog):
    long = "one two three four five six seven eight nine ten"
    unclip = pipeline()
    with pytest.raises(
        UserError, match=r"'one two .*ten' is too long: .* 8 tokens .* first 6 of its 10 words"
    ):
        unclip.sample(["short", long])
    assert not unclip.decoder.batches
    with caplog.at_level(logging.WARNING):
        unclip.sample([long, "short", long], truncate=True)
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 3 prompts are longer than the 8 tokens that CLIP reads and were cut"
    ]


def test_unit_embeddings_do_not_fit_a_decoder_of_raw_ones():
    with pytest.raises(UserError, match=r"prior and decoder.*image_embed_norm=unit.*standardized"):
        pipeline(UNIT, STANDARD)


def manifest(clip="c1", embed_dim=64, tokenizer="t1", norm="unit"):
    return {
        "weights": "own",
        "clip": {"weights": clip, "embed_dim": embed_dim},
        "tokenizer": {"hash": tokenizer},
        "image_embed_norm": {"kind": norm},
    }


CLIP = {"clip": {"weights": "c1"}, "tokenizer": {"hash": "t1"}}


@pytest.mark.parametrize(
    "manifests", [{}, {"clip": CLIP}, {"clip": CLIP, "prior": manifest(), "decoder": manifest()}]
)
def test_stages_of_one_clip_fit(manifests):
    check_fit(manifests)


@pytest.mark.parametrize(
    ("manifests", "message"),
    [
        (
            {"clip": CLIP, "prior": manifest("c2"), "decoder": manifest()},
            "clip and prior .*c1 in clip, but c2 in prior",
        ),
        ({"clip": CLIP, "prior": manifest(), "decoder": manifest("c2")}, "clip and decoder"),
        ({"prior": manifest("c1"), "decoder": manifest("c2")}, "prior and decoder .*hash of its weights"),
        (
            {"prior": manifest(), "decoder": manifest(embed_dim=32)},
            "embedding dimension is 64 in prior, but 32",
        ),
        (
            {"clip": CLIP, "decoder": manifest(tokenizer="t2")},
            "the tokenizer is t1 in clip, but t2 in decoder",
        ),
        ({"prior": manifest(), "decoder": manifest(norm="none")}, "have lost the length"),
    ],
)
def test_stages_that_do_not_fit_are_named(manifests, message):
    with pytest.raises(UserError, match=message):
        check_fit(manifests)
