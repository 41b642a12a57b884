"""This project as a contender in a side-by-side harness (`t2ibench`, see README.md).

Every builder takes its sizes from the harness's spec and trains or samples through the project's own stages,
so what is measured is what `train.py` and `sample.py` run, without Lightning's loop around it. Where a
network cannot be the peers' exactly, its note says how it differs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from t2ibench.config import CLIPSpec, DalleSpec, DecoderSpec, PriorSpec
from t2ibench.core import Case, Contender, Context

from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.samplers import Sampler
from dalle.diffusion.schedule import Schedule
from dalle.nets.clip import CLIP
from dalle.nets.dalle import DALLE
from dalle.nets.prior import Prior
from dalle.nets.unet import UNet
from dalle.stages.base import Stage
from dalle.stages.clip import ClipStage
from dalle.stages.dalle import DalleStage
from dalle.stages.decoder import DecoderStage
from dalle.stages.prior import PriorStage

CAPTION_LENGTH = 32  # the decoder reads a caption too, for which its spec has no size
Batch = dict[str, torch.Tensor]

ours = Contender("dalle (this project)", distribution="dalle")
CONTENDERS = [ours]


def variants(ctx: Context, build: Callable[[Context], Case]) -> list[Case]:
    """The case at the harness's precision and, where that is fp32, under bf16 autocast as well."""
    precisions = ["fp32", "bf16"] if ctx.precision == "fp32" else [ctx.precision]
    return [replace(build(replace(ctx, precision=p)), variant=p) for p in precisions]


def training(make: Callable[[], tuple[Stage, Batch]], ctx: Context, samples: int, notes: str) -> list[Case]:
    def build(ctx: Context) -> Case:
        stage, batch = make()
        stage = stage.to(ctx.device)
        return ctx.train_case(stage, lambda: stage.step(batch)["loss"], samples, notes=notes)

    return variants(ctx, build)


def text_features(batch: int, length: int, width: int, ctx: Context) -> Batch:
    mask = torch.ones(batch, length, dtype=torch.bool, device=ctx.device)
    return {
        "text_embed": ctx.randn(batch, width),
        "text_hidden": ctx.randn(batch, length, width),
        "text_mask": mask,
    }


@ours.builds("clip_train")
def clip_train(spec: CLIPSpec, ctx: Context) -> list[Case]:
    def make() -> tuple[Stage, Batch]:
        net = CLIP(
            image_size=spec.image_size,
            vision="vit",
            patch_size=spec.patch,
            vision_width=spec.dim,
            vision_layers=spec.depth,
            vision_heads=spec.heads,
            text_width=spec.dim,
            text_layers=spec.depth,
            text_heads=spec.heads,
            context_length=spec.text_len,
            vocab_size=spec.text_vocab,
            embed_dim=spec.embed_dim,
        )
        text = ctx.randint(1, spec.text_vocab - 1, (spec.batch, spec.text_len))
        text[:, -1] = spec.text_vocab - 1  # the end token
        image = ctx.rand(spec.batch, 3, spec.image_size, spec.image_size) * 2 - 1
        return ClipStage(net), {"image": image, "text": text}

    return training(make, ctx, spec.batch, "the same network as open_clip's")


DALLE_NOTES = {
    "gpt": "full attention; feed-forward of 4 widths without a gate, no rotary",
    "llama": "full attention, rotary; gated feed-forward with as many weights as gpt's",
}


