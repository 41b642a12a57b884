"""What `speed.py` measures of this project: the demo's networks, with random weights, in their stages."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from dalle.data.embed_norm import EmbedNorm
from dalle.data.frozen import FrozenCLIP
from dalle.data.shapes import Shapes
from dalle.data.tokenizers import CaptionTokenizer
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.metrics.judge import Judge
from dalle.nets.clip import CLIP
from dalle.nets.dalle import DALLE
from dalle.nets.prior import Prior
from dalle.nets.small_unet import SmallUNet
from dalle.nets.unet import UNet
from dalle.pipelines.unclip import UnCLIP
from dalle.stages.clip import ClipStage
from dalle.stages.dalle import DalleStage
from dalle.stages.decoder import DecoderStage
from dalle.stages.prior import PriorStage
from dalle.training.defaults import suit

CONF = Path(__file__).parents[1] / "conf"
CONTEXT_LENGTH = 24  # of the demo's captions
# The image tower of the comparison: open_clip has none like the demo's.
VIT = {"vision": "vit", "patch_size": 8, "vision_width": 128, "vision_layers": 4, "vision_heads": 4}
SAMPLED = 16  # pictures made at once, the pipeline's default
OURS = "ours"

Step = Callable[[], object]


@dataclass
class Case:
    """One row: `step` does the work of `samples` samples. Cases of a group may be compared."""

    group: str
    name: str
    step: Step
    samples: int
    params: int = 0
    flops: int = 0  # of a sample, as PyTorch counts them
    seconds: list[float] = field(default_factory=list)  # of one step, one per round


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def sized(config: dict[str, Any], **sizes: Any) -> dict[str, Any]:
    """A config's plain settings; `sizes` replace its `auto`s that are the data's, others suit the network."""
    made = {**config, **sizes}
    suited = suit(made, sizes["image_size"]) if "image_size" in sizes else {}
    made |= {key: suited[key] for key, value in made.items() if value == "auto" and key in suited}
    return {key: value for key, value in made.items() if key not in ("_target_", "_partial_")}


def sampler(name: str) -> Sampler:
    return Sampler(**sized(settings(f"sampler/{name}")))


class Demo:
    """The demo's stages, the pipeline of DALL-E 2, and a batch for each, from the first training pictures."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.source = Shapes("train", **sized(settings("data/shapes")))
        configs = {stage: settings(f"model/{stage}") for stage in ("clip", "prior", "decoder")}
        captions = self.source.captions_of(range(5000))
        vocab_size = settings("tokenizer/bpe")["vocab_size"]
        tokenizer = CaptionTokenizer.train(captions, vocab_size, CONTEXT_LENGTH)
        side, net = self.source.image_size, {**configs["clip"]["model"]["net"], **VIT}
        self.clip_sizes = sized(
            net, image_size=side, context_length=CONTEXT_LENGTH, vocab_size=tokenizer.vocab_size
        )
        self.clip = ClipStage(CLIP(**self.clip_sizes))
        frozen = FrozenCLIP(CLIP(**self.clip_sizes), tokenizer)
        shared = {"embed_dim": frozen.embed_dim, "text_width": frozen.text_width}

        config = configs["prior"]["model"]
        self.prior_sizes = sized(
            config["net"], context_length=CONTEXT_LENGTH, vocab_size=tokenizer.vocab_size, **shared
        )
        self.prior = PriorStage(
            Prior(**self.prior_sizes),
            denoiser(config),
            sampler("ddim"),
            guidance=config["guidance"],
            candidates=config["candidates"],
        )
        config = configs["decoder"]["model"]
        self.unet_sizes = sized(settings("model/net/unet"), image_size=side, **shared)
        small = sized(settings("model/net/small_unet"), image_size=side, **shared)
        options = {key: config[key] for key in ("guidance", "thresholding")}
        self.decoder, self.unet = (
            DecoderStage(net, denoiser(config), sampler("ddim"), **options)
            for net in (SmallUNet(**small), UNet(**self.unet_sizes))
        )
        norm = EmbedNorm(configs["prior"]["datamodule"]["image_embed_norm"])
        self.pipeline = UnCLIP(frozen, self.prior, self.decoder, None, norm)
        self.batches = {
            stage: self.batch(configs[stage]["at_most"]["batch_size"], captions, frozen, norm)
            for stage in configs
        }
        self.captions = captions[:SAMPLED]

        dvae = sized(settings("model/dvae")["model"]["net"], image_size=side)
        self.dalle_sizes = sized(
            settings("model/net/gpt"),
            text_vocab=tokenizer.vocab_size,
            text_length=CONTEXT_LENGTH,
            image_vocab=dvae["vocab_size"],
            image_levels=None,
            grid=side // dvae["factor"],
        )
        net = DALLE(**self.dalle_sizes)
        self.dalle, self.codes = DalleStage(net, temperature=1.0, guidance=1.0), net.codes
        text = tokenizer(captions[: settings("model/dalle")["at_most"]["batch_size"]])
        codes = torch.randint(dvae["vocab_size"], (len(text), self.codes))
        self.batches["dalle"] = {"text": text, "codes": codes}

    def batch(self, n: int, captions: list[str], clip: FrozenCLIP, norm: EmbedNorm) -> dict[str, Tensor]:
        image = self.source.images(range(n))
        embed = norm.encode(clip.embed_image(image))
        return {"image": image, "image_embed": embed, **clip.embed_captions(captions[:n])}

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


