"""Stages that were not made for each other are refused, in one line that says why: trained or imported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import untrained

from dalle.errors import UserError
from dalle.pipelines.load import load_dalle, load_gan, load_prior, load_unclip, with_upsamplers

OTHER = "0123456789abcdef"  # the hash of what nobody has


@pytest.fixture
def logs(untrained_stages, tmp_path) -> Path:
    """Stages that do fit together, and may be changed."""
    return Path(shutil.copytree(untrained_stages / "default", tmp_path / "logs"))


def say(run: Path, key: str, value) -> None:
    """Has a run's manifest say something else: ``clip.weights``."""
    place = run / "manifest.json"
    manifest = json.loads(place.read_text())
    *outer, last = key.split(".")
    inner = manifest
    for name in outer:
        inner = inner[name]
    inner[last] = value
    place.write_text(json.dumps(manifest))


def unclip(logs: Path, prior: str = "prior") -> Callable:
    return lambda: load_unclip(logs / "decoder", logs / prior)


def line(load: Callable) -> str:
    with pytest.raises(UserError) as refusal:
        load()
    (said,) = str(refusal.value).split("\n")
    return said


@pytest.mark.parametrize("prior", ["prior", "ar_prior"])
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("clip.weights", OTHER, "the CLIP (hash of its weights) is"),
        ("clip.embed_dim", 768, "the embedding dimension is"),
        ("tokenizer.hash", OTHER, "the tokenizer is"),
    ],
)
def test_a_prior_of_another_clip(logs, prior, key, value, reason):
    unclip(logs, prior)()
    say(logs / prior, key, value)
    said = line(unclip(logs, prior))
    assert said.startswith(f"decoder and prior do not fit together: {reason}")
    assert said.endswith("give the one they were trained with, or train prior again")


@pytest.mark.parametrize(("prior", "decoder"), [("unit", "none"), ("unit_times_sqrt_dim", "none")])
def test_a_prior_whose_embeddings_have_no_length(logs, prior, decoder):
    """As LAION's prior with Karlo's decoder, which reads raw embeddings."""
    say(logs / "prior", "image_embed_norm", {"kind": prior})
    say(logs / "decoder", "image_embed_norm", {"kind": decoder})
    assert f"(image_embed_norm={prior}) have lost the length that the decoder's" in line(unclip(logs))


def test_norms_that_can_be_turned_into_each_other(logs):
    """As Karlo's prior with its decoder, or with one of unit embeddings."""
    say(logs / "prior", "image_embed_norm", {"kind": "none"})
    say(logs / "decoder", "image_embed_norm", {"kind": "unit"})
    assert not unclip(logs)().pipeline.same_norm


def test_a_norm_of_other_embeddings(logs):
    say(logs / "prior", "image_embed_norm", {"kind": "standardized", "mean": [0.0], "std": [1.0]})
    assert "manifest.json is damaged (image_embed_norm)" in line(unclip(logs))


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_another_clip_than_it_was_trained_with(logs, tmp_path, stage):
    other = untrained("clip", tmp_path / "other", seed=5).path
    load = {"prior": lambda: load_prior(logs / "prior", other),
            "decoder": lambda: load_unclip(logs / "decoder", None, other)}[stage]  # fmt: skip
    assert line(load).startswith(f"clip and {stage} do not fit together: the CLIP (hash of its weights)")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda logs: load_unclip(logs / "prior"), "holds a prior, but a decoder is needed here"),
        (lambda logs: load_unclip(logs / "decoder", logs / "dalle"), "but a prior or ar_prior is needed"),
        (lambda logs: load_unclip(logs / "decoder", None, logs / "dvae"), "but a clip is needed here"),
        (lambda logs: load_dalle(logs / "dalle", logs / "clip"), "but a dvae or vqgan is needed here"),
        (lambda logs: load_dalle(logs / "dvae"), "holds a dvae, but a dalle is needed here"),
        (lambda logs: load_gan(logs / "decoder"), "holds a decoder, but a gan is needed here"),
        (lambda logs: with_upsamplers(load_unclip(logs / "decoder"), {"upsampler": logs / "decoder"}),
         "holds a decoder, but an upsampler is needed here"),
    ],
)  # fmt: skip
def test_a_stage_of_another_kind(logs, given, reason):
    assert reason in line(lambda: given(logs))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("image_tokenizer.weights", OTHER, "the image tokenizer (hash of its weights) is"),
        ("image_tokenizer.vocab_size", 8192, "the image tokenizer's vocabulary is 32 in dvae, but 8192"),
        ("image_tokenizer.grid", 16, "the image tokenizer's grid is"),
        ("tokenizer.hash", OTHER, "tokenizer.json is another one than the DALL-E was trained with"),
    ],
)
def test_a_transformer_of_other_codes_or_ids(logs, key, value, reason):
    say(logs / "dalle", key, value)
    assert reason in line(lambda: load_dalle(logs / "dalle"))


def test_an_upsampler_of_another_size(logs, tmp_path):
    """Which sizes it takes is in its network: 16 px here come from 8."""
    upsampler = untrained("upsampler", tmp_path / "other").path
    loaded = load_unclip(logs / "decoder")
    drawn = loaded.pipeline.image_size
    said = line(lambda: with_upsamplers(loaded, {"upsampler": upsampler}))
    assert said.startswith("upsampler enlarges pictures of")
    assert f"but what comes before it draws {drawn} px" in said
