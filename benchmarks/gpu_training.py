"""What `gpu_check.py` looks at of every stage and of both pipelines: that they are right, not how fast.

A case is a training of a tiny network, composed and run as `dalle train` does. All cases of a stage share one
process, and the frozen networks below it, which are trained first.
"""

import csv
import json
import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning
import numpy as np
import torch
from gpu_case import Case, Failed, Job, Refused, Results
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dalle.cli import evaluate, sample
from dalle.cli.compose import compose
from dalle.errors import UserError
from dalle.run_dir import Run
from dalle.training import fit
from dalle.training.ema import Ema

STEPS, STOP = 30, 15  # of a training, and before which it is stopped to be resumed
TINY_STEPS, TINY_STOP = 6, 3
BESIDE_CPU = 5  # steps whose losses are compared with the CPU's
# How far, relative to the CPU's, the first loss in fp32 (matrix products in TF32), the others, after which
# steps differ, and the first in bf16 may be.
FIRST, LATER, FIRST_BF16 = 0.01, 0.1, 0.05
# The first loss, and the mean of all, of trainings on this device that draw the same but compute otherwise;
# fp16 leaves out some steps at first.
SAME_DRAWS, SAME_MEAN = 0.05, 0.2
RESUMED = 0.02  # losses after a stop, where they are not the same bits
PIXELS = 8.0  # mean difference of sampled pictures, of 255, from the CPU's

COMMON = (
    "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "trainer.val_check_interval=15",
    "data.size=256", "batch_size=16", "datamodule.val_items=16", "datamodule.test_items=16",
    "data.image_size=16", "sampler.steps=2", "optimizer.warmup=2", "datamodule.num_workers=0",
)  # fmt: skip
UNET = (
    "model.net.width=16", "model.net.multipliers=[1,1]", "model.net.blocks=[1,1]", "model.net.attention=[4]",
    "model.net.head_dim=8", "model.net.condition_width=16", "callbacks.generation.items=4",
)  # fmt: skip
VQ = ("model.net.width=8", "model.net.code_dim=8", "model.net.vocab_size=32")
PRIOR = ("model.net.width=32", "model.net.depth=1", "model.net.heads=2")
NETS: dict[str, tuple[str, ...]] = {
    "clip": (
        "model=clip", "model.net.vision_width=16", "model.net.vision_layers=2", "model.net.embed_dim=16",
        "model.net.text_width=16", "model.net.text_layers=1", "model.net.text_heads=2",
    ),
    "prior": ("model=prior", *PRIOR),
    "ar_prior": ("model=ar_prior", *PRIOR, "datamodule.buckets=32", "model.net.waves=4"),
    "decoder": ("model=decoder", *UNET),
    "unet": (
        "model=decoder", "model/net=unet", "model.net.width=32", "model.net.multipliers=[1,1]",
        "model.net.attention=[4]", "model.net.head_dim=8", "callbacks.generation.items=4",
    ),
    "dit": (
        "model=decoder", "model/net=dit", "model.net.width=32", "model.net.depth=1", "model.net.heads=2",
        "callbacks.generation.items=4",
    ),
    "upsampler": (
        "model=upsampler", "model.net.width=16", "model.net.multipliers=[1,1]",
        "callbacks.generation.items=4", "callbacks.upsampled.items=4",
    ),
    "vae": ("model=vae", "model.net.width=8", "model.net.latent_dim=8", "callbacks.generation.items=4"),
    "gan": (
        "model=gan", *(word for word in UNET if "blocks" not in word), "model.net.latent_dim=8",
        "model.discriminator.width=16", "model.discriminator.multipliers=[1,1]",
        "model.discriminator.features=16",
    ),
    "vqvae": ("model=vqvae", "model.net.width=8", "model.net.code_dim=8", "model.net.patchwise=16"),
    "vqgan": ("model=vqgan", *VQ, "model.discriminator.width=8", "model.disc_start=1"),
    "dvae": ("model=dvae", "model.net.width=16", "model.net.code_dim=16", "model.net.vocab_size=32"),
    "dalle": (
        "model=dalle", "model.net.width=32", "model.net.depth=2", "model.net.heads=2",
        "callbacks.generation.items=4",
    ),
}  # fmt: skip
BELOW = {
    "prior": "clip", "ar_prior": "clip", "decoder": "clip", "unet": "clip", "dit": "clip", "gan": "clip",
    "dalle": "dvae",
}  # fmt: skip


OTHERWISE = {
    "attention",
    "fused",
}  # operators that PyTorch counts among the random ones, which draw nothing here


