"""DALL-E, text to image (Ramesh et al. 2021, sec. 2.6): caption -> transformer -> codes -> picture, of
several candidates the one that CLIP finds nearest to the caption.

Candidate c of picture j of prompt i is drawn from noise of its own, seeded by (seed, i, j, c): the same with
any batch size and any number of other prompts, and the first of many candidates is what one alone would be.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from dalle.data.batch import Batch
from dalle.data.frozen import FrozenTokenizer
from dalle.data.sources import mix
from dalle.data.tokenizers import TextTokenizer
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.metrics.clip_score import Embedder
from dalle.pipelines.masks import Sides, check_mask, outpainted, pasted
from dalle.pipelines.upsampling import Drawing

log = logging.getLogger(__name__)

KEPT = 7 / 16  # of the rows are kept of a picture to be completed, where nobody says how many


class DallePipeline(Drawing):
    """A trained transformer and its image tokenizer; `sample` turns captions into pictures.

    Args:
        dalle: a stage with `sample(batch, randn=..., prefix=..., known=..., on_step=...) -> codes (B, N)`.
        image_tokenizer: decodes the codes.
        tokenizer: of the captions, the one the transformer was trained with.
        clip: a `FrozenCLIP`, which chooses among candidates.
    """

    def __init__(
        self,
        dalle: nn.Module,
        image_tokenizer: FrozenTokenizer,
        tokenizer: TextTokenizer,
        clip: Embedder | None = None,
    ) -> None:
        super().__init__()
        self.dalle, self.image_tokenizer, self.clip = dalle, image_tokenizer, clip
        self.tokenizer = tokenizer
        self.eval()

    @property
    def image_size(self) -> int:
        return self.image_tokenizer.image_size

    @property
    def device(self) -> torch.device:
        return self.image_tokenizer.device

    def sample(self, captions: Sequence[str], *args: Any, **options: Any) -> Float[Tensor, "N 3 H W"]:
        """`n` pictures of each caption, in [-1, 1] on the CPU, those of one caption adjacent.

        Arguments are those of `frames`.
        """
        return self.frames(captions, *args, **options, frames=1)[:, 0]

    @torch.inference_mode()
    def frames(
        self,
        captions: Sequence[str],
        n: int = 1,
        seed: int = 0,
        batch_size: int = 16,
        precision: Literal["fp32", "bf16"] = "fp32",
        dalle: Mapping[str, Any] | None = None,
        candidates: int = 1,
        prefix: Sequence[int] = (),
        known: Sequence[int] = (),
        frames: int = 4,
        numbers: Sequence[int] | None = None,
    ) -> Float[Tensor, "N F 3 H W"]:
        """Pictures as they come about: after each of `frames` equal parts of their rows, the last time whole.

        Rows that are not drawn yet are a middle gray. Captions that are too long are cut, with one warning.

        Args:
            batch_size: pictures drawn at once.
            precision: bf16 runs the transformer under autocast.
            dalle: further arguments of the stage's `sample` (temperature, top_k, top_p, guidance).
            candidates: pictures drawn for each one that is kept.
            prefix: the first codes, which all pictures keep (`init_codes`).
            known: in place of it, all codes, -1 where one is drawn (`known_codes`).
            numbers: of the captions, for their noise, where they are part of a longer list (then whoever has
                the list shows the progress); None counts from 0.

        Raises:
            UserError: no captions, impossible numbers, candidates without a CLIP.
        """
        self.check(captions, n, batch_size, candidates)
        jobs = [(i, j, c) for i in range(len(captions)) for j in range(n) for c in range(candidates)]
        best: dict[tuple[int, int], tuple[float, Tensor]] = {}
        order = range(len(captions)) if numbers is None else numbers
        quiet = None if numbers is None else True  # None: where nobody watches
        with tqdm(total=len(jobs), desc="sampling", unit="image", disable=quiet) as bar:
            for start in range(0, len(jobs), batch_size):
                part = jobs[start : start + batch_size]
                said = [captions[i] for i, _, _ in part]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    seeds = [mix(seed, order[i], j, c) for i, j, c in part]
                    drawn = self.draw(said, seeds, dalle or {}, prefix, frames, known)
                scores = self.scores(drawn[:, -1], said) if candidates > 1 else [0.0] * len(part)
                for (i, j, _), score, picture in zip(part, scores, drawn.cpu(), strict=True):
                    if (i, j) not in best or score > best[i, j][0]:
                        best[i, j] = score, picture
                bar.update(len(part))
        return torch.stack([picture for _, picture in best.values()])

    def draw(
        self,
        captions: list[str],
        seeds: Sequence[int],
        options: Mapping[str, Any],
        prefix: Sequence[int],
        frames: int,
        known: Sequence[int] = (),
    ) -> Float[Tensor, "B F 3 H W"]:
        """One picture for each caption, as it comes about."""
        grid, shown = self.image_tokenizer.grid, []
        given = len(prefix) // grid
        frames = min(frames, grid - given)
        ends = {given + (grid - given) * f // frames for f in range(1, frames)}  # rows after which to show it

        def show(drawn: int, codes: Int64[Tensor, "B N"]) -> None:
            row, within = divmod(drawn, grid)
            if row in ends and not within:
                picture = self.image_tokenizer.decode(codes)
                picture[:, :, picture.shape[2] * row // grid :] = 0
                shown.append(picture)

        batch = cast(Batch, {"caption": captions, "text": self.tokenizer(captions).to(self.device)})
        kept = {"prefix": prefix, "known": known}
        codes = self.dalle.sample(  # pyright: ignore[reportCallIssue]  # a Stage's, of which the hint does not know
            batch,
            randn=per_sample(seeds, self.device),
            on_step=show if frames > 1 else None,
            **{k: torch.tensor([v] * len(captions), device=self.device) for k, v in kept.items() if v},
            **options,
        )
        return torch.stack([*shown, self.image_tokenizer.decode(codes)], 1)

    def inpaint(
        self,
        image: Float[Tensor, "3 H W"],
        mask: Bool[Tensor, "h w"],
        prompt: str | Sequence[str],
        *,
        paste: bool = True,
        **options: Any,
    ) -> Float[Tensor, "N 3 H W"]:
        """The picture with other content where the mask is true, in [-1, 1] on the CPU.

        Codes whose cell the mask touches are drawn anew in raster order; all others stay. Each sees what
        comes before it, so what lies below or right of the region is kept but not looked at.

        Args:
            image: in [-1, 1], of the image tokenizer's size.
            prompt: what the whole picture is to show; of several, each gets `n` pictures.
            paste: false gives pictures as the image tokenizer draws them, the kept part too.
            options: as those of `frames`: n, seed, batch_size, precision, dalle, candidates.

        Raises:
            UserError: a mask of another size, or one that leaves nothing to draw; and as `frames` does.
        """
        known = self.known_codes(image, mask)
        captions = [prompt] if isinstance(prompt, str) else prompt
        drawn = self.frames(captions, known=known, frames=1, **options)[:, 0]
        return pasted(drawn, image.cpu(), mask.cpu()) if paste else drawn

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
        """The picture within a larger one, h = top + H + bottom, w = left + W + right.

        A window of the image tokenizer's size is shifted over it, half a window at a time: first to the left
        and right, then up and down. What it shows already is kept, and the rest is drawn as `inpaint` does.

        Args:
            image: in [-1, 1], as large as a window or larger.
            left, right, top, bottom: pixels to add.
            options: as those of `frames`: batch_size, precision, dalle, candidates.

        Raises:
            UserError: nothing to add, a picture smaller than a window; and as `frames` does.
        """
        draw = partial(self.inpaint, prompt=prompt, **{"numbers": [0], **options})  # many bars are of no use
        return outpainted(draw, image, Sides(left, right, top, bottom), self.image_size, n, seed)

    def known_codes(self, image: Float[Tensor, "3 H W"], mask: Bool[Tensor, "h w"]) -> list[int]:
        """The picture's codes, -1 where the mask touches a code's cell.

        Raises:
            UserError: a picture or mask of another size, or one that leaves nothing to draw.
        """
        check_mask(image, mask, self.image_size)
        grid, cell = self.image_tokenizer.grid, self.image_size // self.image_tokenizer.grid
        touched = mask.view(grid, cell, grid, cell).any(dim=3).any(dim=1).flatten()
        codes = self.image_tokenizer.encode(image[None].to(self.device))[0].cpu()
        return torch.where(touched.cpu(), -1, codes).tolist()

    def scores(self, images: Float[Tensor, "B 3 H W"], captions: list[str]) -> list[float]:
        """CLIP's cosine of each picture and its caption."""
        assert self.clip is not None
        text = self.clip.embed_captions(captions)["text_embed"]
        return F.cosine_similarity(self.clip.embed_image(images), text).tolist()

    def init_codes(self, image: Float[Tensor, "1 3 H W"], rows: int | None = None) -> list[int]:
        """The codes of the first `rows` rows of a picture, for `prefix`; None: 7 of 16.

        Raises:
            UserError: rows that leave nothing to keep or to draw.
        """
        grid = self.image_tokenizer.grid
        rows = round(grid * KEPT) if rows is None else rows
        if not 0 < rows < grid:
            raise UserError(f"init_rows={rows}: a picture has {grid} rows of codes; give 1 to {grid - 1}")
        return self.image_tokenizer.encode(image.to(self.device))[0, : rows * grid].tolist()

    def check(self, captions: Sequence[str], n: int, batch_size: int, candidates: int) -> None:
        """Refuses what cannot be sampled, before anything is computed."""
        if not captions:
            raise UserError("there is no prompt; give at least one")
        if min(n, batch_size, candidates) < 1:
            raise UserError(
                f"n, batch_size and candidates must be at least 1, not {n}, {batch_size} and {candidates}"
            )
        if candidates > 1 and self.clip is None:
            raise UserError(f"candidates={candidates} need a CLIP that chooses among them; give one")
        if too_long := sum(map(self.tokenizer.too_long, captions)):
            log.warning(
                "%d of %d prompts are longer than the %d tokens that the transformer reads and were cut",
                *(too_long, len(captions), self.tokenizer.context_length),
            )
