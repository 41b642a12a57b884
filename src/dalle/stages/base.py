"""What all stages share: a step that gives the loss, its logging, and the optimizer.

A stage is the system around a network (loss, conditioning, sampling), never the network itself, and holds
nothing
frozen: its checkpoint, its moving average and its gradients see only what is trained.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from dalle.data.batch import Batch
from dalle.errors import UserError
from dalle.finite import not_finite
from dalle.optim.factory import OptimizerFactory, can_skip
from dalle.sharded import clip_sharded, gather, release
from dalle.stages.nan_guard import PATIENCE, Diverged, Guard, kept_buffers, worth_keeping

VALIDATION_SEED = 20240229  # noise, times and dropped conditions are the same in every validation
NO_NUMBER = "had a loss or a gradient that is no number"


class Stage(lightning.LightningModule):
    """A trained thing. A subclass sets `net`, implements `step`, and `sample` where it can make something."""

    net: Any  # an nn.Module with what `dalle.nets.interfaces` says of its stage's
    least_batch = 1  # pairs, pictures ... of a step, over all ranks
    makes_images = False  # whether `sample` gives pictures
    clip: float | None = None  # trainer.gradient_clip_val of a stage that steps by itself: `manual_step`
    adapters: Callable[[], Any] | None = None  # merges what trains beside the network: dalle.training.lora
    patience: int = PATIENCE  # steps in a row without numbers that end a run

    def __init__(self, optimizer: OptimizerFactory | None = None) -> None:
        super().__init__()
        self.recipe, self.guard = optimizer, Guard()

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """The loss under ``"loss"`` and whatever else is worth logging; only scalars are logged."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        self.seed = torch.initial_seed()

    def sample(self, batch: Batch, **options: Any) -> Tensor:
        """What a stage that can make something makes for a batch; `randn=` draws its noise."""
        raise NotImplementedError

    def speed_up(self, how: str) -> None:
        """Prepares `sample` for many batches with the weights and device of now, if the stage can: `graphs`
        fixes shapes, and on a GPU a step is a CUDA graph; `full` also compiles it; `none` undoes this.
        """

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self.seed_batch()
        out = self.step(batch)
        self.log_scalars("train", out, batch)
        return {k: self.guard.marked(v) if k == "loss" else v.detach() for k, v in out.items()}

    def seed_batch(self) -> None:
        """All that is random in batch n of rank r depends on (seed, r, n) alone: a resumed run draws what an
        uninterrupted one would have drawn, and no two ranks or batches draw the same.
        """
        seen: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        torch.manual_seed(hash((self.seed, self.global_rank, seen.processed)))

    def make_alike(self) -> None:
        """Before a validation or a test, after a moving average was put in: all ranks get the first one's
        running statistics, of which a checkpoint keeps no others, and all weights of a sharded network. For
        sampling and testing call more of a network than its `forward`, and not on all ranks as often.
        """
        gather(self.net)
        if self.trainer.world_size > 1:
            for _, _, buffer in kept_buffers(self):
                torch.distributed.broadcast(buffer, 0)

    def on_validation_start(self) -> None:
        self.make_alike()

    def on_validation_end(self) -> None:
        release(self.net)

    def on_test_start(self) -> None:
        self.make_alike()

    def on_test_end(self) -> None:
        release(self.net)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate("test", batch, batch_idx)

    def _evaluate(self, split: str, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(VALIDATION_SEED + batch_idx + 100_003 * self.global_rank)
            out = self.step(batch)
        self.log_scalars(split, out, batch)
        return out

    def log_scalars(self, split: str, values: dict[str, Tensor], batch: Batch) -> None:
        """Logs every zero-dimensional value as ``<split>/<key>``; tensors as they are: no host sync."""
        size = next(len(v) for v in batch.values() if isinstance(v, Tensor | list))
        self.log_dict(
            {f"{split}/{key}": value.detach() for key, value in values.items() if value.ndim == 0},
            prog_bar=True,
            batch_size=size,
            on_step=split == "train",
            on_epoch=split != "train",
            sync_dist=split != "train",
        )

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, and logs the norm there was before. Lightning itself logs none, refuses fused optimizers
        under any autocast, and cannot clip shards by their norm.
        """
        by_norm = gradient_clip_algorithm in (None, "norm")  # None: a Trainer that was not told
        limit = gradient_clip_val if gradient_clip_val and by_norm else torch.inf
        weights = list(self.net.parameters())
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        norm = (clip_sharded if sharded else clip_grad_norm_)(weights, limit)
        self.log("train/grad_norm", norm)
        if self.guard.deferred:
            self.guard.decide(norm, optimizer)
        elif not self.guard.passes(norm):
            return self.guard.leave_out(weights)
        if not by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_start(self) -> None:
        trainer = self.trainer
        self.guard.deferred = (
            self.device.type == "cuda"
            and trainer.precision != "16-mixed"  # whose scaler waits for the device anyway
            and not isinstance(trainer.strategy, ModelParallelStrategy)
            and all(can_skip(optimizer) for optimizer in trainer.optimizers)
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.guard.begin(self)
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_forward_param_sync = True  # of buffers, which manual optimization switches off

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        for p in self.parameters():  # else kept beside a validation, and what the next forward pass keeps
            p.grad = None
        self.guard.end()
        self.log("train/skipped", torch.full((), float(self.guard.skipped), device=self.device))
        if self.guard.news:
            self.tell_of_skipped(batch)

    def on_train_end(self) -> None:
        self.guard.read()
        self.check_worth_keeping()
        if 2 * self.guard.skipped > self.global_step and self.trainer.precision != "16-mixed":
            self.diverged(f"{self.guard.skipped} of {self.global_step} steps {NO_NUMBER}", {})

    def tell_of_skipped(self, batch: Batch) -> None:
        """Says so when a step is left out for the first time, and ends the run when too many are in a row."""
        guard, step = self.guard, self.guard.news[-1]
        guard.news.clear()
        if guard.in_a_row >= self.patience:
            first = step - guard.in_a_row + 1
            self.diverged(f"step {first} and all {guard.in_a_row - 1} steps after it {NO_NUMBER}", batch)
        # fp16 leaves out steps as a matter of course
        if guard.skipped == 1 and self.trainer.is_global_zero and self.trainer.precision != "16-mixed":
            print(f"\ncareful: step {step} {NO_NUMBER}; train/skipped counts such steps", flush=True)

    def check_worth_keeping(self) -> None:
        """
        Raises:
            Diverged: the weights are no numbers, or far larger than any that work. On all ranks alike.
        """
        if not self.trainer.strategy.reduce_boolean_decision(worth_keeping(self)):
            self.diverged(f"by step {self.global_step} the weights have diverged", {})

    def diverged(self, what: str, batch: Batch | dict[str, Any]) -> NoReturn:
        """Ends a run that has come to nothing, in one line of one rank.

        Args:
            batch: the last one, in which the cause may lie.
        """
        if not self.trainer.is_global_zero:
            raise SystemExit(1)
        lr = self.trainer.optimizers[0].param_groups[0]["initial_lr"]
        causes = [f"optimizer.lr={lr:g} is too high", f"precision={self.trainer.precision} too coarse"]
        if spoilt := not_finite(batch):
            causes.insert(0, f"the data are broken ({', '.join(spoilt)} of the last batch)")
        path = getattr(self.trainer.checkpoint_callback, "path", None)
        kept = (
            f"the last good checkpoint is {path}" if path and path.exists() else "there is no checkpoint yet"
        )
        raise Diverged(f"{what}; likely {', or '.join(causes)}; {kept}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "guard" in checkpoint:
            self.guard.load_state_dict(checkpoint["guard"])

    def configure_optimizers(self) -> Any:
        if self.recipe is None:
            raise RuntimeError("this stage was loaded for use, without an optimizer; dalle train makes one")
        optimizer, schedule = self.recipe.build(self.net, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Stages with several optimizers set `automatic_optimization = False` and call `manual_step` in their own
    # `training_step`. Optimizer 0 is that of `net`: its steps are `trainer.global_step`.

    def check_trainer(self, trainer: Any) -> None:
        """Refuses what a stage that steps by hand, or FSDP, cannot do.

        Raises:
            UserError: naming the setting.
        """
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        if sharded and any(p.ndim == 0 for p in self.net.parameters()):
            raise UserError("trainer=fsdp cannot shard a network with a scalar weight; take trainer=ddp")
        if sharded and self.recipe and self.recipe.is_muon:
            raise UserError(
                "optimizer=muon needs whole matrices, and trainer=fsdp shards them; take optimizer=adamw"
            )
        fused = self.recipe and "fused" in self.recipe.known and self.recipe.options.get("fused")
        if trainer.precision == "16-mixed" and fused:
            raise UserError("optimizer.fused=true would clip gradients that fp16 has scaled; leave it out")
        refused = {
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches != 1,
            "trainer.gradient_clip_algorithm=value": trainer.gradient_clip_algorithm == "value",
            "precision=fp16": trainer.precision == "16-mixed",
            "trainer=fsdp": sharded,
        }
        for setting in [setting for setting, given in refused.items() if given]:
            if not self.automatic_optimization:
                raise UserError(f"{setting} does not go with a stage of several optimizers; leave it out")

    def configure_callbacks(self) -> list[Any]:
        """Lightning's first call to a stage: takes over the clipping that it will not do for such a one."""
        trainer: Any = self.trainer
        if not self.automatic_optimization and trainer.gradient_clip_val is not None:
            self.clip, trainer.gradient_clip_val = trainer.gradient_clip_val, None
        return []

    def manual_step(self, loss: Tensor, net: nn.Module, which: int) -> Tensor:
        """One step of optimizer `which` and its schedule down the gradient of `loss` in the weights of `net`.

        Gradients of other networks that the loss runs through are neither computed nor kept.

        Returns: the norm of the gradient before it is clipped to `trainer.gradient_clip_val`.
        """
        weights = [p for p in net.parameters() if p.requires_grad]
        optimizers: Any = self.optimizers(use_pl_optimizer=which == 0)  # Lightning's wrapper counts steps
        schedules: Any = self.lr_schedulers()
        norm = torch.full_like(loss, torch.nan)
        if not self.guard.left_out:  # else nothing of this batch is worth a step
            for p, grad in zip(weights, self.gradients(loss, weights, which), strict=True):
                # in the weight's layout, as backward() would: fused optimizers go through memory, not indices
                p.grad = torch.empty_like(p).copy_(grad)
            norm = clip_grad_norm_(weights, self.clip or torch.inf)
        if self.guard.deferred:
            self.guard.decide(norm, self.trainer.optimizers[which], which)
        elif self.guard.left_out or not self.guard.passes(norm, which):
            self.guard.leave_out(weights)
        optimizers[which].step()
        schedules[which].step()
        for p in weights:
            p.grad = None
        return norm

    def gradients(self, loss: Tensor, weights: list[nn.Parameter], which: int) -> Sequence[Tensor]:
        """The gradient of the loss of optimizer `which` over all ranks."""
        with torch.autocast(loss.device.type, enabled=False):
            grads = torch.autograd.grad(self.guard.marked(loss, which), weights, materialize_grads=True)
        if self.trainer.world_size == 1:
            return grads
        # DDP itself awaits gradients of all networks at once
        flat = self.trainer.strategy.reduce(torch.cat([g.flatten() for g in grads]), reduce_op="mean")
        parts = flat.split([g.numel() for g in grads])
        return [part.view_as(g) for part, g in zip(parts, grads, strict=True)]