def dalle(spec: DalleSpec, style: str, ctx: Context) -> tuple[DalleStage, Batch]:
    net = DALLE(
        text_vocab=spec.text_vocab,
        text_length=spec.text_len,
        image_vocab=spec.image_vocab,
        image_levels=None,
        grid=spec.grid,
        width=spec.dim,
        depth=spec.depth,
        heads=spec.heads,
        style=style,
    )
    text = ctx.randint(1, spec.text_vocab - 1, (spec.batch, spec.text_len))
    text[:, -1] = spec.text_vocab - 1  # the end token
    codes = ctx.randint(0, spec.image_vocab, (spec.batch, spec.image_len))
    # half of the codes, as the peers
    stage = DalleStage(net, guidance=spec.guidance, temperature=1.0, top_k=spec.image_vocab // 2)
    return stage.to(ctx.device), {"text": text, "codes": codes}


def dalle_cases(
    spec: DalleSpec, ctx: Context, build: Callable[[DalleStage, Batch, Context], Case]
) -> list[Case]:
    """Both styles and, under `--compile`, gpt compiled: its training step, or its step of sampling."""

    def made(style: str, compile: bool) -> list[Case]:
        def one(ctx: Context) -> Case:
            stage, batch = dalle(spec, style, ctx)
            if compile:
                stage.net.compile()
                stage.net.step = torch.compile(stage.net.step, dynamic=True)
            return replace(build(stage, batch, ctx), notes=DALLE_NOTES[style])

        return [replace(case, variant=f"{style}, {case.variant}") for case in variants(ctx, one)]

    eager = [case for style in DALLE_NOTES for case in made(style, compile=False)]
    pairs = zip(made("gpt", compile=True), eager, strict=False) if ctx.compile else ()
    compiled = [
        replace(case, variant=f"{case.variant}, compiled", flop_step=twin.step) for case, twin in pairs
    ]
    return eager + compiled


@ours.builds("dalle_train")
def dalle_train(spec: DalleSpec, ctx: Context) -> list[Case]:
    def build(stage: DalleStage, batch: Batch, ctx: Context) -> Case:
        return ctx.train_case(stage, lambda: stage.step(batch)["loss"], spec.batch)

    return dalle_cases(spec, ctx, build)


@ours.builds("dalle_sample")
def dalle_sample(spec: DalleSpec, ctx: Context) -> list[Case]:
    """Codes only, no image decoding."""

    def build(stage: DalleStage, batch: Batch, ctx: Context) -> Case:
        return ctx.sample_case(stage, partial(stage.sample, batch), spec.batch)

    return dalle_cases(spec, ctx, build)


def prior(spec: PriorSpec, ctx: Context) -> tuple[PriorStage, Batch]:
    net = Prior(
        embed_dim=spec.clip_dim,
        text_width=spec.clip_dim,
        context_length=spec.text_len,
        vocab_size=2,  # which nothing reads without text_layers
        width=spec.dim,
        depth=spec.depth,
        heads=spec.heads,
    )
    denoiser = partial(Denoiser, schedule=Schedule("cosine", steps=spec.train_steps), prediction="x0")
    stage = PriorStage(net, denoiser, Sampler("ddim", spec.sample_steps), candidates=1, guidance=1.0)
    batch = text_features(spec.batch, spec.text_len, spec.clip_dim, ctx)
    return stage, {**batch, "image_embed": ctx.randn(spec.batch, spec.clip_dim)}


@ours.builds("prior_train")
def prior_train(spec: PriorSpec, ctx: Context) -> list[Case]:
    return training(partial(prior, spec, ctx), ctx, spec.batch, "captions dropped for 10%")


@ours.builds("prior_sample")
def prior_sample(spec: PriorSpec, ctx: Context) -> list[Case]:
    def build(ctx: Context, cached: bool) -> Case:
        stage, batch = prior(spec, ctx)
        stage = stage.to(ctx.device)
        text = {key: batch[key] for key in ("text_embed", "text_hidden", "text_mask")}

        def recomputed() -> torch.Tensor:
            noise = torch.randn_like(batch["image_embed"])
            return stage.sampler(partial(stage.denoiser, **text), noise, stage.denoiser.schedule)

        sample = partial(stage.sample, batch) if cached else recomputed
        how = "once" if cached else "at every step; not how the project samples"
        notes = f"DDIM, {spec.sample_steps} steps; keys and values of the text computed {how}"
        return ctx.sample_case(stage, sample, spec.batch, notes=notes)

    whole = variants(ctx, partial(build, cached=False))[0]
    return [*variants(ctx, partial(build, cached=True)), replace(whole, variant=f"{whole.variant}, no cache")]


def decoder(spec: DecoderSpec, ctx: Context) -> tuple[DecoderStage, Batch]:
    sides = [spec.image_size >> level for level in range(len(spec.mults))]
    net = UNet(
        image_size=spec.image_size,
        channels=spec.channels,
        out_channels=spec.channels,
        width=spec.dim,
        multipliers=spec.mults,
        blocks=1,
        attention=sides[1:],  # below full size, as the peers
        head_dim=min(64, spec.dim),
        embed_dim=spec.clip_dim,
        text_width=spec.clip_dim,
        patch=1,
        positions=False,
        resample="block",  # brings parameters and FLOPs closest to the peers'
    )
    denoiser = partial(Denoiser, schedule=Schedule("cosine", steps=spec.train_steps), prediction="eps")
    stage = DecoderStage(net, denoiser, Sampler("ddim", spec.sample_steps), guidance=1.0)
    image = ctx.rand(spec.batch, spec.channels, spec.image_size, spec.image_size) * 2 - 1
    batch = text_features(spec.batch, CAPTION_LENGTH, spec.clip_dim, ctx)
    return stage, {**batch, "image": image, "image_embed": ctx.randn(spec.batch, spec.clip_dim)}


DECODER_NOTE = (
    f"ADM's U-Net, one block per level; channels_last; also reads a caption of {CAPTION_LENGTH} tokens"
)


@ours.builds("decoder_train")
def decoder_train(spec: DecoderSpec, ctx: Context) -> list[Case]:
    return training(
        partial(decoder, spec, ctx), ctx, spec.batch, f"{DECODER_NOTE}; conditions dropped at random"
    )


@ours.builds("decoder_sample")
def decoder_sample(spec: DecoderSpec, ctx: Context) -> list[Case]:
    def build(ctx: Context) -> Case:
        stage, batch = decoder(spec, ctx)
        stage = stage.to(ctx.device)
        notes = f"{DECODER_NOTE}; DDIM, {spec.sample_steps} steps, no guidance"
        return ctx.sample_case(stage, partial(stage.sample, batch), spec.batch, notes=notes)

    return variants(ctx, build)
