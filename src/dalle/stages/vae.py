"""The variational autoencoder (Kingma and Welling 2014, eq. 10): a baseline that needs no captions.

The loss is the negative ELBO of a picture in nats, summed over its pixels and channels and over the latent,
mean over the batch. `gaussian`: all pixels share one spread, the one that makes the batch most likely,
sigma^2 = the mean squared error (Rybkin et al. 2021): there is no weight between the two terms to be tuned.
`bce`: pixels in [0, 1] as if they were probabilities, as in many tutorials; no density for gray values, and
its figures compare with nothing else.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle.data.batch import Batch
from dalle.diffusion.samplers import Randn
from dalle.nets.interfaces import VAENet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Weight
from dalle.stages.base import Stage


def kl_to_normal(mean: Float[Tensor, "B Z"], log_variance: Float[Tensor, "B Z"]) -> Float[Tensor, "B"]:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over the latent (Kingma and Welling 2014, App. B)."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1)


def gaussian_nll(made: Float[Tensor, "B *shape"], image: Float[Tensor, "B *shape"]) -> Float[Tensor, "B"]:
    """-ln N(image | made, sigma^2) with the batch's best sigma, summed over a picture."""
    error = (image - made).square()
    variance = error.detach().mean().clamp(min=1e-6)
    return 0.5 * (error / variance + (2 * math.pi * variance).log()).flatten(1).sum(dim=1)


def bce_nll(logits: Float[Tensor, "B *shape"], image: Float[Tensor, "B *shape"]) -> Float[Tensor, "B"]:
    """Binary cross entropy of pixels in [-1, 1], mapped to [0, 1], summed over a picture."""
    loss = F.binary_cross_entropy_with_logits(logits, (image + 1) / 2, reduction="none")
    return loss.flatten(1).sum(dim=1)


class VAEStage(Stage):
    """Trains `net`, and samples pictures from the prior.

    Args:
        net: `nets.vae.VAE` or another `VAENet`.
        likelihood: gaussian or bce, see above.
        kl_weight: beta of a beta-VAE; 1 is the ELBO.
    """

    makes_images = True

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory | None = None,
        likelihood: Literal["gaussian", "bce"] = "gaussian",
        kl_weight: Weight = 1.0,
    ) -> None:
        super().__init__(optimizer)
        self.net: VAENet = check_interface(net, VAENet).to(memory_format=torch.channels_last)
        self.likelihood, self.kl_weight = likelihood, kl_weight

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """In validation also `reconstruction`: from the mean of the latent, without noise."""
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        made, mean, log_variance = self.net(image)
        nll = (gaussian_nll if self.likelihood == "gaussian" else bce_nll)(made, image).mean()
        kl = kl_to_normal(mean, log_variance).mean()
        out = {"loss": nll + self.kl_weight * kl, "nll": nll, "kl": kl}
        return out if self.training else {**out, "reconstruction": self.picture(self.net.decode(mean))}

    def picture(self, made: Tensor) -> Tensor:
        """What the network draws, in [-1, 1]."""
        return made.sigmoid() * 2 - 1 if self.likelihood == "bce" else made.clamp(-1, 1)

    @torch.inference_mode()
    def sample(self, batch: Batch, randn: Randn = torch.randn_like, **_: Any) -> Float[Tensor, "B 3 H W"]:
        """Pictures in [-1, 1] from z ~ N(0, 1), as many as there are captions; what those say is not used."""
        like = torch.empty(len(batch["caption"]), self.net.latent_dim, device=self.device)
        return self.picture(self.net.decode(randn(like)))
