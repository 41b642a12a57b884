"""The exponential moving average of a network's weights (EMA), as a callback."""

from typing import Any

import lightning
import torch
from torch import Tensor

from dalle.ranges import Decay, PositiveInt
from dalle.sharded import all_whole, local, release, sharded_as
from dalle.stages.base import Stage
from dalle.training.restorable import alike_tensors
from dalle.weight_names import as_today


class Ema(lightning.Callback):
    """Exponential moving average of the trained network only; validation, tests and samples use it.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights are
    forgotten soon. A step that the NaN guard leaves out is no update; on a GPU, where that is known too late,
    the average comes nearer to weights that have not moved. Integer and boolean buffers are copied. Averages
    of half weights are in fp32: in 8 bits none would ever move.
    """

    def __init__(self, decay: Decay = 0.998, every: PositiveInt = 1) -> None:
        self.decay, self.every = decay, every
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self.live: dict[str, Tensor] | None = None
        self.seen = 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        state = _tensors(pl_module)
        old = self.average
        self.average = {
            k: sharded_as(old.get(k, v), v).detach().to(v.device, averaged(v.dtype), copy=True)
            for k, v in state.items()
        }

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.seen = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Stage, *_: Any) -> None:
        step = trainer.global_step
        if step == self.seen or step % self.every:
            return  # a batch of an accumulated step: the weights have not moved
        self.seen = step
        if pl_module.guard.left_out:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        state = _tensors(pl_module)
        floating = [k for k, v in state.items() if v.is_floating_point()]
        averages = [local(self.average[k]) for k in floating]
        weights = [local(state[k]).to(averaged(state[k].dtype)) for k in floating]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for key in state.keys() - set(floating):
            self.average[key].copy_(state[key])

    @torch.no_grad()
    def swap_in(self, pl_module: Stage) -> None:
        """Puts the average into the network; the live weights wait in `self.live`."""
        if self.average and self.live is None:
            release(pl_module.net)
            state = _tensors(pl_module)
            self.live = {k: local(v).detach().clone() for k, v in state.items()}
            for key, value in state.items():
                local(value).copy_(local(self.average[key]))

    @torch.no_grad()
    def swap_out(self, pl_module: Stage) -> None:
        if self.live is not None:
            release(pl_module.net)
            for key, value in _tensors(pl_module).items():
                local(value).copy_(self.live[key])
            self.live = None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.swap_out(pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.swap_in(pl_module)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: Stage) -> None:
        self.swap_out(pl_module)

    def on_exception(self, trainer: lightning.Trainer, pl_module: Stage, exception: BaseException) -> None:
        self.swap_out(pl_module)  # stopped inside a validation: the checkpoint must hold the live weights

    def state_dict(self) -> dict[str, Any]:
        return {"average": all_whole(self.average), "updates": self.updates}

    def fits(self, state: dict[str, Any], pl_module: Stage) -> bool:
        """Whether a saved state is that of an average of this stage."""
        average, own = as_today(state["average"], pl_module.net), _tensors(pl_module)
        return average.keys() == own.keys() and all(alike_tensors(average[k], own[k]) for k in own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.updates = state_dict["average"], state_dict["updates"]


def averaged(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of a type are averaged."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _tensors(stage: Stage) -> dict[str, Tensor]:
    return {**dict(stage.net.named_parameters()), **dict(stage.net.named_buffers())}
