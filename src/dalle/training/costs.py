"""What a training would take on machines that are not here: memory of a device and time of a step.

A network without memory (torch's meta device) takes one step: its operations and what it keeps for the
backward pass are counted. All else is arithmetic on stated rates; nothing here was measured on such machines.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle.errors import UserError
from dalle.ranges import Positive, PositiveInt, Share
from dalle.training.fsdp import blocks
from dalle.training.memory import Saved
from dalle.training.preflight import count

SIMULATED = 2  # items in the step that is counted
WIDE = 4  # bytes of a number in fp32, HALF: in bf16
HALF = 2


@dataclass(frozen=True)
class Device:
    """A device and its neighbours; to begin with an H100 of 80 GB, eight in a machine.

    Args:
        memory: bytes.
        rate: bf16 operations per second of the matrix units, by the data sheet.
        share: of that rate which a training reaches.
        stream: bytes per second of its own memory.
        near, far: bytes per second, one way, to others in the machine, and to other machines.
        machine: devices in one.
    """

    memory: Positive = 80e9
    rate: Positive = 989e12
    share: Share = 0.4
    stream: Positive = 3.35e12
    near: Positive = 450e9
    far: Positive = 50e9
    machine: PositiveInt = 8


@dataclass(frozen=True)
class Step:
    """What was counted of a stage.

    Attributes:
        parameters: trained. block, rest: of the largest block, and outside all blocks.
        flops: of an item, forward and backward. kept: bytes that it keeps for the backward pass, in bf16.
        recomputed: the same two with each block recomputed; None: the network cannot.
        batch: items of a step, over all devices. steps: of the training.
        average: whether there is a moving average. caches: whether parts of a batch go through it one by one,
            twice, as for CLIP's loss, which needs the whole batch.
        shards: whether the network can be sharded.
    """

    parameters: int
    block: int
    rest: int
    flops: float
    kept: float
    recomputed: tuple[float, float] | None
    batch: int
    steps: int
    average: bool
    caches: bool
    shards: bool = True


@dataclass(frozen=True)
class Plan:
    """A way to train on so many devices: the fastest that fits them.

    Attributes:
        strategy: ddp, or fsdp2_bf16. recompute: of blocks. part: items at once on a device; `parts` of them
            make its share of a step. state, kept: bytes. compute, traffic: seconds of a step.
        seconds: of a step; traffic is hidden behind the computing of what it need not wait for.
    """

    devices: int
    strategy: str
    recompute: bool
    part: int
    parts: int
    state: float
    kept: float
    compute: float
    traffic: float
    seconds: float


def meta_batch(stage: str, sizes: dict[str, Any], net: Any) -> dict[str, Any]:
    """A batch of `SIMULATED` items of nothing, as the stage's DataModule would give it."""
    b, side = SIMULATED, sizes["image_size"]
    text = {"text": (b, sizes.get("context_length") or sizes.get("text_length") or 1)}
    embeds = {"image_embed": (b, sizes.get("embed_dim", 1)), "text_embed": (b, sizes.get("embed_dim", 1))}
    length = text["text"][1]
    states = {"text_hidden": (b, length, sizes.get("text_width", 1)), "text_mask": (b, length)}
    image = {"image": (b, 3, side, side)}
    needed: dict[str, dict[str, tuple[int, ...]]] = {
        "clip": {**image, **text},
        "prior": {**embeds, **states, **text},
        "ar_prior": {**embeds, **states},
        "decoder": {**image, **embeds, **states},
        "upsampler": {**image, "low": (b, 3, *[side // getattr(net, "factor", 1)] * 2)},
        "dvae": image,
        "vae": image,
        "dalle": {**text, "codes": (b, sizes.get("grid", 1) ** 2)},
    }
    if stage not in needed:
        raise UserError(f"costs of model={stage} are not known: it takes several steps by hand")
    kinds = {"text": torch.int64, "codes": torch.int64, "text_mask": torch.bool}
    return {
        name: torch.empty(shape, dtype=kinds.get(name, torch.float32), device="meta")
        for name, shape in needed[stage].items()
    }


@contextmanager
def without_a_device() -> Iterator[None]:
    """What the meta device lacks: a kernel of attention (here one that keeps no scores), and autocast."""
    attention, autocast = F.scaled_dot_product_attention, torch.autocast

    def flash(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **_: Any
    ) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    F.scaled_dot_product_attention = flash
    torch.autocast = lambda *_, **__: nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.autocast = attention, autocast


def counted(stage: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Operations of an item, and bytes that it keeps in bf16, of a stage on the meta device."""
    saved = Saved({p.untyped_storage()._cdata for p in stage.parameters()})
    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor)
    stage.train()
    with without_a_device(), torch.device("meta"), counter, hooks:
        stage.step(batch)["loss"].backward()
    for p in stage.parameters():
        p.grad = None
    return counter.get_total_flops() / SIMULATED, saved.peak / SIMULATED * HALF / WIDE


def simulate(config: dict[str, Any], stage: Any, sizes: dict[str, Any]) -> Step:
    """Counts a step of a stage that was built on the meta device.

    Args:
        sizes: of its DataModule.

    Raises:
        UserError: it takes several optimizers.
    """
    net: nn.Module = stage.net
    batch = meta_batch(config["stage"], sizes, net)
    able: list[Any] = [module for module in net.modules() if "checkpoint" in vars(module)]
    ways = []
    for recompute in (False, True) if able else (False,):
        for module in able:
            module.checkpoint = recompute
        ways.append(counted(stage, batch))
    layers = [count(block) for block in blocks(net)]
    ema = config["callbacks"].get("ema")
    return Step(
        parameters=count(stage),
        block=max(layers, default=0),
        rest=count(stage) - sum(layers),
        flops=ways[0][0],
        kept=ways[0][1],
        recomputed=ways[1] if able else None,
        batch=config["batch_size"],
        steps=config["trainer"]["max_steps"],
        average=bool(ema and "_target_" in ema),
        caches=config["stage"] == "clip",
        shards=all(p.ndim for p in net.parameters()),
    )


def plans(step: Step, devices: int, device: Device) -> list[Plan]:
    """All ways that fit, the fastest first; shards only where they save a twentieth."""
    made = []
    for strategy in ("ddp", "fsdp2_bf16") if step.shards else ("ddp",):
        for recompute in (False, True) if step.recomputed else (False,):
            plan = planned(step, devices, device, strategy, recompute)
            made += [plan] if plan else []
    return sorted(made, key=lambda plan: plan.seconds * (1 if plan.strategy == "ddp" else 20 / 19))


def planned(step: Step, devices: int, device: Device, strategy: str, recompute: bool) -> Plan | None:
    """One way; None where it does not fit."""
    flops, kept = step.recomputed if recompute and step.recomputed else (step.flops, step.kept)
    p, own = step.parameters, -(-step.batch // devices)
    state = p * WIDE * (4 + step.average)  # weights, gradients, two moments
    if strategy == "ddp":
        state += p * WIDE + p * HALF  # buckets of gradients; weights in bf16 for the backward pass
    else:
        # two blocks gathered, one of them with its gradient, and what is outside of blocks
        state = state / devices + (step.rest + 2 * step.block) * HALF + (step.rest + step.block) * WIDE
    part = min(own, int((0.9 * device.memory - state) / kept))  # a tenth is for fragments and kernels
    if part < 1:
        return None
    parts = -(-own // part)
    part = -(-own // parts)
    if step.caches and parts > 1:
        flops *= 4 / 3  # forward twice
    speed = device.near if devices <= device.machine else device.far
    moved = (devices - 1) / devices * p
    compute = own * flops / (device.rate * device.share)
    if strategy == "ddp":
        traffic = 2 * WIDE * moved / speed
        hidden = compute / parts * 2 / 3  # behind the last backward pass
        update = p
    else:
        rounds = 1 if step.caches else parts
        traffic = rounds * (2 * HALF + WIDE) * moved / speed
        hidden, update = compute, p / devices
    streamed = update * WIDE * (7 + 2 * step.average) / device.stream  # the optimizer reads and writes
    seconds = compute + max(0.0, traffic - hidden) + streamed
    return Plan(devices, strategy, recompute, part, parts, state, part * kept, compute, traffic, seconds)


def table(name: str, step: Step, numbers: Sequence[int], device: Device) -> list[str]:
    """Rows of a Markdown table: the fastest way for each number of devices."""
    rows = []
    for devices in numbers:
        if devices > step.batch:
            rows.append(f"| `{name}` | {devices:,} | - | more devices than items in a step | | | | |")
            continue
        found = plans(step, devices, device)
        if not found:
            rows.append(f"| `{name}` | {devices:,} | - | does not fit | | | | |")
            continue
        plan = found[0]
        cells = [
            plan.strategy + (", recomputed" if plan.recompute else ""),
            f"{plan.parts} x {plan.part:,}",
            f"{plan.state / 1e9:.1f} + {plan.kept / 1e9:.1f}",
            f"{1e3 * plan.compute:,.0f} / {1e3 * plan.traffic:,.0f}",
            f"{1e3 * plan.seconds:,.0f}",
            f"{plan.seconds * step.steps / 86_400:,.1f}",
        ]
        rows.append(f"| `{name}` | {devices:,} | {' | '.join(cells)} |")
    return rows


HEAD = (
    "| preset | devices | fastest way that fits | parts x items | memory, GB: state + activations | "
    "computing / traffic, ms | step, ms | days |",
    "|---|---|---|---|---|---|---|---|",
)


def described(device: Device) -> str:
    """The assumptions, in one line."""
    return (
        f"devices of {device.memory / 1e9:g} GB and {device.rate / 1e12:g} TFLOP/s in bf16, of which "
        f"{device.share:.0%} are reached; {device.stream / 1e12:g} TB/s of memory, "
        f"{device.near / 1e9:g} GB/s inside machines of {device.machine}, "
        f"{device.far / 1e9:g} GB/s between them"
    )


def settings() -> list[str]:
    """What can be said of a device."""
    return [field.name for field in dataclasses.fields(Device)]
