"""VQGAN's training (Esser et al. 2021, sec. 3.1): codes whose pictures look right, not only near.

    G: |x - G(x)| + perceptual distance + lambda * (-D(G(x))) + commitment; or (x - G(x))^2 for the first
    D: hinge loss, (relu(1 - D(x)) + relu(1 + D(G(x)))) / 2
    lambda = weight * |grad of the first two| / |grad of -D|, both at the last layer of the decoder

The discriminator joins at `disc_start`. It is of use in training alone: it is in the checkpoint, but not in
the saved weights. What differs from the release: the commitment weight is where VQ-VAE has it, on the
encoder's side; there the default puts it on the codebook's.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle.data.batch import Batch
from dalle.errors import UserError
from dalle.nets.interfaces import VQGANNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import NonNegativeInt, Weight
from dalle.stages.base import Stage

AUTOENCODER, DISCRIMINATOR = 0, 1  # the optimizers


class VQGANStage(Stage):
    """Trains `net` to encode pictures as codes and to draw them again.

    Args:
        net: `nets.vqgan.VQGAN` or another `VQGANNet`.
        discriminator: (B, 3, H, W) -> logits of patches.
        perceptual: makes a distance of two batches of pictures -> (B,); called when training begins.
        optimizer: the recipe of both networks.
        pixel_loss: l1, the absolute error, or mse, the squared one: VQ-VAE's, blind to texture and quick.
        perceptual_weight: of that distance, beside the pixels' error; 0: it is not computed.
        adversarial_weight: of the discriminator's opinion, before the adaptive weight; 0: there is none.
        disc_start: step at which the discriminator joins.
    """

    codebook_advice = "raise model.net.dead_below, lower model.net.vocab_size, or lower optimizer.lr"

    def __init__(
        self,
        net: nn.Module,
        discriminator: nn.Module,
        perceptual: Callable[[], nn.Module],
        disc_start: NonNegativeInt,
        optimizer: OptimizerFactory | None = None,
        pixel_loss: Literal["l1", "mse"] = "l1",
        perceptual_weight: Weight = 1.0,
        adversarial_weight: Weight = 0.8,
    ) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.net: Any = check_interface(net, VQGANNet).to(memory_format=torch.channels_last)
        if adversarial_weight > 0 and self.net.image_size < (least := getattr(discriminator, "smallest", 1)):
            raise UserError(
                f"pictures of {self.net.image_size} px are too small for model.discriminator, which takes "
                f"{least} px and more; give it fewer layers"
            )
        self.discriminator = discriminator.to(memory_format=torch.channels_last)
        self.make_perceptual = perceptual
        self.frozen: tuple[nn.Module, ...] = ()  # no child: neither trained nor saved
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight
        self.disc_start, self.pixel_loss = disc_start, pixel_loss

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.world_size > 1:
            self.net.synchronise()

    def perceptual(self, made: Tensor, image: Tensor) -> Float[Tensor, "B"]:
        if not self.frozen:
            self.frozen = (self.make_perceptual().requires_grad_(False),)
        self.frozen[0].to(image.device)
        with torch.autocast(image.device.type, enabled=False):
            return self.frozen[0](made.float(), image.float())

    def reconstruct(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The picture through its codes, and the losses that do not need the discriminator."""
        image = batch["image"]
        made, codes, commitment = self.net(image)
        error = made - image
        pixels = error.square().mean() if self.pixel_loss == "mse" else error.abs().mean()
        out = {self.pixel_loss: pixels, "nll": pixels}
        if self.perceptual_weight:
            out["perceptual"] = self.perceptual(made, image).mean()
            out["nll"] = pixels + self.perceptual_weight * out["perceptual"]
        return made, {**out, "commitment": commitment, "codes": codes}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Without the discriminator; also `codes` and `reconstruction`."""
        made, out = self.reconstruct(batch)
        return {"loss": out["nll"] + out["commitment"], **out, "reconstruction": made.clamp(-1, 1)}

    # `adaptive_weight` goes back through the network twice before its step does: where that is compiled, in
    # the first step, nothing that the backward pass reads may be written over.
    @functorch.patch(donated_buffer=False)
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self.seed_batch()
        made, out = self.reconstruct(batch)
        loss = out["nll"] + out["commitment"]
        joined = self.global_step >= self.disc_start and self.adversarial_weight > 0
        if joined:
            out["adversarial"] = -self.discriminator(made).mean()
            out["adaptive_weight"] = adaptive_weight(out["nll"], out["adversarial"], self.net.conv_out.weight)
            loss = loss + self.adversarial_weight * out["adaptive_weight"] * out["adversarial"]
        out["grad_norm"] = self.manual_step(loss, self.net, AUTOENCODER)
        if joined:
            out["loss_d"] = hinge(self.discriminator(batch["image"]), self.discriminator(made.detach()))
            out["grad_norm_d"] = self.manual_step(out["loss_d"], self.discriminator, DISCRIMINATOR)
        out = {key: value.detach() for key, value in {"loss": loss, **out}.items()}
        self.log_scalars("train", out, batch)
        return out

    def check_trainer(self, trainer: Any) -> None:
        """Besides, whether the perceptual distance can be had: now, and not when training has begun."""
        super().check_trainer(trainer)
        if self.perceptual_weight:
            self.frozen = (self.make_perceptual().requires_grad_(False),)

    def configure_optimizers(self) -> Any:
        autoencoder = super().configure_optimizers()
        assert self.recipe is not None
        steps = self.trainer.estimated_stepping_batches - self.disc_start
        optimizer, schedule = self.recipe.build(self.discriminator, max(1, steps))
        second = {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return [autoencoder, second]


def hinge(real: Float[Tensor, "*shape"], fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The discriminator's loss (Lim and Ye 2017), halved as in VQGAN."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(
    nll: Float[Tensor, ""], adversarial: Float[Tensor, ""], last: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """|d nll / d last| / (|d adversarial / d last| + 1e-4), at most 1e4 (Esser et al. 2021, eq. 7)."""
    (wanted,) = torch.autograd.grad(nll, last, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(0, 1e4).detach()
