"""How fast `gpu_check.py` finds training and sampling at full size, beside what the card itself can do.

Trainings are Lightning's, of the stages that the presets make, with random data that are on the device
already. Operations are those that PyTorch's counter sees (matrix products, convolutions, attention). Nothing
of these networks is learned: this is about time and memory only.
"""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import lightning
import torch
from gpu_case import Case, Job, Refused, Results
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle.cli.compose import compose
from dalle.diffusion.samplers import Sampler
from dalle.pipelines.dalle import DallePipeline
from dalle.pipelines.upsampling import Drawing
from dalle.stages.base import Stage
from dalle.stages.dalle import DalleStage
from dalle.training.checks import build_stage
from dalle.training.preflight import count

WARM, TIMED = 3, 8  # steps
DRAWN = 256  # codes from the middle of a picture, of which the time of one is the mean
ROOM = 0.7  # of the card's memory, for what is compiled beside other work
WARM_CODES = 16
DIFFUSION_STEPS = 20
TEXT_VOCAB, EMBED, CAPTION = 16384, 768, 77

Net = tuple[str, ...]
GPT_1B: Net = (
    "model=dalle_1b", f"model.net.text_vocab={TEXT_VOCAB}", "model.net.text_length=128",
    "model.net.image_vocab=8192", "model.net.image_levels=null", "model.net.grid=32",
)  # fmt: skip
CONDITIONED: Net = (f"model.net.embed_dim={EMBED}", f"model.net.text_width={EMBED}")
PICTURES: Net = (*CONDITIONED, "model.net.image_size=64")
NETS: dict[str, Net] = {
    "dalle_1b": (*GPT_1B, "model.net.attention=full", "model.net.checkpoint=false"),
    "dalle_1b sparse": GPT_1B,
    "unet": ("model=decoder_paper", *PICTURES, "model.net.width=192", "model.net.checkpoint=false"),
    "dit": (
        "model=decoder", "model/net=dit", *PICTURES, "optimizer=adamw", "model.net.patch=4",
        "model.net.width=1152", "model.net.depth=28", "model.net.heads=16",
    ),
    "prior": (
        "model=prior_paper", *CONDITIONED, f"model.net.context_length={CAPTION}", "model.net.vocab_size=2",
    ),
}  # fmt: skip
BATCH = {"dalle_1b": 16, "dalle_1b sparse": 16, "unet": 64, "dit": 64, "prior": 256}
TINY: dict[str, Net] = {
    "dalle_1b": ("model.net.width=32", "model.net.depth=2", "model.net.heads=2", "model.net.grid=4"),
    "unet": ("model.net.width=32", "model.net.multipliers=[1,1]", "model.net.attention=[8]",
             "model.net.image_size=16", "model.net.head_dim=8"),
    "dit": ("model.net.width=32", "model.net.depth=2", "model.net.heads=2", "model.net.image_size=16"),
    "prior": ("model.net.width=32", "model.net.depth=2", "model.net.heads=2"),
}  # fmt: skip
LLAMAGEN = {"343M": (1024, 24, 16), "1.4B": (1536, 48, 24)}  # width, depth, heads; 24 x 24 codes of 16384


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float | None:
    """GiB since the last call."""
    if device != "cuda":
        return None
    most = torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return round(most, 2)


def seconds(device: str, work: Callable[[], Any]) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


# What the card can do


