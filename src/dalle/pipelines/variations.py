"""What DALL-E 2 makes of a picture (Ramesh et al. 2022, sec. 3): it is known as (z_i, x_T), its CLIP image
embedding and the noise of which the decoder makes it (DDIM inversion), and each of them can be moved.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.data.sources import mix
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.pipelines.upsampling import DECODER


class Inverted(NamedTuple):
    """A picture as a decoder knows it.

    z_i: (1, E), CLIP's image embedding as it is. x_T: (1, 3, H, W). error: root mean square of what the
    decoder makes of them, less the picture, in units of [-1, 1].
    """

    z_i: Tensor
    x_T: Tensor
    error: float


class Varying:
    """What a pipeline with CLIP and a decoder can make of pictures of the decoder's size in [-1, 1]; each
    method but `invert` gives pictures (N, 3, H, W) on the CPU.

    `decoder` holds further arguments of the decoder's `sample`: sampler (ddim), guidance. Without them there
    is none (1), as guidance leads away from what was inverted; the caption is left out.
    """

    clip: Any
    decoder: Any
    decoder_norm: Any
    device: Any
    check: Any
    check_size: Any
    embed: Any

    @torch.inference_mode()
    def invert(
        self,
        image: Float[Tensor, "3 H W"],
        decoder: Mapping[str, Any] | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> Inverted:
        """
        Raises:
            UserError: a picture of another size, a sampler that cannot be undone.
        """
        self.check_size(image)
        x = image[None].to(self.device)
        z_i = self.clip.embed_image(x).float()
        told, batch = self._told(decoder, 0.0), self._batch(z_i)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            x_T = self.decoder.invert(batch, x, **told).float()
            again = self.decoder.sample(batch, noise=x_T, **told).float()
        return Inverted(z_i, x_T, (again - x).square().mean().sqrt().item())

    def variations(
        self,
        image: Float[Tensor, "3 H W"],
        n: int = 1,
        eta: float = 1.0,
        *,
        seed: int = 0,
        decoder: Mapping[str, Any] | None = None,
        inverted: Inverted | None = None,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """Pictures of the same z_i, from x_T with noise `eta` in every step: 0 is the picture itself, again.

        Args:
            inverted: the picture, where that is known already.
            options: batch_size, precision.

        Raises:
            UserError: a picture of another size, eta out of [0, 1], a sampler that is not ddim.
        """
        if not 0 <= eta <= 1:
            raise UserError(f"eta is from 0 to 1, not {eta}")
        self.check([""], n, options.get("batch_size", 1), True)
        told = self._told(decoder, eta)
        z_i, x_T, _ = inverted or self.invert(image, decoder, options.get("precision", "fp32"))
        return self._decoded(z_i.expand(n, -1), x_T.expand(n, -1, -1, -1), told, seed, **options)

    @torch.inference_mode()
    def _decoded(
        self,
        z: Float[Tensor, "N E"],
        x_T: Float[Tensor, "N 3 H W"],
        told: Mapping[str, Any],
        seed: int = 0,
        batch_size: int = 16,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> Float[Tensor, "N 3 H W"]:
        """Picture j of embedding and noise j; further noise is seeded by (seed, 0, j)."""
        made = []
        for first in range(0, len(z), batch_size):
            some = slice(first, min(first + batch_size, len(z)))
            randn = per_sample([mix(seed, 0, j, DECODER) for j in range(some.start, some.stop)], self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                drawn = self.decoder.sample(self._batch(z[some]), randn=randn, noise=x_T[some], **told)
            made.append(drawn.float().clamp(-1, 1).cpu())
        return torch.cat(made)

    def _batch(self, z: Float[Tensor, "B E"]) -> dict[str, Any]:
        return {**self.embed([""] * len(z)), "image_embed": self.decoder_norm.encode(z)}

    def _told(self, decoder: Mapping[str, Any] | None, eta: float) -> dict[str, Any]:
        """What the decoder is told: the image embedding alone, unless it is said otherwise."""
        told = {"guidance": 1.0, "text_guidance": 0.0, **(decoder or {})}
        told["sampler"] = (told.get("sampler") or self.decoder.sampler).with_eta(eta)
        return told
