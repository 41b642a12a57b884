"""The papers' sizes fit each other as ladders, on the meta device: nothing is computed."""

from typing import Any

import pytest
import torch
from test_conf import config_of

from dalle.cli import train
from dalle.data.frozen import FrozenCLIP, FrozenTokenizer
from dalle.data.tokenizers import ClipBPE
from dalle.instantiate import instantiate
from dalle.stages.base import Stage
from dalle.training.fit import fill_sizes
from dalle.training.preflight import count

# CLIP has the parameters of the released ViT-B/32, the dVAE those of encoder and decoder as released.
# Table 3 of Ramesh et al. 2022: 1B for the prior, 3.5B for a decoder with a text transformer, absent here.
# "1B" for the autoregressive prior, whose own text encoder of 2048 x 24 is absent here, too.
PRIOR, AR_PRIOR, DECODER = 1_221_524_992, 805_576_704, 2_249_628_166
KEPT = "datamodule.dims=319"  # of 1024 in the paper
# those of DALL-E are worked out in tests/nets/test_dalle.py
# There: 700M and 300M for the upsamplers.
UPSAMPLERS = {"upsampler_64_256_paper": 731_693_123, "upsampler_256_1024_paper": 282_759_171}
DALLE = {"dalle_paper": 12_293_824_256, "dalle_1b": 1_310_183_424}


def made(name: str, *overrides: str, sizes: dict[str, Any] | None = None, **upstream: Any) -> Stage:
    """The stage of a preset on shapes, with the sizes that its DataModule says."""
    config = config_of(f"model={name}", "data.size=100", *overrides)
    datamodule = instantiate(config["datamodule"], "datamodule", **upstream)
    fill_sizes(config, {**datamodule.sizes, **(sizes or {})})
    assert "auto" not in config["model"]["net"].values()
    with torch.device("meta"):
        return instantiate(config["model"], "model")


@pytest.fixture(scope="module")
def tokenizer() -> ClipBPE:
    pytest.importorskip("open_clip")
    return ClipBPE(77)


@pytest.fixture(scope="module")
def clip(tokenizer) -> FrozenCLIP:
    stage = made("clip_paper", tokenizer=tokenizer)
    assert count(stage.net) == 151_277_313
    return FrozenCLIP(stage.net, tokenizer)


@pytest.fixture(scope="module")
def dvae() -> FrozenTokenizer:
    stage = made("dvae_paper")
    assert count(stage.net) == 53_786_240 + 43_829_766
    return FrozenTokenizer(stage.net)


@pytest.mark.parametrize(
    ("name", "size", "more"),
    [("prior_paper", PRIOR, ()), ("ar_prior_paper", AR_PRIOR, (KEPT,)), ("decoder_paper", DECODER, ())],
)
def test_priors_and_decoder_stand_on_clip(clip, name, size, more):
    stage = made(name, *more, clip=clip)
    assert (stage.net.embed_dim, stage.net.text_width) == (clip.embed_dim, clip.text_width) == (512, 512)
    assert count(stage.net) == size


@pytest.mark.parametrize("name", DALLE)
def test_dalle_stands_on_the_dvae(dvae, name):
    """With captions enough for the paper's vocabulary it has the paper's size, with few it has fewer ids."""
    assert count(made(name, image_tokenizer=dvae, sizes={"text_vocab": 16384}).net) == DALLE[name]
    small = made(name, image_tokenizer=dvae)
    assert small.net.text_vocab < 1000
    assert (small.net.grid, small.net.image_vocab) == (32, 8192)
    assert small.net.text_length == (256 if name == "dalle_paper" else 128)


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_upsamplers_have_the_papers_size_and_crops(name):
    """Table 3: 64 px of 256 and 256 px of 1024; DDIM of 27 and 15 steps; cosine, linear; no attention."""
    config = config_of(f"model={name}")
    stage: Any = made(name)
    assert count(stage.net) == UPSAMPLERS[name]
    assert abs(count(stage.net) / (7e8 if "256_paper" in name else 3e8) - 1) < 0.06
    assert stage.net.factor == 4
    assert stage.net.image_size // 4 == stage.low_size
    assert instantiate(config["datamodule"], "datamodule").side == stage.net.image_size // 4
    steps, schedule = (27, "cosine") if "256_paper" in name else (15, "linear")
    assert (stage.sampler.method, stage.sampler.steps, stage.denoiser.schedule.name) == (
        "ddim", steps, schedule,
    )  # fmt: skip
    assert not [key for key in stage.net.state_dict() if "attention" in key]


def test_the_decoder_samples_as_in_the_paper(clip):
    """Table 3: 250 steps, ancestral, with the variance that it learns."""
    stage: Any = made("decoder_paper", clip=clip)
    assert (stage.sampler.method, stage.sampler.steps) == ("ddpm", 250)
    assert stage.sampler.options == {"variance": "auto"}
    assert stage.denoiser.learned_variance


@pytest.mark.parametrize(
    "name",
    [
        "clip_paper",
        "dvae_paper",
        "prior_paper",
        "ar_prior_paper",
        "decoder_paper",
        "dalle_paper",
        *UPSAMPLERS,
    ],
)
def test_clipping_and_averages_are_the_papers(name):
    config = config_of(f"model={name}")
    clip = {"dalle_paper": 4.0}.get(name)
    decay = {"dvae_paper": 0.999, "prior_paper": 0.9999, "decoder_paper": 0.9999, "dalle_paper": 0.9996}
    decay |= {"ar_prior_paper": 0.999, **dict.fromkeys(UPSAMPLERS, 0.9999)}
    assert config["trainer"]["gradient_clip_val"] == clip
    assert (config["callbacks"]["ema"] or {}).get("decay") == decay.get(name)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp", "heun"])
@pytest.mark.parametrize("name", ["prior_paper", "decoder_paper", *UPSAMPLERS])
def test_any_sampler_goes_with_them(name, sampler):
    assert (
        instantiate(config_of(f"model={name}", f"sampler={sampler}")["sampler"], "sampler").method == sampler
    )


def test_what_is_missing_is_trained_at_the_papers_size():
    assert train.model_for("clip", ["model=prior_paper", "name=x"]) == "clip_paper"
    assert train.model_for("clip", ["model=ar_prior_paper"]) == "clip_paper"
    assert train.model_for("dvae", ["model=dalle_1b"]) == "dvae_paper"
    assert train.model_for("vqgan", ["model=dalle_paper"]) == "vqgan"  # there is none of a paper's size
    assert train.model_for("clip", ["model=prior"]) == train.model_for("clip", []) == "clip"
