"""The pipeline around real, tiny, untrained stages: what fakes cannot show."""

import pytest
import torch

from dalle.data.embed_norm import EmbedNorm
from dalle.data.frozen import FrozenCLIP
from dalle.data.shapes import Shapes
from dalle.data.tokenizers import CaptionTokenizer
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.metrics.metric import update_all, values_of
from dalle.nets.clip import CLIP
from dalle.nets.prior import Prior
from dalle.nets.unet import UNet
from dalle.pipelines.unclip import UnCLIP
from dalle.stages.decoder import DecoderStage
from dalle.stages.prior import PriorStage
from dalle.training.callbacks import usual_metrics

E, T, D, SIZE = 16, 24, 32, 16


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    captions = Shapes("train", size=100).captions_of(range(100))
    tokenizer = CaptionTokenizer.train(captions, vocab_size=300, context_length=T)
    net = CLIP(
        image_size=SIZE,
        patch_size=8,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        text_width=D,
        text_layers=1,
        text_heads=2,
        vocab_size=tokenizer.vocab_size,
        context_length=T,
        embed_dim=E,
        vision="vit",
    )
    return FrozenCLIP(net, tokenizer)


@pytest.fixture(scope="module")
def unclip(clip):
    torch.manual_seed(1)
    sizes = {"embed_dim": E, "text_width": D}
    prior_net = Prior(
        context_length=T, vocab_size=clip.tokenizer.vocab_size, width=32, depth=1, heads=2, **sizes
    )
    decoder_net = UNet(
        image_size=SIZE,
        channels=3,
        out_channels=3,
        width=16,
        multipliers=[1, 2],
        blocks=1,
        attention=[8],
        head_dim=16,
        patch=1,
        **sizes,
    )
    for net in (prior_net, decoder_net):  # outputs are zero at birth: nothing would depend on anything
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
    cosine, flow = Schedule("cosine"), Schedule("flow")
    norm = EmbedNorm("unit_times_sqrt_dim")
    prior = PriorStage(prior_net, lambda net: Denoiser(net, cosine, "x0"), Sampler("ddpm", 3))
    prior.norm = norm
    decoder = DecoderStage(decoder_net, lambda net: Denoiser(net, flow, "velocity"), Sampler("euler", 3))
    return UnCLIP(clip, prior, decoder, norm, norm)


CAPTIONS = ["a red circle", "a small blue square above a green ring", "a cross"]


def test_the_same_call_gives_the_same_bits(unclip):
    first = unclip.sample(CAPTIONS, n=2, seed=3, batch_size=4)
    assert first.shape == (6, 3, SIZE, SIZE)
    assert torch.equal(unclip.sample(CAPTIONS, n=2, seed=3, batch_size=4), first)
    assert first.std(0).mean() > 0.01


def test_batch_size_moves_only_the_last_bits(unclip):
    whole = unclip.sample(CAPTIONS, n=2, batch_size=6)
    torch.testing.assert_close(unclip.sample(CAPTIONS, n=2, batch_size=1), whole, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"prior": {"candidates": 3, "guidance": 2.0}},
        {"prior": {"sampler": Sampler("ddim", 2)}},
        {"decoder": {"guidance": 3.0}},
        {"decoder": {"guidance": 2.0, "text_guidance": 1.5}},
        {"decoder": {"sampler": Sampler("heun", 2)}},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_every_setting_reaches_the_pictures(unclip, settings):
    plain, other = unclip.sample(CAPTIONS), unclip.sample(CAPTIONS, **settings)
    assert not torch.equal(plain, other)


def test_without_a_prior_the_caption_alone_decides(clip, unclip):
    alone = UnCLIP(clip, None, unclip.decoder, None, unclip.decoder_norm).sample(CAPTIONS)
    assert alone.shape == (3, 3, SIZE, SIZE)
    assert not torch.equal(alone, unclip.sample(CAPTIONS))


def test_the_table_of_the_data_sets_own_pictures_is_perfect(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = Shapes("test", image_size=32, size=64)
    images, captions = source.images(range(64)), source.captions_of(range(64))
    metrics = usual_metrics(clip, judged=True)
    update_all(metrics, images, images, captions, range(len(images)))
    table = values_of(metrics)
    assert table["fid_clip"] == pytest.approx(0, abs=1e-4)
    assert table["judge/all"] == table["judge/seen/all"] == table["judge/unseen/all"] == 1
    assert {"judge/colour", "judge/shape", "judge/relation", "judge/seen/position"} <= table.keys()