def denoiser(config: dict[str, Any]) -> Callable[[nn.Module], Denoiser]:
    schedule = Schedule(**sized(config["denoiser"]["schedule"]))
    return partial(Denoiser, **sized(config["denoiser"], schedule=schedule))


def first(batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    return {key: value[:n] for key, value in batch.items()}


def training(
    demo: Demo, group: str, name: str, model: nn.Module, loss: Callable[[], Tensor], samples: int
) -> Case:
    """A step of the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        with demo.autocast():
            value = loss()
        value.backward()
        optimizer.step()

    return Case(group, name, step, samples, parameters(model))


def sampling(demo: Demo, group: str, name: str, model: nn.Module, sample: Step) -> Case:
    """`SAMPLED` samples, from noise to the end."""

    def step() -> None:
        model.eval()
        with torch.inference_mode(), demo.autocast():
            sample()

    return Case(group, name, step, SAMPLED, parameters(model))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def group_of_sampling(stage: str, run: Sampler) -> str:
    return f"{stage}, {run.method} {len(run)} steps"


def group_of_codes(demo: Demo) -> str:
    return f"dalle sampling, {demo.codes} codes"


def our_cases(demo: Demo) -> list[Case]:
    return [*our_training(demo), *our_sampling(demo), *our_data(demo)]


def our_training(demo: Demo) -> list[Case]:
    cases = []
    stages = [(name, OURS, getattr(demo, name)) for name in demo.batches]
    for name, ours, stage in [*stages, ("decoder", f"{OURS}, unet", demo.unet)]:
        batch = demo.batches[name]
        loss = partial(lambda stage, batch: stage.step(batch)["loss"], stage, batch)
        cases.append(training(demo, f"{name} training", ours, stage, loss, len(batch["text"])))
    return cases


def our_sampling(demo: Demo) -> list[Case]:
    """Prior and decoder apart, and both behind one another from captions, which is what `sample.py` runs."""
    prior, batch = demo.prior, first(demo.batches["prior"], SAMPLED)
    text = {key: batch[key] for key in ("text_embed", "text_hidden", "text_mask")}

    def recomputed() -> Tensor:
        noise = torch.randn_like(batch["image_embed"])
        return prior.sampler(partial(prior.denoiser, **text), noise, prior.denoiser.schedule)

    group = group_of_sampling("prior sampling", prior.sampler)
    cases = [
        sampling(demo, group, OURS, prior, partial(prior.sample, batch, candidates=1, guidance=1.0)),
        sampling(demo, group, f"{OURS}, no text cache", prior, recomputed),
    ]
    texts = first(demo.batches["dalle"], SAMPLED)
    cases.append(sampling(demo, group_of_codes(demo), OURS, demo.dalle, partial(demo.dalle.sample, texts)))
    pictures = first(demo.batches["decoder"], SAMPLED)
    for run in (sampler("ddim"), sampler("dpmpp")):
        group = group_of_sampling("decoder sampling", run)
        for name, stage in ((OURS, demo.decoder), (f"{OURS}, unet", demo.unet)):
            decode = partial(stage.sample, pictures, sampler=run)
            cases.append(sampling(demo, group, name, stage, decode))
        whole = partial(demo.pipeline.sample, demo.captions, precision=demo.precision)
        whole = partial(whole, prior={"sampler": run}, decoder={"sampler": run})
        group = group_of_sampling("caption to picture", run)
        cases.append(sampling(demo, group, OURS, demo.pipeline, whole))
    return cases


def our_data(demo: Demo) -> list[Case]:
    items, judge = range(256), Judge()
    images = demo.source.images(items)
    return [
        Case("drawing pictures", OURS, lambda: demo.source.images(items), len(items)),
        Case("writing captions", OURS, lambda: demo.source.captions_of(items), len(items)),
        Case("judging pictures", OURS, lambda: judge.read(images), len(items)),
    ]
