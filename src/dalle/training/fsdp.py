"""FSDP2: weights, gradients, optimizer and moving average in shards, for networks that do not fit one device.

`torch.distributed.fsdp.fully_shard` (Zhao et al. 2023, FSDP; ZeRO-3) by block, under Lightning's strategy for
it. What differs from that one: a checkpoint is the same single file that any other run leaves, so a run can
go on with or without shards, and on another number of ranks.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from dalle.errors import UserError
from dalle.sharded import all_whole, release, sharded_as
from dalle.stages.nan_guard import kept_buffers

ENTRANCES = (
    "forward",
    "prefix",
    "prefill",
    "step",
    "encode",
    "decode",
    "logits",
    "likelihood",
)  # to a network


class FullyShard(ModelParallelStrategy):
    """Shards the network of a stage.

    Args:
        half: gather weights in bf16, at half the traffic and memory: what autocast would keep in fp32, norms
            of blocks and logits, is then of bf16 weights. Gradients are added up in fp32 either way.
        hybrid: shard inside each machine, and copy from one machine to the others.
    """

    def __init__(self, half: bool = False, hybrid: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.half, self.hybrid = half, hybrid

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # whole weights go into a whole network, which is then sharded

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: lightning.Trainer) -> None:
        stage: Any = self.lightning_module
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(stage)
        if not isinstance(stage.net, FSDPModule):
            self.shard(stage.net)
        stage.to(self.root_device)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def shard(self, net: nn.Module) -> None:
        kind, per_machine = self.root_device.type, self.num_processes
        sizes = (self.num_nodes, per_machine) if self.hybrid else (self.world_size,)
        mesh = init_device_mesh(kind, sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
        full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = dataclasses.replace(full, param_dtype=torch.bfloat16) if self.half else full
        net.to(memory_format=torch.contiguous_format)  # a shard of channels_last has no first dimension
        layers = [*blocks(net)]
        inside = {module for layer in layers for module in layer.modules()}
        for module in net.modules():  # of conditions, which come in fp32
            if self.half and isinstance(module, nn.LayerNorm) and module not in inside:
                fully_shard(module, mesh=mesh, mp_policy=full, reshard_after_forward=True)
        for module in (*layers, net):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for name in ENTRANCES if self.half else ():  # callbacks draw outside of Lightning's autocast
            if hasattr(net, name):
                setattr(net, name, torch.autocast(kind, torch.bfloat16)(getattr(net, name)))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        stage: Any = self.lightning_module
        for _, _, buffer in kept_buffers(stage):  # as DDP does
            torch.distributed.broadcast(buffer, 0)
        return super().training_step(*args, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return all_whole(self.lightning_module.state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return all_whole(inner.state_dict(), self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    key: sharded_as(value, weights[number]) if value.shape == weights[number].shape else value
                    for key, value in kept.items()
                }
                for number, kept in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def on_exception(self, exception: BaseException) -> None:
        stage: Any = self.lightning_module
        release(stage.net)
        super().on_exception(exception)


def check(config: Mapping[str, Any]) -> None:
    """Refuses what does not go with shards.

    Raises:
        UserError: naming the setting.
    """
    strategy, precision = config["trainer"].get("strategy"), config["trainer"].get("precision")
    if strategy == "fsdp":
        raise UserError("trainer.strategy=fsdp is FSDP's first version; give trainer=fsdp, which is fsdp2")
    if not str(strategy).startswith("fsdp2"):
        return
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision={precision} does not go with trainer=fsdp; give precision=bf16 or fp32")
    if (config.get("lora") or {}).get("rank"):
        raise UserError("lora.rank does not go with trainer=fsdp; what trains is small: take trainer=ddp")
    if config.get("compile"):
        raise UserError("compile=true was never tried with trainer=fsdp; leave it out")


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """What is gathered and freed together: the layers in a network's lists, of the outermost ones."""
    for child in net.children():
        if isinstance(child, nn.ModuleList):
            for layer in child:
                yield from blocks(nn.ModuleList([layer])) if isinstance(layer, nn.ModuleList) else [layer]
        elif not isinstance(child, nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            yield from blocks(child)


StrategyRegistry.register("fsdp2", FullyShard, "shards over all devices")
StrategyRegistry.register("fsdp2_bf16", FullyShard, "and gathers weights in bf16", half=True)
StrategyRegistry.register("fsdp2_hybrid", FullyShard, "shards inside each machine only", hybrid=True)
