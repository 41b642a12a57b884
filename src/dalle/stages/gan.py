"""A generative adversarial network that draws what a caption says: the baseline that needs one step.

Losses are Goodfellow et al. 2014's non-saturating ones or the hinge (Lim & Ye 2017); the penalty is R1
(Mescheder et al. 2018), taken lazily (StyleGAN2, Karras et al. 2020, App. B); pairs of a picture and another
picture's caption count as fakes (Reed et al. 2016, "matching-aware"); small data can be augmented as in
Zhao et al. 2020. The discriminator (D) is of use in training alone: it is in the checkpoint, but not in the
saved weights.

A batch is one step of the generator (G), and those are what `trainer.max_steps` counts. D takes `d_steps`
before each of them on the same pictures, and one more for the penalty every `r1_every` of its own.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dalle.data.batch import Batch, text_of
from dalle.diffusion.samplers import Randn
from dalle.nets.interfaces import GeneratorNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Decay, Depth, PositiveInt, Rate, Weight
from dalle.stages.base import Stage

GENERATOR, DISCRIMINATOR = 0, 1  # the optimizers


class GanStage(Stage):
    """Trains `net` to draw images (B, 3, H, W) in [-1, 1] from noise and a caption.

    Args:
        net: `nets.gan.Generator` or another `GeneratorNet`.
        discriminator: makes the `nets.gan.Discriminator` from image_size, embed_dim and text_width.
        optimizer: the recipe of both networks.
        loss: of both players.
        conditioning: `projection` shows D true pairs and drawn ones; `matching` also true pictures with the
            caption of their neighbour in the batch, as a fake of half the weight.
        r1_gamma: weight of the gradient penalty; 0 is none.
        r1_every: steps of D from one penalty to the next.
        d_steps: steps of D per step of G.
        d_lr: learning rate of D as a multiple of G's.
        beta1: momentum of both optimizers, where they are of Adam's kind: between players it does harm.
        augment: what D sees drawn and true pictures through: colour, translation, cutout.
    """

    makes_images = True

    def __init__(
        self,
        net: nn.Module,
        discriminator: Callable[..., nn.Module],
        optimizer: OptimizerFactory | None = None,
        loss: Literal["nonsaturating", "hinge"] = "nonsaturating",
        conditioning: Literal["projection", "matching"] = "matching",
        r1_gamma: Weight = 1.0,
        r1_every: PositiveInt = 16,
        d_steps: Depth = 1,
        d_lr: Rate = 1.0,
        beta1: Decay = 0.0,
        augment: Sequence[Literal["colour", "translation", "cutout"]] = (),
    ) -> None:
        super().__init__(optimizer and with_first_beta(optimizer, beta1))
        self.automatic_optimization = False
        self.net: Any = check_interface(net, GeneratorNet).to(memory_format=torch.channels_last)
        sizes = {name: getattr(net, name) for name in ("image_size", "embed_dim", "text_width")}
        self.discriminator: Any = discriminator(**sizes).to(memory_format=torch.channels_last)
        self.loss_g, self.loss_d = LOSSES[loss]
        self.matching, self.augment = conditioning == "matching", [AUGMENTATIONS[name] for name in augment]
        self.r1_gamma, self.r1_every, self.d_steps, self.d_lr = r1_gamma, r1_every, d_steps, d_lr
        self.register_buffer("r1", torch.zeros(()))  # the last penalty, for the log

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self.seed_batch()
        text, out = text_of(batch), {}
        fake = self.draw(batch)
        for k in range(self.d_steps):
            last = k == self.d_steps - 1
            drawn = fake if last else self.draw(batch)
            out = self.against(batch, drawn.detach())
            out["grad_norm_d"] = self.manual_step(out["loss_d"], self.discriminator, DISCRIMINATOR)
            if self.r1_gamma and (self.global_step * self.d_steps + k) % self.r1_every == 0:
                self.penalise(batch)
        out["loss_g"] = self.loss_g(self.discriminator(self.seen(fake), **text))
        out["grad_norm_g"] = self.manual_step(out["loss_g"], self.net, GENERATOR)
        out |= {"loss": out["loss_d"] + out["loss_g"], "loss_ratio": out["loss_d"] / out["loss_g"]}
        out = {key: value.detach() for key, value in {**out, "r1": self.r1}.items()}
        self.log_scalars("train", out, batch)
        return out

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of both players without a step of either; `loss` is their sum, no measure of quality."""
        fake = self.draw(batch)
        out = self.against(batch, fake)
        out["loss_g"] = self.loss_g(self.discriminator(self.seen(fake), **text_of(batch)))
        return {"loss": out["loss_d"] + out["loss_g"], **out}

    def draw(self, batch: Batch) -> Float[Tensor, "B 3 H W"]:
        z = torch.randn(len(batch["image"]), self.net.latent_dim, device=batch["image"].device)
        return self.net(z, **text_of(batch))

    def against(self, batch: Batch, fake: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """D's loss, and the shares of true and drawn pictures that it takes for what they are."""
        d = self.discriminator
        caption = d.caption(**text_of(batch))
        picture = d.picture(self.seen(batch["image"]))
        real, drawn = d.logits(picture, caption), d.logits(d.picture(self.seen(fake)), caption)
        wrong = d.logits(picture, caption.roll(1, 0)) if self.matching else None
        return {
            "loss_d": self.loss_d(real, drawn, wrong),
            "accuracy_real": (real > 0).float().mean(),
            "accuracy_fake": (drawn < 0).float().mean(),
        }

    def penalise(self, batch: Batch) -> None:
        """A step of D down the penalty alone, as long as `r1_every` penalties together."""
        with torch.autocast(self.device.type, enabled=False):  # a gradient of a gradient: not in 8 bits
            image = batch["image"].detach().requires_grad_()
            logits = self.discriminator(self.seen(image), **text_of(batch))
            penalty = r1(logits, image, self.r1_gamma)
        self.manual_step(self.r1_every * penalty, self.discriminator, DISCRIMINATOR)
        bad = self.guard.bad
        if self.guard.deferred and bad is not None:
            self.r1 = torch.where(bad, self.r1, penalty.detach())
        elif not self.guard.left_out:
            self.r1 = penalty.detach()

    def seen(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Pictures as D sees them."""
        for augmentation in self.augment:
            image = augmentation(image)
        return image

    @torch.inference_mode()
    def sample(self, batch: Batch, randn: Randn = torch.randn_like) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] for the captions whose text features are in `batch`."""
        text = text_of(batch)
        like = torch.empty(len(text["text_embed"]), self.net.latent_dim, device=text["text_embed"].device)
        return self.net(randn(like), **text)

    def configure_optimizers(self) -> Any:
        generator = super().configure_optimizers()
        assert self.recipe is not None
        steps, recipe = (
            self.d_steps * self.trainer.estimated_stepping_batches,
            self.recipe.scale_lr(self.d_lr),
        )
        if self.r1_gamma:
            steps, recipe = steps * (1 + 1 / self.r1_every), lazy(recipe, self.r1_every)
        optimizer, schedule = recipe.build(self.discriminator, steps)
        return [
            generator,
            {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}},
        ]


# Losses


def nonsaturating_g(fake: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    """-log D(G(z)) (Goodfellow et al. 2014, sec. 3), logits in."""
    return F.softplus(-fake).mean()


def nonsaturating_d(
    real: Float[Tensor, "B"], fake: Float[Tensor, "B"], wrong: Float[Tensor, "B"] | None = None
) -> Float[Tensor, ""]:
    """-log D(x) - log(1 - D(G(z))) (Goodfellow et al. 2014, eq. 1); half of the fakes are `wrong` pairs."""
    return F.softplus(-real).mean() + half(F.softplus, fake, wrong)


def hinge_g(fake: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    return -fake.mean()


def hinge_d(
    real: Float[Tensor, "B"], fake: Float[Tensor, "B"], wrong: Float[Tensor, "B"] | None = None
) -> Float[Tensor, ""]:
    """(1 - D(x))+ + (1 + D(G(z)))+ (Lim & Ye 2017); half of the fakes are `wrong` pairs."""
    return F.relu(1 - real).mean() + half(lambda logits: F.relu(1 + logits), fake, wrong)


def half(
    loss: Callable[[Tensor], Tensor], fake: Float[Tensor, "B"], wrong: Float[Tensor, "B"] | None
) -> Float[Tensor, ""]:
    """Drawn pictures, and true ones with a wrong caption, each of half the weight (Reed et al. 2016)."""
    return loss(fake).mean() if wrong is None else (loss(fake).mean() + loss(wrong).mean()) / 2


def r1(logits: Float[Tensor, "B"], image: Float[Tensor, "B 3 H W"], gamma: float) -> Float[Tensor, ""]:
    """gamma / 2 E |grad_x D(x)|^2 over true pictures (Mescheder et al. 2018, eq. 9), differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return gamma / 2 * gradient.square().flatten(1).sum(1).mean()


def lazy(recipe: OptimizerFactory, every: int) -> OptimizerFactory:
    """The recipe of an optimizer that takes `every` + 1 steps where it took `every` (StyleGAN2, App. B).

    Learning rate times c and betas to the power of c, c = every / (every + 1), keep its pace.
    """
    c = every / (every + 1)
    return recipe.scale_lr(c, c)


def with_first_beta(recipe: OptimizerFactory, beta: float) -> OptimizerFactory:
    """A copy of the recipe with another decay of the first moment, where it has one."""
    made = copy.copy(recipe)
    if "betas" in recipe.options:
        made.options = {**recipe.options, "betas": [float(beta), recipe.options["betas"][1]]}
    return made


LOSSES = {"nonsaturating": (nonsaturating_g, nonsaturating_d), "hinge": (hinge_g, hinge_d)}


# Augmentations that gradients pass (Zhao et al. 2020), drawn anew for every picture


def colour(image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Brightness +-0.5, saturation up to double, contrast 0.5 to 1.5."""
    brightness, saturation, contrast = torch.rand(3, len(image), 1, 1, 1, device=image.device)
    image = image + (brightness - 0.5)
    grey = image.mean(1, keepdim=True)
    image = grey + 2 * saturation * (image - grey)
    mean = image.mean((1, 2, 3), keepdim=True)
    return mean + (0.5 + contrast) * (image - mean)


def translation(image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Moved by up to an eighth of the side each way; zeros come in."""
    b, _, height, width = image.shape
    by_y, by_x = (side // 8 for side in (height, width))
    rows, columns = (
        torch.arange(side, device=image.device) + torch.randint(2 * by + 1, (b, 1), device=image.device)
        for side, by in ((height, by_y), (width, by_x))
    )
    padded = F.pad(image, (by_x, by_x, by_y, by_y)).permute(0, 2, 3, 1)
    which = torch.arange(b, device=image.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """A square of half the side, wherever its middle falls, becomes zero."""
    rows, columns = (_covered(side, len(image), image.device) for side in image.shape[2:])
    return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _covered(side: int, b: int, device: torch.device) -> Bool[Tensor, "B S"]:
    """Which of the places along a side a stretch of half of it covers."""
    offset = torch.arange(side, device=device) - torch.randint(side + 1, (b, 1), device=device)
    return (-(side // 4) <= offset) & (offset < side // 4)


AUGMENTATIONS = {"colour": colour, "translation": translation, "cutout": cutout}
