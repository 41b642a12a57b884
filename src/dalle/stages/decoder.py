"""The decoder: a picture from a CLIP image embedding and, optionally, the caption (DALL-E 2, sec. 2.1 and
App. C).

A diffusion model on pixels. Image embedding and caption are dropped for 10 % of the training pictures each,
independently, so that each can be guided by a scale of its own. The paper drops 50 % of the captions.

A network with `inpaint` is also trained to paint what random masks hide (GLIDE, Nichol et al. 2021, sec.
2.4); of a share of the pictures everything is hidden, so that it stays a decoder.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle.data.batch import Batch
from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.guidance import Branch, guide, one_scale, threshold, two_scales
from dalle.diffusion.inpainting import known_of, random_masks
from dalle.diffusion.samplers import Denoise, OnStep, Randn, Sampler
from dalle.errors import UserError
from dalle.nets.interfaces import DecoderNet, InpaintingNet, check_interface
from dalle.optim.factory import OptimizerFactory
from dalle.ranges import Fraction, Guidance
from dalle.stages.base import Stage

LARGER = 4  # times its own side, and no less than as small a part of it, a decoder is asked for
CONDITIONS = ("image_embed", "text_embed", "text_hidden", "text_mask")


class DecoderStage(Stage):
    """Trains `net` to sample images (B, 3, H, W) in [-1, 1].

    Args:
        net: `nets.unet.UNet`, `nets.dit.DiT` or another `DecoderNet`.
        denoiser: makes the `Denoiser` around it (schedule, prediction, weighting, learned variance).
        sampler: used wherever `sample` is not given one.
        image_dropout, text_dropout: shares of training pictures without image embedding, without caption.
        guidance: scale of both conditions together; 1 is none.
        text_guidance: scale of the caption alone; then `guidance` is that of the image embedding.
        rescale: how far guided predictions are pulled back to the spread of unguided ones, 0 to 1.
        thresholding: what holds estimates in [-1, 1]: none, static or dynamic.
        all_hidden: share of training pictures of which a network with `inpaint` is shown nothing.
    """

    makes_images = True

    def __init__(
        self,
        net: nn.Module,
        denoiser: Callable[[nn.Module], Denoiser],
        sampler: Sampler,
        optimizer: OptimizerFactory | None = None,
        image_dropout: Fraction = 0.1,
        text_dropout: Fraction = 0.1,
        guidance: Guidance = 1.5,
        text_guidance: Guidance | None = None,
        rescale: Fraction = 0.0,
        thresholding: Literal["none", "static", "dynamic"] = "static",
        all_hidden: Fraction = 0.25,
    ) -> None:
        super().__init__(optimizer)
        check_interface(net, InpaintingNet if getattr(net, "inpaint", False) else DecoderNet)
        self.denoiser, self.sampler = denoiser(net.to(memory_format=torch.channels_last)), sampler
        self.image_dropout, self.text_dropout = image_dropout, text_dropout
        self.guidance, self.text_guidance = guidance, text_guidance
        self.rescale, self.thresholding, self.all_hidden = rescale, thresholding, all_hidden

    @property
    def net(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # an attribute there
        return self.denoiser.net

    @property
    def inpaint(self) -> bool:
        """Whether it can be told what is known of a picture."""
        return getattr(self.net, "inpaint", False)

    def speed_up(self, how: str) -> None:
        self.denoiser.speed_up(how)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        keep_image = torch.rand(len(image), device=image.device) >= self.image_dropout
        keep_text = torch.rand(len(image), device=image.device) >= self.text_dropout
        cond: dict[str, Any] = {key: batch[key] for key in CONDITIONS}
        if self.inpaint:
            height, width = image.shape[-2:]
            masks = random_masks(len(image), height, width, self.all_hidden, image.device)
            cond["known"] = known_of(image, masks)
        losses, t = self.denoiser.losses(image, **cond, keep_image=keep_image, keep_text=keep_text)
        return {"loss": losses.mean(), "per_sample": losses, "t": t}

    @torch.inference_mode()
    def sample(
        self,
        batch: Batch,
        sampler: Sampler | None = None,
        guidance: float | None = None,
        text_guidance: float | None = None,
        randn: Randn = torch.randn_like,
        on_step: OnStep | None = None,
        wrap: Callable[[Denoise], Denoise] | None = None,
        start: Float[Tensor, "#B 3 H W"] | None = None,
        strength: float = 1.0,
        noise: Float[Tensor, "B 3 H W"] | None = None,
        known: Float[Tensor, "#B 4 H W"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] for the embeddings and captions in `batch`; without the former, for captions.

        Args:
            size: their height and width; None: those of the batch's `image` where it has one, else a square
                of the network's.
            wrap: puts in what is known of the images (`dalle.diffusion.restoration.given`).
            start: images to begin with; `strength` says how much of the way they go (`Sampler`).
            noise: to begin with; None draws it.
            known: what is known of the images, for a network with `inpaint`
                (`dalle.diffusion.inpainting.known_of`).

        Raises:
            UserError: `known` or the size is for another network.
        """
        if known is not None and not self.inpaint:
            raise UserError("this decoder was not trained with masks; train one with inpaint=true")
        if known is not None:
            batch = cast(Batch, {**batch, "known": known.expand(len(batch["text_embed"]), -1, -1, -1)})
        guided = self.guided(batch, guidance, text_guidance)
        guided = wrap(guided) if wrap else guided
        n, device = len(batch["text_embed"]), batch["text_embed"].device
        like = torch.empty(n, self.net.channels, *self.sides(batch, size), device=device)
        noise = (randn(like) if noise is None else noise).contiguous(memory_format=torch.channels_last)
        run = partial(sampler or self.sampler, start=start, strength=strength)
        return run(guided, noise, self.denoiser.schedule, randn=randn, on_step=on_step).clamp(-1, 1)

    def sides(self, batch: Batch, size: Sequence[int] | None) -> tuple[int, int]:
        """Height and width of the images that `sample` makes. Raises UserError."""
        if size is None and "image" in batch:
            size = batch["image"].shape[-2:]
        square = self.net.image_size
        height, width = size or (square, square)
        if not (height == width == square or hasattr(self.net, "whole")):
            raise UserError(f"this decoder's network draws squares of {square} px only; leave size out")
        if not square // LARGER < min(height, width) <= max(height, width) <= LARGER * square:
            raise UserError(
                f"size={width}x{height} is not what this decoder of {square} px can draw; give sides of more "
                f"than {square // LARGER} and at most {LARGER * square} px"
            )
        return height, width

    @torch.inference_mode()
    def invert(
        self,
        batch: Batch,
        image: Float[Tensor, "B 3 H W"],
        sampler: Sampler | None = None,
        guidance: float | None = None,
        text_guidance: float | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """The noise of which `sample` makes these images under the same conditions (`Sampler.invert`)."""
        guided = self.guided(batch, guidance, text_guidance)
        image = image.contiguous(memory_format=torch.channels_last)
        return (sampler or self.sampler).invert(guided, image, self.denoiser.schedule)

    def guided(self, batch: Batch, guidance: float | None, text_guidance: float | None) -> Denoise:
        """The denoiser that pictures are drawn with; None: a guidance of the stage's own."""
        guidance = self.guidance if guidance is None else guidance
        text_guidance = self.text_guidance if text_guidance is None else text_guidance
        denoise = self.denoiser.with_variance if self.denoiser.learned_variance else self.denoiser
        guided = guide(denoise, self.branches(batch, guidance, text_guidance), self.rescale, self.denoiser)
        return threshold(guided, self.thresholding)

    def branches(self, batch: Batch, guidance: float, text_guidance: float | None) -> list[Branch]:
        """The conditions under which estimates are made, and their weights."""
        text = batch["text_embed"]
        yes = torch.ones(len(text), dtype=torch.bool, device=text.device)
        embed, has_image = batch.get("image_embed"), yes
        if embed is None:
            embed, has_image = text.new_zeros(len(text), self.net.embed_dim), ~yes
        cond = {"image_embed": embed, **{key: batch[key] for key in CONDITIONS[1:]}}
        cond |= {"known": batch["known"]} if "known" in batch else {}
        both = {**cond, "keep_image": has_image, "keep_text": yes}
        null = {**cond, "keep_image": ~yes, "keep_text": ~yes}
        if text_guidance is None:
            return one_scale(both, null, guidance)
        image = {**cond, "keep_image": has_image, "keep_text": ~yes}
        return two_scales(both, image, null, guidance, text_guidance)