def matrix_rate(job: Job) -> float:
    """bf16 operations a second in products of large random matrices."""
    n = 256 if job.tiny else 8192
    a, b = (torch.randn(n, n, device=job.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    took = seconds(job.device, lambda: [a @ b for _ in range(20)]) / 20
    return 2 * n**3 / took


def bandwidth(job: Job) -> float:
    """Bytes a second, read and written, of a copy in the device's memory."""
    n = 2**20 if job.tiny else 2**31
    a = torch.zeros(n, device=job.device, dtype=torch.uint8)
    b = torch.empty_like(a)
    b.copy_(a)
    took = seconds(job.device, lambda: [b.copy_(a) for _ in range(10)]) / 10
    return 2 * n / took


def card(job: Job) -> dict[str, Any]:
    flops, read = matrix_rate(job), bandwidth(job)
    return {
        "text": f"bf16 matrix products {flops / 1e12:.0f} TFLOP/s, memory {read / 1e12:.2f} TB/s",
        "tflops": flops / 1e12,
        "tb_per_second": read / 1e12,
    }


# Training


class Same:
    """One batch again and again."""

    def __init__(self, batch: dict[str, Tensor], steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return repeat(self.batch, self.steps)


class Steps(lightning.LightningDataModule):
    """Its batches, for stages that ask their DataModule what embeddings are normalised with."""

    norm = None

    def __init__(self, loader: Same) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> Same:
        return self.loader


class Clock(lightning.Callback):
    """Counts the operations of the first step, and times some that follow; `done` is told, and compiles; then
    times some again.
    """

    def __init__(self, device: str, done: Callable[[str, float, float], None]) -> None:
        self.device, self.done = device, done
        self.flops, self.ends, self.compile_seconds = 0, [], 0.0
        self.phase, self.counter = "eager", FlopCounterMode(display=False)

    def on_train_batch_start(self, trainer: Any, pl_module: Stage, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.counter.__enter__()
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.counter.__exit__(None, None, None)
            self.flops = self.counter.get_total_flops()
            return
        if len(self.ends) < WARM:  # else the device is kept busy
            synchronize(self.device)
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1 and self.phase == "compiled":
            self.compile_seconds = time.perf_counter() - self.began
        if len(self.ends) < WARM + TIMED:
            return
        synchronize(self.device)
        self.done(self.phase, (time.perf_counter() - self.ends[WARM - 1]) / TIMED, self.compile_seconds)
        if self.phase == "eager":
            self.phase, self.ends = "compiled", []


def made(job: Job, name: str, *words: str) -> tuple[Stage, dict[str, Any]]:
    """A stage, on the device, and its configuration."""
    torch.compiler.reset()  # nothing of the case before is kept
    peak(job.device)
    family = name.partition(" ")[0]
    given = [*NETS[name], *(TINY[family] if job.tiny else ()), *words]
    (composed,) = compose("train", given)
    with torch.device(job.device):
        return build_stage(composed.config["model"]), composed.config


def batch_for(job: Job, stage: Stage, n: int) -> dict[str, Tensor]:
    """Random data of all kinds that a network of this one's sizes may want."""
    net, place = stage.net, {"device": job.device}
    if isinstance(stage, DalleStage):
        text = torch.randint(1, net.text_vocab, (n, net.text_length), **place)
        return {"text": text, "codes": torch.randint(net.image_vocab, (n, net.codes), **place)}
    found = {
        "image_embed": torch.randn(n, EMBED, **place),
        "text_embed": torch.randn(n, EMBED, **place),
        "text_hidden": torch.randn(n, CAPTION, EMBED, **place),
        "text_mask": torch.ones(n, CAPTION, dtype=torch.bool, **place),
    }
    if hasattr(net, "image_size"):
        found["image"] = torch.rand(n, 3, net.image_size, net.image_size, **place) * 2 - 1
    return found


def compile_net(job: Job, stage: Stage) -> None:
    """As `fit.train` with compile=true; on a CPU it ends before code is generated, which takes minutes."""
    stage.net.compile(dynamic=False, **({} if job.device == "cuda" else {"backend": "eager"}))


def fit(job: Job, stage: Stage, config: dict[str, Any], batch: int, steps: int, *callbacks: Any) -> None:
    """As `fit.train` with trainer.benchmark=true and without a moving average."""
    torch.set_float32_matmul_precision("high")
    trainer = lightning.Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu", devices=1, precision="bf16-mixed",
        max_steps=steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=config["trainer"]["gradient_clip_val"], gradient_clip_algorithm="norm",
        benchmark=job.device == "cuda",
    )  # fmt: skip
    trainer.fit(stage, datamodule=Steps(Same(batch_for(job, stage, batch), steps)))


def training(job: Job, name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    stage, config = made(job, name)
    n = 2 if job.tiny else BATCH[name]
    found: dict[str, Any] = {"parameters": count(stage.net), "batch": n}

    def done(phase: str, took: float, compiling: float) -> None:
        found["flops"] = clock.flops
        found[phase] = {"ms": 1000 * took, "tflops": clock.flops / took / 1e12, "peak_gib": peak(job.device)}
        if phase == "compiled":
            found[phase]["compile_seconds"] = round(compiling, 1)
        else:
            compile_net(job, stage)
        job.note(**found)

    clock = Clock(job.device, done)
    fit(job, stage, config, n, 1 + 2 * (WARM + TIMED), clock)
    return {"text": f"{found['parameters'] / 1e6:,.0f}M, batch {n}", **found}


def ahead(job: Job, name: str) -> dict[str, Any]:
    """Compiles what `training` will, while the card is not yet needed alone: what is made is kept on disk."""
    if job.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(ROOM)
    stage, config = made(job, name)
    compile_net(job, stage)
    try:
        took = seconds(job.device, lambda: fit(job, stage, config, 2 if job.tiny else BATCH[name], 1))
    except torch.OutOfMemoryError:
        raise Refused("there is no room for it beside the others") from None
    return {"text": f"first compiled step after {took:.0f} s, beside other work", "compile_seconds": took}


# Sampling


class Codes(nn.Module):
    """An image tokenizer that makes nothing of codes, and a tokenizer of captions that reads nothing."""

    def __init__(self, net: Any, device: str) -> None:
        super().__init__()
        self.grid, self.image_size, self.device = net.grid, net.grid, torch.device(device)
        self.context_length, self.vocab = net.text_length, net.text_vocab

    def decode(self, codes: Tensor) -> Tensor:
        side = self.grid
        return codes.view(len(codes), 1, side, side).expand(-1, 3, -1, -1).float()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.randint(1, self.vocab, (len(captions), self.context_length))

    def too_long(self, caption: str) -> bool:
        return False


def bytes_a_code(net: Any, streams: int, length: float) -> float:
    """What has to be read for one code, in 16 bits: layers, head, and keys and values of `length` tokens."""
    weights = sum(p.numel() for p in net.layers.parameters()) + net.image_vocab * net.width
    cache = 2 * streams * length * len(net.layers) * net.width
    return 2 * (weights + cache)


def ways(stage: Stage, wanted: Sequence[str]) -> Iterator[str]:
    """Readies a stage in one way after the other, as pipelines do in bf16."""
    holder = Drawing()
    holder.stage = stage
    for how in wanted:
        holder.prepare("bf16", how)
        yield how


def drawing(
    job: Job, stage: Stage, n: int, guidance: float, codes: int, wanted: Sequence[str]
) -> dict[str, float]:
    """Seconds for one code, by way: by the pipeline, as `dalle sample precision=bf16`, and in the last way
    also by the stage alone, with noise that is drawn on the device.
    """
    net = stage.net.eval()
    tools = Codes(net, job.device)
    pipeline = DallePipeline(stage, tools, tools)
    options = {"guidance": guidance, "temperature": 1.0}
    batch = {"text": tools([""] * n).to(job.device)}

    def known(codes: int) -> list[int]:
        first = (net.codes - codes) // 2
        return [-1 if first <= i < first + codes else 0 for i in range(net.codes)]

    def by_pipeline(codes: int) -> None:
        pipeline.sample([""] * n, batch_size=n, precision="bf16", dalle=options, known=known(codes))

    def by_stage(codes: int) -> None:
        given = torch.tensor(known(codes), device=job.device).expand(n, -1)
        with torch.autocast(job.device, torch.bfloat16):
            stage.sample(batch, known=given, **options)

    found: dict[str, float] = {}

    def measured(name: str, run: Callable[[int], None]) -> None:
        run(
            min(codes, WARM_CODES) if name == "autocast" else codes
        )  # graphs are recorded as they are reached
        found[name] = seconds(job.device, partial(run, codes)) / codes
        job.note(seconds_a_code=found)

    for how in ways(stage, wanted):
        measured(how, by_pipeline)
    measured("noise on it", by_stage)
    return found


def transformer(job: Job, n: int) -> dict[str, Any]:
    stage, _ = made(job, "dalle_1b")
    peak(job.device)
    net = stage.net
    codes = min(DRAWN, net.codes) if not job.tiny else 4
    found = drawing(job, stage, n, 1.0, codes, ("none", "graphs", "full"))
    least = bytes_a_code(net, n, net.text_length + net.codes / 2)
    return {
        "text": ", ".join(f"{name} {1000 * took:.2f} ms a code" for name, took in found.items()),
        "ms_a_code": {name: 1000 * took for name, took in found.items()},
        "bytes_a_code": least,
        "batch": n,
        "peak_gib": peak(job.device),
    }


def llamagen(job: Job, name: str) -> dict[str, Any]:
    width, depth, heads = (32, 2, 2) if job.tiny else LLAMAGEN[name]
    grid = 4 if job.tiny else 24
    stage, _ = made(
        job, "dalle_1b", "model/net=llama", f"model.net.width={width}", f"model.net.depth={depth}",
        f"model.net.heads={heads}", f"model.net.grid={grid}", "model.net.text_length=2",
        f"model.net.image_vocab={TEXT_VOCAB}", "model.net.text_vocab=1000",
    )  # fmt: skip
    peak(job.device)
    n = 8
    found = drawing(job, stage, n, 4.0, grid**2, ("graphs", "full"))
    rates = {name: n / (took * grid**2) for name, took in found.items()}
    return {
        "text": ", ".join(f"{name} {rate:.2f} pictures/s" for name, rate in rates.items()),
        "parameters": count(stage.net),
        "pictures_per_second": rates,
        "batch": n,
        "peak_gib": peak(job.device),
    }


def diffusion(job: Job, name: str, n: int) -> dict[str, Any]:
    """Steps of DDIM without guidance, so that one is one call of the network."""
    stage, _ = made(job, name)
    stage.eval()
    peak(job.device)
    n, steps = (2, 2) if job.tiny else (n, DIFFUSION_STEPS)
    batch, run = batch_for(job, stage, n), Sampler("ddim", steps)

    def sample() -> None:
        stage.sample(batch, sampler=run, guidance=1.0, **({"candidates": 1} if name == "prior" else {}))

    found: dict[str, float] = {}
    with torch.autocast(job.device, torch.bfloat16):
        for how in ways(stage, ("none", "graphs") if name == "unet" else ("none", "graphs", "full")):
            sample()
            found[how] = steps / statistics.median(seconds(job.device, sample) for _ in range(3))
            job.note(steps_per_second=found)
    return {
        "text": ", ".join(f"{how} {rate:.1f}" for how, rate in found.items()) + f" steps/s, batch {n}",
        "steps_per_second": found,
        "batch": n,
        "peak_gib": peak(job.device),
    }


def transformers_peer(job: Job) -> dict[str, Any]:
    """transformers' Llama of the 1.24B transformer's size, `generate` with its static cache."""
    if importlib.util.find_spec("transformers") is None:
        return {"text": "transformers is not there"}
    from transformers import LlamaConfig, LlamaForCausalLM

    width, depth, heads = (32, 2, 2) if job.tiny else (2048, 24, 16)
    drawn, prompt = (4, 8) if job.tiny else (DRAWN, 128 + 512 - DRAWN // 2)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=64 * (width // 24), num_hidden_layers=depth,
        num_attention_heads=heads, max_position_embeddings=2048, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with torch.device(job.device):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    found: dict[str, float] = {}
    for n in (1, 16):
        ids = torch.randint(1, 8192, (n, prompt), device=job.device)
        options = {"max_new_tokens": drawn, "min_new_tokens": drawn, "do_sample": True, "top_k": 0}
        run = partial(model.generate, ids, cache_implementation="static", **options)
        run()
        found[f"batch {n}"] = 1000 * seconds(job.device, run) / drawn
        job.note(ms_a_code=found)
    text = ", ".join(f"{name} {took:.2f} ms a code" for name, took in found.items())
    return {"text": text, "ms_a_code": found, "parameters": count(model)}


AHEAD = ("unet", "prior", "dit", "dalle_1b")
PARTS: dict[str, dict[str, Case]] = {
    "ahead": {name: Case(partial(ahead, name=name), limit=150) for name in AHEAD},
    "speed": {
        "card": Case(card, needs=5),
        # what was never timed on a GPU comes first
        "train unet": Case(partial(training, name="unet"), needs=15, limit=45),
        "sample dalle_1b 1": Case(partial(transformer, n=1), needs=15, limit=75),
        "train prior": Case(partial(training, name="prior"), needs=15, limit=45),
        "sample 343M": Case(partial(llamagen, name="343M"), needs=15, limit=60),
        "train dalle_1b sparse": Case(partial(training, name="dalle_1b sparse"), needs=20, limit=75),
        "sample unet": Case(partial(diffusion, name="unet", n=16), needs=10, limit=30),
        "sample prior": Case(partial(diffusion, name="prior", n=16), needs=10, limit=30),
        "sample 1.4B": Case(partial(llamagen, name="1.4B"), needs=25, limit=75),
        "train dit": Case(partial(training, name="dit"), needs=15, limit=45),
        "sample dalle_1b 16": Case(partial(transformer, n=16), needs=15, limit=75),
        "train dalle_1b": Case(partial(training, name="dalle_1b"), needs=15, limit=75),
        "sample dit": Case(partial(diffusion, name="dit", n=16), needs=10, limit=30),
        "transformers": Case(transformers_peer, needs=30, limit=75),
    },
}


def table(results: Results) -> list[str]:
    """A line for each case."""
    found = results.get("speed", {})
    about = found.get("card", {})
    rate, read = about.get("tflops"), about.get("tb_per_second")
    lines = []
    for name, result in found.items():
        if result["status"] in ("FAIL", "skipped") and not (
            "eager" in result or "steps_per_second" in result
        ):
            continue
        parts = [f"{name}:"]
        for phase in ("eager", "compiled"):
            if phase in result:
                own = result[phase]
                share = f" ({own['tflops'] / rate:.0%})" if rate else ""
                parts.append(
                    f"{phase} {own['ms']:.0f} ms {own['tflops']:.0f} TFLOP/s{share} {own['peak_gib']} GiB;"
                )
        if "ms_a_code" in result and "bytes_a_code" in result:
            least = result["bytes_a_code"]
            parts += [
                f"{way} {ms:.2f} ms a code" + (f" ({least / ms / read / 1e9:.0%})" if read else "") + ";"
                for way, ms in result["ms_a_code"].items()
            ]
            parts.append(f"{result['peak_gib']} GiB")
        else:
            parts.append(result.get("text", ""))
        lines.append(" ".join(parts))
    return lines
