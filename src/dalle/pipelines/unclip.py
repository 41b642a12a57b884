"""unCLIP, text to image (Ramesh et al. 2022, DALL-E 2, sec. 2): caption -> CLIP text features -> prior ->
CLIP image embedding -> decoder -> picture.

Picture j of prompt i is drawn from noise of its own, seeded by (seed, i, j): the same with any batch size,
and with any number of other prompts after it (up to the rounding of a batched matrix product).
"""

import inspect
import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from dalle.data.batch import Batch
from dalle.data.embed_norm import UNIT, EmbedNorm
from dalle.data.sources import mix
from dalle.data.tokenizers import TextTokenizer
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.pipelines.repair import Repairing
from dalle.pipelines.upsampling import DECODER, PRIOR, Drawing
from dalle.pipelines.variations import Varying

log = logging.getLogger(__name__)


class UnCLIP(Repairing, Varying, Drawing):
    """Trained stages put together; `sample` turns captions into pictures.

    Args:
        clip: the `FrozenCLIP` on whose embeddings both stages were trained.
        prior: a stage with `sample(batch, randn=...) -> (B, E)`; None leaves the decoder with the caption
            alone.
        decoder: a stage with `sample(batch, randn=...) -> (B, 3, H, W)`.
        prior_norm, decoder_norm: how each stage's image embeddings are normalised (prior_norm None: the
        same).

    Raises:
        UserError: the prior's embeddings cannot be turned into the decoder's.
    """

    def __init__(
        self,
        clip: nn.Module,
        prior: nn.Module | None,
        decoder: nn.Module,
        prior_norm: EmbedNorm | None,
        decoder_norm: EmbedNorm,
    ) -> None:
        super().__init__()
        self.clip, self.prior, self.decoder = clip, prior, decoder
        self.prior_norm, self.decoder_norm = prior_norm or decoder_norm, decoder_norm
        self.same_norm = self.prior_norm.to_dict() == decoder_norm.to_dict()
        if prior is not None:
            check_norms(self.prior_norm.kind, decoder_norm.kind)
        self.eval()

    @property
    def tokenizer(self) -> TextTokenizer:
        return cast(TextTokenizer, self.clip.tokenizer)

    @property
    def image_size(self) -> int:
        return self.decoder.net.image_size  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]  # a Stage's network, of which the hint does not know

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @torch.inference_mode()
    def sample(
        self,
        captions: Sequence[str],
        n: int = 1,
        seed: int = 0,
        batch_size: int = 16,
        precision: Literal["fp32", "bf16"] = "fp32",
        prior: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        truncate: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> Float[Tensor, "N 3 H W"]:
        """`n` pictures of each caption, in [-1, 1] on the CPU, those of one caption adjacent.

        Args:
            batch_size: pictures drawn at once.
            precision: bf16 runs both stages under autocast; CLIP stays in float32.
            prior, decoder: further arguments of the stages' `sample` (sampler, guidance ...).
            truncate: cut captions that are too long for CLIP, with a warning, instead of refusing them.
            numbers: of the captions, for their noise, where they are part of a longer list (then whoever has
                the list shows the progress); None counts from 0.

        Raises:
            UserError: no captions, or one that is too long.
        """
        self.check(captions, n, batch_size, truncate)
        self.check_options(prior or {})
        jobs = [(i, j) for i in range(len(captions)) for j in range(n)]
        images = []
        order = range(len(captions)) if numbers is None else numbers
        quiet = None if numbers is None else True  # None: where nobody watches
        with tqdm(total=len(jobs), desc="sampling", unit="image", disable=quiet) as bar:
            for start in range(0, len(jobs), batch_size):
                part = jobs[start : start + batch_size]
                batch = self.embed([captions[i] for i, _ in part])
                seeds = [(seed, order[i], j) for i, j in part]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    batch = self.imagine(batch, seeds, prior or {})
                    randn = per_sample([mix(*key, DECODER) for key in seeds], self.device)
                    made = self.decoder.sample(batch, randn=randn, **(decoder or {}))  # pyright: ignore[reportCallIssue]  # a Stage's, of which the hint does not know
                images.append(made.float().clamp(-1, 1).cpu())
                bar.update(len(part))
        return torch.cat(images)

    def embed(self, captions: list[str]) -> Batch:
        """The captions' text features, on the stages' device."""
        features = self.clip.embed_captions(captions)  # pyright: ignore[reportCallIssue]  # a FrozenCLIP's, of which the hint does not know
        moved = {key: value.to(self.device) for key, value in features.items()}
        return cast(Batch, {"caption": captions, **moved})

    def imagine(
        self, batch: Batch, seeds: Sequence[tuple[int, int, int]], options: Mapping[str, Any]
    ) -> Batch:
        """Adds the prior's `image_embed`, as the decoder knows it; nothing without a prior."""
        if self.prior is None:
            return batch
        randn = per_sample([mix(*key, PRIOR) for key in seeds], self.device)
        embed = self.prior.sample(batch, randn=randn, **options).float()  # pyright: ignore[reportCallIssue]  # a Stage's, of which the hint does not know
        if not self.same_norm:
            embed = self.decoder_norm.encode(self.prior_norm.decode(embed))
        return {**batch, "image_embed": embed}

    def check(self, captions: Sequence[str], n: int, batch_size: int, truncate: bool) -> None:
        """Refuses what cannot be sampled, before anything is computed."""
        if not captions:
            raise UserError("there is no prompt; give at least one")
        if n < 1 or batch_size < 1:
            raise UserError(f"n and batch_size must be at least 1, not {n} and {batch_size}")
        too_long = [caption for caption in captions if self.tokenizer.too_long(caption)]
        if too_long and truncate:
            log.warning(
                "%d of %d prompts are longer than the %d tokens that CLIP reads and were cut",
                *(len(too_long), len(captions), self.clip.context_length),
            )
        elif too_long:
            raise UserError(self._too_long(too_long[0]))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses what is for another kind of prior."""
        if self.prior is None:
            return
        takes = inspect.signature(self.prior.sample).parameters  # pyright: ignore[reportArgumentType]  # a Stage's, of which the hint does not know
        anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        if unknown := [key for key in options if key not in takes and not anything]:
            known = ", ".join(key for key in takes if key not in ("batch", "randn"))
            raise UserError(f"{unknown[0]} is no option of this prior, which takes {known}; leave it out")

    def _too_long(self, caption: str) -> str:
        words = caption.split()
        fits = bisect_left(
            range(len(words)), True, key=lambda k: self.tokenizer.too_long(" ".join(words[: k + 1]))
        )
        bytewise = self.tokenizer.too_long(
            caption[: self.tokenizer.context_length - 2]
        )  # more tokens than letters
        why = (
            ". Its letters are rare in the captions that the tokenizer was trained on and fall to bytes; "
            "train CLIP on captions that have them, with tokenizer.context_length=... for their length"
        )
        return (
            f"the prompt {shorten(caption, 60, placeholder=' ...')!r} is too long: CLIP reads "
            f"{self.clip.context_length} tokens with start and end, which is the first {fits} of its "
            f"{len(words)} words; shorten it, or set truncate=true{why if bytewise else ''}"
        )


def check_norms(prior: str, decoder: str) -> None:
    """Raises UserError where the prior's embeddings cannot be turned into the decoder's."""
    if prior in UNIT and decoder not in UNIT:
        raise UserError(
            f"prior and decoder do not fit together: the prior's embeddings (image_embed_norm={prior}) have "
            f"lost the length that the decoder's (image_embed_norm={decoder}) need; train one of them again "
            "with the norm of the other"
        )
