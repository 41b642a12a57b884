"""What DALL-E 2 makes of a picture (Ramesh et al. 2022, sec. 3): it is known as (z_i, x_T), its CLIP image
embedding and the noise of which the decoder makes it (DDIM inversion), and each of them can be moved.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from dalle.data.embed_norm import EmbedNorm
from dalle.data.sources import mix
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.machine import precise
from dalle.pipelines.upsampling import DECODER

PARALLEL = 1e-4  # sine of an angle below which a straight line is as good as an arc


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
    prior_norm: Any
    device: Any
    image_size: Any
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
        told.pop("on_step", None)
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

    def interpolate(
        self,
        a: Float[Tensor, "3 H W"],
        b: Float[Tensor, "3 h w"],
        frames: int = 7,
        fixed_noise: bool = False,
        *,
        seed: int = 0,
        decoder: Mapping[str, Any] | None = None,
        inverted: tuple[Inverted, Inverted] | None = None,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """`frames` pictures from a to b, both made again: z_i and x_T go along arcs (`slerp`).

        Args:
            fixed_noise: all are drawn of one x_T, of this seed: then nothing is inverted, and the ends are
                not the pictures, but others of their z_i.

        Other arguments are those of `variations`, but for n and eta.

        Raises:
            UserError: a picture of another size, fewer than 2 frames, a sampler that is not ddim.
        """
        check_frames(frames)
        precision, t = options.get("precision", "fp32"), torch.linspace(0, 1, frames, device=self.device)
        if fixed_noise:
            for image in (a, b):
                self.check_size(image)
            with torch.inference_mode():
                start, end = (self.clip.embed_image(image[None].to(self.device)).float() for image in (a, b))
            noise = self._noise(seed).expand(frames, -1, -1, -1)
            return self._decoded(turned(start, end, t), noise, self._told(decoder, 0.0), seed, **options)
        first, last = inverted or (self.invert(a, decoder, precision), self.invert(b, decoder, precision))
        x_T = slerp(first.x_T, last.x_T, t)
        return self._decoded(turned(first.z_i, last.z_i, t), x_T, self._told(decoder, 0.0), **options)

    def text_diff(
        self,
        image: Float[Tensor, "3 H W"],
        source: str,
        target: str,
        angle: float = 0.5,
        frames: int = 5,
        *,
        decoder: Mapping[str, Any] | None = None,
        inverted: Inverted | None = None,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """`frames` pictures from the picture itself, made again, towards what the target says and the source
        does not: z_i is turned to the normalised difference of the captions' embeddings, x_T stays.

        Args:
            source: what the picture shows; may be empty.
            angle: theta of the paper, the last frame's share of the arc; 0.25 to 0.5 there.

        Others are those of `variations`, but for n and eta.

        Raises:
            UserError: a picture of another size, captions that are alike or too long, an angle out of (0, 1],
                fewer than 2 frames, a sampler that is not ddim.
        """
        check_frames(frames)
        if not 0 < angle <= 1:
            raise UserError(f"angle is a share of the arc, above 0 and at most 1, not {angle}")
        self.check([source, target], 1, 1, False)
        old, new = normalize(self.embed([source, target])["text_embed"].float(), dim=-1)
        if not (old - new).abs().max() > PARALLEL:
            raise UserError(f"CLIP sees no difference between '{source}' and '{target}'; give other captions")
        z_i, x_T, _ = inverted or self.invert(image, decoder, options.get("precision", "fp32"))
        t = torch.linspace(0, angle, frames, device=self.device)
        z_d = normalize(new - old, dim=-1)[None] * z_i.norm()
        x_T = x_T.expand(frames, -1, -1, -1)
        z = self.decoder_norm.shrink(z_i, turned(z_i, z_d, t))
        return self._decoded(z, x_T, self._told(decoder, 0.0), **options)

    def reconstruct(
        self,
        image: Float[Tensor, "3 H W"],
        dims: Sequence[int] | None = None,
        *,
        seed: int = 0,
        decoder: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """What the decoder makes of the first principal components of z_i, in a picture for each number in
        `dims`, all of one noise. Components are those of the training split's unit embeddings.

        Args:
            dims: None: 0 (the mean embedding), 1, 2, 4 ... and all.

        Other arguments are those of `variations`.

        Raises:
            UserError: a picture of another size; dims that are none, or more than the embedding has; neither
                decoder nor prior has the components (image_embed_norm=whitened); a sampler that is not ddim.
        """
        self.check_size(image)
        norms = (self.decoder_norm, self.prior_norm)
        norm = next((one for one in norms if one.components is not None), None)
        if norm is None:
            raise UserError(
                "reconstruct needs principal components of image embeddings, which only a prior or decoder "
                "trained with datamodule.image_embed_norm=whitened keeps, not "
                f"{self.decoder_norm.kind}; train one"
            )
        told, x = self._told(decoder, 0.0), image[None].to(self.device)
        with torch.inference_mode():
            z_i = self.clip.embed_image(x).float()
        z = truncated(z_i, norm, powers(z_i.shape[1]) if dims is None else dims)
        return self._decoded(z, self._noise(seed).expand(len(z), -1, -1, -1), told, seed, **options)

    def _noise(self, seed: int) -> Float[Tensor, "1 3 H W"]:
        """That of the first picture of this seed."""
        return per_sample([mix(seed, 0, 0, DECODER)], self.device).initial((3, *[self.image_size] * 2))

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


def slerp(p: Float[Tensor, "1 *S"], q: Float[Tensor, "1 *S"], t: Float[Tensor, "N"]) -> Float[Tensor, "N *S"]:
    """(sin((1 - t) w) p + sin(t w) q) / sin w, w the angle between p and q; a straight line where they are
    parallel (Shoemake 1985).
    """
    t = t.reshape(-1, *[1] * (p.ndim - 1))
    ends = [normalize(precise(one.flatten()), dim=0) for one in (p, q)]
    angle = torch.acos((ends[0] @ ends[1]).clamp(-1, 1)).item()
    if math.sin(angle) < PARALLEL:
        return torch.lerp(p, q, t)
    return (torch.sin((1 - t) * angle) * p + torch.sin(t * angle) * q) / math.sin(angle)


def turned(p: Float[Tensor, "1 E"], q: Float[Tensor, "1 E"], t: Float[Tensor, "N"]) -> Float[Tensor, "N E"]:
    """Directions by `slerp`, lengths on a straight line: embeddings are told apart by their directions."""
    directions = normalize(slerp(normalize(p, dim=-1), normalize(q, dim=-1), t), dim=-1)
    return directions * torch.lerp(p.norm(), q.norm(), t)[:, None]


def truncated(z: Float[Tensor, "1 E"], norm: EmbedNorm, dims: Sequence[int]) -> Float[Tensor, "N E"]:
    """The unit embeddings of which the first `dims` principal components are left, the mean for the others.

    Raises:
        UserError: no number, or one out of [0, E].
    """
    most = z.shape[1]
    if not dims or not all(0 <= k <= most for k in dims):
        raise UserError(f"dims are numbers of principal components, each from 0 to {most}, not {list(dims)}")
    kept = torch.arange(most, device=z.device) < torch.tensor(dims, device=z.device)[:, None]
    return norm.decode(norm.encode(z) * kept)


def powers(most: int) -> list[int]:
    """0, 1, 2, 4 ... and the last."""
    return [0, *(2**k for k in range(most.bit_length()) if 2**k < most), most]


def check_frames(frames: int) -> None:
    """Raises UserError for fewer than both ends."""
    if frames < 2:
        raise UserError(f"frames are at least 2, both ends, not {frames}")
