"""Repair of pictures with a decoder as the prior, which was trained for no such thing: of known degradations
(`dalle.diffusion.restoration`), and into what a caption says (SDEdit, Meng et al. 2022).

Copy j is drawn from noise of its own, seeded by (seed, 0, j), as picture j of a pipeline's first caption is.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dalle.data.batch import Batch
from dalle.data.sources import mix
from dalle.diffusion.inpainting import known_of
from dalle.diffusion.noise import per_sample
from dalle.diffusion.restoration import (
    Degradation,
    Hidden,
    blur,
    estimated_noise,
    given,
    misfit,
    nothing,
    shrinking,
)
from dalle.errors import UserError
from dalle.pipelines.masks import Sides, check_mask, check_picture, outpainted, pasted
from dalle.pipelines.upsampling import DECODER, FIT

ROUNDING = 0.01  # standard deviation of what is not known of 8-bit pictures, with some room for a wrong H
STRENGTH = 0.6
RESAMPLINGS = 4
GUESSES = 4  # embeddings that the prior draws for a picture that is inpainted
NOISES = 3  # at which they are compared


class Repairing:
    """What a pipeline with a decoder can do to pictures. All are in [-1, 1]; each method gives `n` of the
    decoder's size, on the CPU.

    Where they are not said otherwise, arguments are those of `restore`.
    """

    decoder: Any
    image_size: Any
    device: Any
    check: Any
    embed: Any
    imagine: Any

    def denoise(
        self,
        image: Float[Tensor, "3 H W"],
        prompt: str | None = None,
        *,
        noise: float | None = None,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """Without Gaussian noise of this standard deviation, in units of [-1, 1]; None: as much as it seems.

        Raises:
            UserError: a picture of another size, no noise.
        """
        self.check_size(image)
        noise = max(estimated_noise(image), ROUNDING) if noise is None else noise
        return self.restore(image, nothing(self.image_size), prompt, noise=noise, **options)

    def deblur(
        self,
        image: Float[Tensor, "3 H W"],
        prompt: str | None = None,
        *,
        blur_sigma: float,
        noise: float = ROUNDING,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """Without a Gaussian blur of this standard deviation in pixels.

        Raises:
            UserError: a picture of another size, no blur, one that is wider than the picture.
        """
        self.check_size(image)
        return self.restore(image, blur(self.image_size, blur_sigma), prompt, noise=noise, **options)

    def fill(
        self,
        image: Float[Tensor, "3 H W"],
        mask: Bool[Tensor, "h w"],
        prompt: str | None = None,
        *,
        noise: float = ROUNDING,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """With pixels where the mask is true, which are missing or broken, made up from the others.

        Raises:
            UserError: a picture or mask of another size, nothing to make up.
        """
        check_mask(image, mask, self.image_size)
        told = {**self._known(image, mask), **(options.pop("decoder", None) or {})}
        return self.restore(image, Hidden(mask), prompt, noise=noise, decoder=told, **options)

    def enhance(
        self,
        image: Float[Tensor, "3 h w"],
        prompt: str | None = None,
        *,
        noise: float = ROUNDING,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """At the decoder's size, of a picture several times smaller.

        Raises:
            UserError: a picture that is no whole number of times smaller.
        """
        check_picture(image)
        height, width = image.shape[-2:]
        factor = self.image_size // max(height, 1)
        if height != width or factor < 2 or factor * height != self.image_size:
            sizes = ", ".join(str(self.image_size // k) for k in (2, 4, 8) if self.image_size % k == 0)
            raise UserError(
                f"the picture has {width} x {height} px; enhance makes pictures of {sizes} px ones of "
                f"{self.image_size} px"
            )
        return self.restore(image, shrinking(self.image_size, factor), prompt, noise=noise, **options)

    def restyle(
        self,
        image: Float[Tensor, "3 H W"],
        prompt: str,
        *,
        strength: float = STRENGTH,
        prior: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """The picture as the prompt says: noise is added for `strength` of all steps, and taken out again as
        pictures of the prompt are drawn. At 1 next to nothing is left of it.

        Raises:
            UserError: a picture of another size, a strength out of (0, 1].
        """
        self.check_size(image)
        if not 0 < strength <= 1:
            raise UserError(f"strength is more than 0 and at most 1, not {strength}")
        told = {**(decoder or {}), "start": image[None].to(self.device), "strength": strength}
        return self._drawn(prompt, told, prior or {}, **options)

    def inpaint(
        self,
        image: Float[Tensor, "3 H W"],
        mask: Bool[Tensor, "h w"],
        prompt: str,
        *,
        paste: bool = True,
        resamplings: int | None = None,
        prior: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """As the prompt says where the mask is true: unlike `fill`, with guidance and the prior. What is kept
        is put into every estimate, and every step done `resamplings` times (RePaint, Lugmayr et al. 2022): a
        decoder that was trained with masks sees what is kept and does them once, others 4 times. The prior
        knows nothing of the picture: it draws 4 embeddings, and the one by which the decoder tells best what
        is kept is taken.

        Args:
            paste: put what is kept back pixel by pixel.
            decoder: its sampler is ddim, with eta 1.

        Raises:
            UserError: a picture or mask of another size, nothing to draw, a sampler that is not ddim.
        """
        check_mask(image, mask, self.image_size)
        told = dict(decoder or {})
        known = self._known(image, mask)
        times = resamplings or (1 if known else RESAMPLINGS)
        told["sampler"] = (told.get("sampler") or self.decoder.sampler).with_eta(1.0, times)
        told |= known
        schedule, seen = self.decoder.denoiser.schedule, image[None].to(self.device)
        told["wrap"] = partial(given, degradation=Hidden(mask), y=seen, noise=ROUNDING, schedule=schedule)
        drawn = self._drawn(prompt, told, prior or {}, (seen[0], mask), **options)
        return pasted(drawn, image.cpu(), mask) if paste else drawn

    def outpaint(
        self,
        image: Float[Tensor, "3 H W"],
        prompt: str,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        n: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> Float[Tensor, "N 3 h w"]:
        """The picture within a larger one, by this many pixels; each window of the decoder's size is drawn by
        `inpaint`, which has the options, as a picture of its own (`masks.outpainted`).

        Raises:
            UserError: nothing to add, a picture smaller than a window; and as `inpaint` does.
        """
        draw = partial(self.inpaint, prompt=prompt, **options)
        return outpainted(draw, image, Sides(left, right, top, bottom), self.image_size, n, seed)

    def restore(
        self,
        y: Float[Tensor, "3 h w"],
        degradation: Degradation,
        prompt: str | None = None,
        *,
        noise: float,
        decoder: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """What may have become `y` by this degradation and noise of this standard deviation.

        Args:
            prompt: what the picture shows; None draws without any caption.
            decoder: further arguments of the decoder's `sample`: sampler, guidance. Without them there is no
                guidance (1, or 0 where there is no prompt): a guided estimate is not the likeliest.
            options: n, seed, batch_size, precision, truncate, as those of `sample`.

        Raises:
            UserError: no picture, noise that is no positive number.
        """
        check_picture(y)
        if not 0 < noise < math.inf:
            raise UserError(f"noise is a standard deviation in units of [-1, 1], above 0, not {noise}")
        seen = y[None].to(self.device)
        known = partial(
            given, degradation=degradation, y=seen, noise=noise, schedule=self.decoder.denoiser.schedule
        )
        told = {"guidance": 1.0 if prompt else 0.0, **(decoder or {}), "wrap": known}
        return self._drawn(prompt or "", told, **options)

    @torch.inference_mode()
    def _drawn(
        self,
        prompt: str,
        decoder: Mapping[str, Any],
        prior: Mapping[str, Any] | None = None,
        kept: tuple[Float[Tensor, "3 H W"], Bool[Tensor, "H W"]] | None = None,
        n: int = 1,
        seed: int = 0,
        batch_size: int = 16,
        precision: Literal["fp32", "bf16"] = "fp32",
        truncate: bool = False,
    ) -> Float[Tensor, "N 3 H W"]:
        """With an image embedding where the prior is told something; that which fits a picture and its mask,
        where these are given.
        """
        self.check([prompt], n, batch_size, truncate)
        made = []
        for first in range(0, n, batch_size):
            keys = [(seed, 0, j) for j in range(first, min(first + batch_size, n))]
            batch = self.embed([prompt] * len(keys))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                if prior is not None:
                    batch = (
                        self.fitting(batch, keys, prior, *kept) if kept else self.imagine(batch, keys, prior)
                    )
                randn = per_sample([mix(*key, DECODER) for key in keys], self.device)
                drawn = self.decoder.sample(batch, randn=randn, **decoder)
            made.append(drawn.float().clamp(-1, 1).cpu())
        return torch.cat(made)

    def fitting(
        self,
        batch: Batch,
        keys: Sequence[tuple[int, int, int]],
        prior: Mapping[str, Any],
        image: Float[Tensor, "3 H W"],
        mask: Bool[Tensor, "H W"],
    ) -> Batch:
        """Of `GUESSES` image embeddings of the prior for each row, the one that says best what is kept of the
        image. Without a prior there is none to choose.
        """
        guesses = [self.imagine(batch, keys, prior)]
        if "image_embed" not in guesses[0]:
            return batch
        for number in range(1, GUESSES):
            other = [(mix(seed, number), i, j) for seed, i, j in keys]
            guesses.append(self.imagine(batch, other, prior))
        randn = per_sample([mix(*key, FIT) for key in keys], self.device)
        noise = [randn.initial(image.shape) for _ in range(NOISES)]
        schedule = self.decoder.denoiser.schedule
        off = [misfit(self.decoder.guided(one, 1.0, 1.0), image, mask, noise, schedule) for one in guesses]
        best = torch.stack(off).argmin(0)
        embeds = torch.stack([one["image_embed"] for one in guesses])
        return {**batch, "image_embed": embeds[best, torch.arange(len(best), device=best.device)]}

    def _known(self, image: Float[Tensor, "3 H W"], mask: Bool[Tensor, "H W"]) -> dict[str, Any]:
        """What a decoder that was trained with masks is told of the picture; nothing for another one."""
        if not getattr(self.decoder, "inpaint", False):
            return {}
        return {"known": known_of(image[None], mask[None]).to(self.device)}

    def check_size(self, image: Float[Tensor, "3 H W"]) -> None:
        """Raises UserError for what is no picture, or one of another size than the decoder's."""
        check_picture(image)
        if tuple(image.shape[-2:]) != (self.image_size, self.image_size):
            (height, width), size = image.shape[-2:], self.image_size
            raise UserError(f"the picture has {width} x {height} px; the decoder draws {size} x {size}")