class DrawnOnCpu(TorchDispatchMode):
    """Whatever is random is drawn on the CPU, so that a GPU trains on the CPU's noise.

    PyTorch counts attention and operations on lists of tensors as random, too, which draw nothing here.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tags = getattr(func, "tags", ())
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        place = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        lists = any(isinstance(arg, list) and arg and isinstance(arg[0], torch.Tensor) for arg in args)
        draws = torch.Tag.nondeterministic_seeded in tags and "attention" not in func.__name__ and not lists
        if not draws or place.type == "meta":
            return func(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args_cpu, kwargs_cpu = tree_map_only(torch.Tensor, lambda t: t.cpu(), (args, kwargs))
        made = func(*args_cpu, **kwargs_cpu)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0]).copy_(made)  # the size comes first where a place is given
        return tree_map_only(torch.Tensor, lambda t: t.to(place), made)


class Watch(lightning.Callback):
    """Losses, the moving average of the weights computed apart, and a stop."""

    def __init__(self, stop: int | None = None, average: bool = False) -> None:
        self.stop, self.averaging = stop, average
        self.losses: dict[int, float] = {}
        self.average: list[torch.Tensor] = []
        self.updates, self.off = 0, math.nan

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.stop:
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses[trainer.global_step] = float(outputs["loss"])
        if not self.averaging or pl_module.guard.left_out:
            return
        self.updates += 1
        weights = [p.detach().double().cpu() for p in pl_module.net.parameters()]
        (ema,) = [callback for callback in trainer.callbacks if isinstance(callback, Ema)]
        decay = min(ema.decay, (1 + self.updates) / (10 + self.updates))
        before = self.average or self.born
        self.average = [a * decay + w * (1 - decay) for a, w in zip(before, weights, strict=True)]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.born = [p.detach().double().cpu() for p in pl_module.net.parameters()]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        for ema in trainer.callbacks if self.averaging else ():
            if isinstance(ema, Ema):
                theirs = [ema.average[name].double().cpu() for name, _ in pl_module.net.named_parameters()]
                self.off = max(distance(a, b) for a, b in zip(theirs, self.average, strict=True))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-8))


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    made = fit.make_trainer

    def make_trainer(config: Any, run: Any) -> Any:
        trainer = made(config, run)
        trainer.callbacks.insert(0, watch)
        return trainer

    fit.make_trainer = make_trainer
    try:
        yield
    finally:
        fit.make_trainer = made


def train(
    job: Job, model: str, name: str, *words: str, watch: Watch | None = None
) -> tuple[Run, list[float]]:
    """Trains a stage as `dalle train` does; gives its run, and its losses from the first step on."""
    accelerator = "gpu" if job.device == "cuda" else "cpu"
    steps = TINY_STEPS if job.tiny else STEPS
    given = [*words, f"name={name}", f"upstream.clip={job.folder}/logs/below/clip",
             f"upstream.dvae={job.folder}/logs/below/dvae"]  # fmt: skip
    if not any(word.startswith("trainer=") for word in words):
        given.insert(0, "trainer=auto")
        given += [f"trainer.accelerator={accelerator}"]
    if not any(word.startswith("trainer.max_steps") for word in words):
        given.append(f"trainer.max_steps={steps}")
    (composed,) = compose("train", [*NETS[model], *COMMON, f"paths.logs={job.folder}/logs", *given])
    watch = watch or Watch()
    with watched(watch):
        fit.train(composed.config)
    return Run(Path(composed.config["paths"]["run"])), list(watch.losses.values())


def finite(losses: list[float], run: Run) -> None:
    bad = [step for step, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise Failed(f"the losses of steps {bad[:5]} are no numbers", losses=losses)
    wrong = [
        name
        for name, value in load_file(run.path / "model.safetensors").items()
        if not value.isfinite().all()
    ]
    if wrong:
        raise Failed(f"{', '.join(wrong[:3])} are no numbers", losses=losses)


def off(ours: list[float], theirs: list[float]) -> list[float]:
    """Differences of losses, relative to the second ones."""
    return [abs(a - b) / max(abs(b), 0.1) for a, b in zip(ours, theirs, strict=True)]


def below(job: Job, stage: str) -> dict[str, Any]:
    """The frozen networks."""
    train(job, BELOW[stage], "below", "precision=fp32", "overwrite=true")
    return {"text": BELOW[stage]}


def like_cpu(job: Job, stage: str) -> dict[str, Any]:
    """The same trainings, with the same noise, on both."""
    steps = f"trainer.max_steps={BESIDE_CPU}"
    _, theirs = train(replace(job, device="cpu"), stage, "cpu", "precision=fp32", steps)
    with DrawnOnCpu():
        _, ours = train(job, stage, "fp32", "precision=fp32", steps)
        _, bf16 = train(job, stage, "same-bf16", "precision=bf16", steps)
    first, *later = off(ours, theirs)
    in_bf16 = off(bf16, theirs)[0]
    found = {
        "cpu": theirs,
        "fp32": ours,
        "bf16": bf16,
        "first": first,
        "later": max(later),
        "first_bf16": in_bf16,
    }
    said = f"{first:.0e} {in_bf16:.0e}"
    if not (first <= FIRST and max(later) <= LATER and in_bf16 <= FIRST_BF16):
        raise Failed(
            f"off the CPU's loss by {first:.1e} (tolerance {FIRST}), later {max(later):.1e} ({LATER}), in "
            f"bf16 {in_bf16:.1e} ({FIRST_BF16})", **found
        )  # fmt: skip
    return {"text": said, **found}


def bf16(job: Job, stage: str) -> dict[str, Any]:
    watch = Watch(average=True)
    run, losses = train(job, stage, "bf16", "precision=bf16", watch=watch)
    finite(losses, run)
    if not watch.off <= 1e-4:
        raise Failed(f"the moving average is off by {watch.off:.1e}", losses=losses)
    return {"text": f"{losses[0]:.3g} to {losses[-1]:.3g}", "losses": losses, "average_off": watch.off}


def variant(job: Job, stage: str, words: Sequence[str]) -> dict[str, Any]:
    """Another way to train, which begins where the one in bf16 does."""
    if job.device == "cpu":
        if "precision=fp16" in words:
            raise Refused("fp16 is for GPUs")
        words = [*words, "trainer.accelerator=cpu"]
    known = known_losses(job)
    try:
        with eager_backend() if job.device == "cpu" else nullcontext():
            run, losses = train(job, stage, job.case, *words)
    except UserError as error:
        if {"fp16", "fsdp"} & {job.case}:
            raise Refused(" ".join(str(error).split())) from None
        raise
    finite(losses, run)
    if not known:
        return {"text": "", "losses": losses}
    (first,), (mean,) = off(losses[:1], known[:1]), off([fmean(losses)], [fmean(known)])
    if first > SAME_DRAWS or mean > SAME_MEAN:
        raise Failed(
            f"losses are off those of bf16: the first by {first:.1e} ({SAME_DRAWS}), the mean by {mean:.1e} "
            f"({SAME_MEAN})", losses=losses, first=first, mean=mean
        )  # fmt: skip
    return {"text": f"{max(first, mean):.0e}", "losses": losses, "first": first, "mean": mean}


@contextmanager
def eager_backend() -> Iterator[None]:
    """Compiling ends before code is generated, which takes minutes on a CPU."""
    compile = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, *args, **more: compile(self, *args, **{**more, "backend": "eager"})
    try:
        yield
    finally:
        torch.nn.Module.compile = compile


def known_losses(job: Job) -> list[float]:
    """Those of the training in bf16, where there was one."""
    path = job.folder / "logs" / "bf16"
    found = sorted(path.glob("*/metrics.csv"))
    return column(found[0]) if found else []


def column(path: Path) -> list[float]:
    with path.open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def resumed(job: Job, stage: str) -> dict[str, Any]:
    """Stopped amid, and gone on with: as the training in bf16 that never stopped."""
    whole = Run(next((job.folder / "logs" / "bf16").glob("*/manifest.json")).parent)
    try:
        train(job, stage, "parts", "precision=bf16", watch=Watch(stop=TINY_STOP if job.tiny else STOP))
    except SystemExit:
        pass
    else:
        raise Failed("it was not stopped")
    parts, _ = train(job, stage, "parts", "precision=bf16", "resume=true")
    ours, theirs = column(parts.path / "metrics.csv"), column(whole.path / "metrics.csv")
    a, b = (load_file(run.path / "model.safetensors") for run in (parts, whole))
    if ours == theirs and all(torch.equal(a[name], b[name]) for name in b):
        return {"text": "bits", "bit_equal": True}
    if len(ours) != len(theirs):
        raise Failed(f"{len(ours)} losses where {len(theirs)} are due")
    away = max(off(ours, theirs))
    if away > RESUMED:
        raise Failed(f"losses are off by {away:.1e} ({RESUMED})", resumed=ours, whole=theirs)
    return {"text": f"{away:.0e}", "bit_equal": False, "off": away}


DISTRIBUTED = ("trainer.devices=1", "precision=bf16")
# What was never tried on a GPU comes first, after what the others are compared with
COLUMNS: dict[str, Case] = {
    "cpu": Case(like_cpu),
    "bf16": Case(bf16),
    "fsdp": Case(partial(variant, words=("trainer=fsdp", *DISTRIBUTED))),
    "compiled": Case(partial(variant, words=("compile=true", "precision=bf16")), limit=120),
    "resume": Case(resumed),
    "ddp": Case(partial(variant, words=("trainer=ddp", *DISTRIBUTED))),
    "fp16": Case(partial(variant, words=("precision=fp16",))),
}


def cases_of(stage: str) -> dict[str, Case]:
    """`resume`, and the variants, look at what `bf16` has left."""
    upstream = {"below": Case(below)} if stage in BELOW else {}
    return {
        name: replace(case, run=partial(case.run, stage=stage)) for name, case in (upstream | COLUMNS).items()
    }


# Both pipelines


def trained(job: Job, *stages: str) -> dict[str, Any]:
    for stage in stages:
        train(job, stage, "below", "precision=bf16", "datamodule.num_workers=2")
    return {"text": ", ".join(stages)}


def sampled(job: Job, pipeline: str) -> dict[str, Any]:
    """Pictures in bf16; and in fp32, where they are to be those of the CPU."""
    pictures = {}
    for name, device, precision in (
        ("bf16", job.device, "bf16"),
        ("fp32", job.device, "fp32"),
        ("cpu", "cpu", "fp32"),
    ):
        out = job.folder / pipeline / name
        sample.main([
            "name=below", f"paths.logs={job.folder}/logs", f"pipeline={pipeline}", f"device={device}",
            f"precision={precision}", "prompt=[a small red circle,a large blue square]", "n=2",
            "sampler.steps=4", f"out={out}",
        ])  # fmt: skip
        files = sorted(path for path in out.rglob("*.png") if "grid" not in path.name)
        pictures[name] = np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) for path in files])
    away = {name: float(np.abs(pictures[name] - pictures["cpu"]).mean()) for name in ("fp32", "bf16")}
    if away["fp32"] > PIXELS:
        raise Failed(f"pictures are off the CPU's by {away['fp32']:.1f} of 255 ({PIXELS})", **away)
    return {"text": f"off the CPU's by {away['fp32']:.2f} of 255 in fp32, {away['bf16']:.2f} in bf16", **away}


def evaluated(job: Job, pipeline: str) -> dict[str, Any]:
    accelerator = "gpu" if job.device == "cuda" else "cpu"
    evaluate.main([
        "name=below", f"paths.logs={job.folder}/logs", f"pipeline={pipeline}", "precision=bf16", "n=16",
        f"trainer.accelerator={accelerator}", "sampler.steps=4", "trainer.enable_progress_bar=false",
    ])  # fmt: skip
    (path,) = (job.folder / "logs").rglob("result.json")
    figures = json.loads(path.read_text()).get("metrics", {})
    return {"text": f"{len(figures)} figures", "figures": figures}


def pipeline_cases(pipeline: str, *stages: str) -> dict[str, Case]:
    return {
        "train": Case(lambda job: trained(job, *stages), limit=90),
        "sample": Case(partial(sampled, pipeline=pipeline)),
        "evaluate": Case(partial(evaluated, pipeline=pipeline)),
    }


PIPELINES = {"dalle": ("clip", "dvae", "dalle"), "unclip": ("clip", "prior", "decoder")}
PARTS: dict[str, dict[str, Case]] = {
    **{f"pipeline-{name}": pipeline_cases(name, *stages) for name, stages in PIPELINES.items()},
    **{stage: cases_of(stage) for stage in NETS},
}


def table(results: Results) -> list[str]:
    """A line for each stage."""
    rows = [["stage", *COLUMNS]]
    for stage in NETS:
        if stage in results:
            found = results[stage]
            rows.append([stage, *(cell(found.get(column)) for column in COLUMNS)])
    widths = (10, 12, 15, *[10] * 5)
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in (rows if len(rows) > 1 else [])
    ]
    for name in PIPELINES:
        for case, found in results.get(f"pipeline-{name}", {}).items():
            if case != "train" or found["status"] != "ok":
                lines.append(f"{name} {case}: {found['status']}, {found.get('text', '')}")
    return lines


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"ok {found['text']}" if found["status"] == "ok" else found["status"]
