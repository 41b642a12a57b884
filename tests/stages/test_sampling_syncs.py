"""From its second step on, drawing neither asks the device for anything nor brings it anything from the host:
either waits for all that is under way. The meta device stands for a GPU: what it cannot be asked, fails. And
for one of Apple's, which have no float64.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle import machine
from dalle.autoregressive import sampling
from dalle.diffusion import restoration
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.inpainting import known_of
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.nets.ar_prior import ARPrior
from dalle.nets.dalle import DALLE
from dalle.nets.dalle_bart import DalleBart
from dalle.nets.dit import DiT
from dalle.nets.karlo import GlideDecoder, KarloDecoder, KarloUpsampler, PriorTransformer
from dalle.nets.laion import LaionPrior
from dalle.nets.prior import Prior
from dalle.nets.rudalle import RuDalle
from dalle.nets.small_unet import SmallUNet
from dalle.nets.unet import UNet
from dalle.nets.upsampler import UpsamplerUNet
from dalle.stages.ar_prior import ARPriorStage
from dalle.stages.dalle import DalleStage
from dalle.stages.decoder import DecoderStage
from dalle.stages.prior import PriorStage
from dalle.stages.upsampler import UpsamplerStage

B, E, T, SIDE = 2, 8, 6, 16
FIRST = 3  # of the rounds that are looked at: after the noise to begin with, and a call of the network
TEXT = {"embed_dim": E, "text_width": E}
UNET = {
    "image_size": SIDE, "channels": 3, "out_channels": 3, "width": 16, "multipliers": [1, 1],
    "attention": [8], "head_dim": 8, "patch": 2, **TEXT,
}  # fmt: skip
SMALL_UNET = {**UNET, "blocks": [1, 1], "condition_width": 16}
DIT = {"image_size": SIDE, "channels": 3, "out_channels": 3, "patch": 4, "width": 16, "depth": 1, "heads": 2}
KARLO = {
    "image_size": SIDE, "text_width": E, "context_length": T, "width": 32, "multipliers": [1, 1], "blocks": 1,
    "attention": [1], "head_dim": 32,
}  # fmt: skip
LEARNED = {"schedule": "linear", "prediction": "eps", "learned_variance": True}
BATCH = {
    "image_embed": (B, E), "text_embed": (B, E), "text_hidden": (B, T, E), "text_mask": (B, T),
    "text": (B, T),
}  # fmt: skip
TYPES = {"text": torch.int64, "text_mask": torch.bool}


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "WITHOUT_FLOAT64", {"meta"})
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on that device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def batch() -> Any:
    return {name: torch.empty(shape, dtype=TYPES.get(name), device="meta") for name, shape in BATCH.items()}


class NoTraffic(TorchDispatchMode):
    """Refuses, from round `first` on, copies from the host, and masks as indices, whose sizes are asked
    for. Who reads a number of the meta device, or copies from it, is refused by PyTorch.
    """

    def __init__(self, first: int = FIRST) -> None:
        super().__init__()
        self.rounds, self.first = 0, first

    def round(self, *_: Any) -> None:
        self.rounds += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            wide = isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.dtype == torch.float64
            assert not wide, f"{func} makes float64"
        if self.rounds < self.first:
            return made
        name = func._schema.name
        if name in ("aten::to", "aten::_to_copy", "aten::copy_", "aten::lift_fresh"):
            places = {
                leaf.device.type for leaf in tree_leaves((args, made)) if isinstance(leaf, torch.Tensor)
            }
            assert places != {"cpu", "meta"}, f"{name} brings something from the host"
            assert name != "aten::lift_fresh" or places != {"meta"}, "numbers of the host become a tensor"
        if name.startswith("aten::index"):
            masks = [i for i in tree_leaves(args[1]) if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
            assert not masks, f"{name} has a mask for an index"
        return made


def assert_without_traffic(net: nn.Module, sample: Callable[[Any], Any], first: int = FIRST) -> None:
    """Args:
    sample: draws; given what stands for randn, a call of which is a round as one of the network is.
    """
    mode = NoTraffic(first)
    net.register_forward_pre_hook(mode.round)

    def randn(x: torch.Tensor) -> torch.Tensor:
        mode.round()
        return torch.randn_like(x)

    with mode, torch.inference_mode():
        made = sample(randn)
    assert made.is_meta
    assert mode.rounds > first


def made(net: Callable[..., Any], *args: Any, **sizes: Any) -> Any:
    return net(*args, **sizes).to("meta").eval()


def denoiser(**options: Any) -> Any:
    """Of the cosine schedule in eps, unless told otherwise."""
    options = {"schedule": "cosine", "prediction": "x0", **options}
    return partial(Denoiser, **{**options, "schedule": Schedule(options["schedule"], 1000)})


def decoder(net: Callable[..., Any], *sizes: Any, path: dict[str, Any] | None = None, **named: Any) -> Any:
    stage = DecoderStage(made(net, *sizes, **named), denoiser(**path or {}), Sampler("ddim", 4), guidance=2.0)
    return stage.eval()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ddim", {}), ("ddim", {"eta": 1.0, "resamplings": 2}), ("ddpm", {}), ("dpmpp", {}), ("heun", {}),
        ("heun", {"churn": 10.0}), ("euler", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_samplers(method, options, schedule):
    stage = decoder(SmallUNet, **SMALL_UNET, path={"schedule": schedule})
    run = Sampler(method, 4, **options)
    assert_without_traffic(stage.net, lambda randn: stage.sample(batch(), run, randn=randn))


DECODERS: dict[str, Callable[[], Any]] = {
    "unet": lambda: decoder(UNet, **UNET, blocks=1),
    "dit": lambda: decoder(DiT, **DIT, **TEXT),
    "karlo": lambda: decoder(KarloDecoder, **KARLO, embed_dim=E, context=E, path=LEARNED),
    "glide": lambda: decoder(GlideDecoder, **KARLO, path=LEARNED),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    stage = DECODERS[name]()
    run = Sampler("ddpm", 4)
    assert_without_traffic(stage.net, lambda randn: stage.sample(batch(), run, randn=randn))


@pytest.mark.parametrize(
    "options", [{"thresholding": "dynamic"}, {"rescale": 0.7}, {"text_guidance": 3.0}], ids=str
)
def test_guidance(options):
    stage = decoder(SmallUNet, **SMALL_UNET)
    for name, value in options.items():
        setattr(stage, name, value)
    assert_without_traffic(stage.net, lambda randn: stage.sample(batch(), randn=randn))


def test_inverting():
    stage = decoder(SmallUNet, **SMALL_UNET)
    image = torch.empty(B, 3, SIDE, SIDE, device="meta")
    assert_without_traffic(stage.net, lambda _: stage.invert(batch(), image))


def test_inpainting():
    stage = decoder(SmallUNet, **SMALL_UNET, inpaint=True)
    image = torch.empty(1, 3, SIDE, SIDE, device="meta")
    known = known_of(image, torch.empty(1, SIDE, SIDE, dtype=torch.bool, device="meta"))
    assert_without_traffic(stage.net, lambda randn: stage.sample(batch(), randn=randn, known=known))


@pytest.mark.parametrize(
    "spoils",
    [restoration.shrinking(SIDE, 2), restoration.Hidden(torch.ones(SIDE, SIDE) > 0)],
    ids=["shrinking", "hidden"],
)
def test_restoring(spoils):
    stage = decoder(SmallUNet, **SMALL_UNET)
    image = torch.empty(1, 3, SIDE, SIDE, device="meta")

    def wrap(denoise):
        return restoration.given(denoise, spoils, y, 0.1, stage.denoiser.schedule)

    y = spoils(image)
    assert_without_traffic(stage.net, lambda randn: stage.sample(batch(), randn=randn, wrap=wrap))


def upsampler(net: Callable[..., Any], **sizes: Any) -> Any:
    net = made(net, image_size=SIDE, factor=2, width=32, multipliers=[1, 1], blocks=1, **sizes)
    return UpsamplerStage(net, denoiser(), Sampler("ddim", 4)).eval()


@pytest.mark.parametrize(("tile", "tiles"), [(None, 1), (8, 9)])
def test_upsamplers(tile, tiles):
    stage = upsampler(UpsamplerUNet, channels=3, out_channels=3, patch=2)
    low: Any = {"low": torch.empty(B, 3, SIDE // 2, SIDE // 2, device="meta")}
    options = {"tile": tile, "noise_level": 0.1}
    # each tile is called for once a step, and brings its weights in the first one; noise is also in `low`
    first = FIRST + tiles
    assert_without_traffic(stage.net, lambda randn: stage.sample(low, **options, randn=randn), first)


PRIORS: dict[str, Callable[[], Any]] = {
    "ours": lambda: made(Prior, E, E, T, 9, 16, 1, 2),
    "reads": lambda: made(Prior, E, E, T, 9, 16, 1, 2, text_layers=1),
    "karlo": lambda: made(PriorTransformer, E, E, T, 16, 1, 2),
    "laion": lambda: made(LaionPrior, E, 1, 2, 8, T, 32, True, False, True, True, True, True, "all"),
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors(name):
    stage = PriorStage(PRIORS[name](), denoiser(), Sampler("ddim", 4), guidance=2.0, candidates=2).eval()
    assert_without_traffic(stage.net, lambda randn: stage.sample(batch(), randn=randn))


@pytest.mark.parametrize("how", ["none", "graphs"])
def test_the_prior_that_writes_codes(how, monkeypatch):
    def unchecked(text, codes, vocab, prefix, known):  # codes are looked at before the first one is drawn
        return nn.functional.pad(prefix, (0, codes - prefix.shape[1]), value=-1)

    monkeypatch.setattr(sampling, "known_codes", unchecked)
    stage = ARPriorStage(made(ARPrior, E, E, T, 4, 8, 16, 1, 2, waves=4), guidance=2.0, top_p=0.9).eval()
    stage.speed_up(how)
    assert_without_traffic(stage.net, lambda randn: stage.sample(batch(), randn=randn))


TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "gpt": lambda: made(DALLE, 20, T, 16, 4, 16, 2, 2, attention="dalle", image_levels=None),
    "llama": lambda: made(DALLE, 20, T, 16, 4, 16, 2, 2, style="llama", shift=True, image_levels=None),
    "dalle_bart": lambda: made(DalleBart, 20, T, 16, 4, 16, 2, 2, 32, 17, 16),
    "rudalle": lambda: made(RuDalle, 20, T, 16, 4, 16, 2, 2, "v3"),
}


@pytest.mark.parametrize("how", ["none", "graphs"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, how):
    stage = DalleStage(TRANSFORMERS[name](), guidance=2.0, top_k=8, top_p=0.9, temperature=0.9).eval()
    stage.speed_up(how)
    assert_without_traffic(stage.net, lambda randn: stage.sample(batch(), randn=randn))


def test_traffic_is_noticed():
    """Karlo's upsampler asks which of its two networks is meant, as only `t` says; else both would run."""
    stage = upsampler(KarloUpsampler)
    low: Any = {"low": torch.empty(B, 3, SIDE // 2, SIDE // 2, device="meta")}
    with pytest.raises(RuntimeError, match="meta tensors"):
        assert_without_traffic(stage.net, lambda randn: stage.sample(low, randn=randn))
    mask = torch.ones(3) > 0
    for wrong in (
        lambda x: x + torch.ones(3).to(x.device), lambda x: x[mask],
        lambda x: x * torch.tensor(2.0, device="meta"),
    ):  # fmt: skip
        mode = NoTraffic()
        mode.rounds = FIRST
        with mode, pytest.raises(AssertionError):
            wrong(torch.empty(3, device="meta"))
