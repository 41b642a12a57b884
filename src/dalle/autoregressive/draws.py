"""Drawing a code from logits: classifier-free guidance, temperature, top-k, top-p (Holtzman et al. 2020), in
this order, then Gumbel noise made of given uniforms, so that equal uniforms give equal codes.

Nothing here is decided on the host, which CUDA graphs need.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Uniform = Callable[[Tensor], Tensor]  # numbers in [0, 1) like a given tensor
OnStep = Callable[[int, Tensor], None]  # how many codes are there, and all (B, N), those to come being 0


class Uniforms:
    """Uniforms in [0, 1) out of the normal noise that all stages take; bf16 would be too coarse.

    `randn(x)` draws noise like x; what has `ahead`, as `diffusion.noise.PerSample`, does it for many steps at
    once while a GPU computes.
    """

    def __init__(self, randn: Callable[[Tensor], Tensor]) -> None:
        self.randn = randn

    def __call__(self, like: Tensor) -> Tensor:
        return self.of(self.randn(like.float()))

    def ahead(self, like: Tensor, times: int) -> Iterator[Tensor]:
        """What as many calls give."""
        draw = getattr(self.randn, "ahead", None)
        if draw is None or like.device.type != "cuda":
            return (self(like) for _ in range(times))
        return map(self.of, draw(like.shape[1:], times))

    def of(self, noise: Tensor) -> Tensor:
        return torch.special.ndtr(noise).clamp(max=1 - 2**-24)


class Options(NamedTuple):
    """How codes are drawn; `generate` says what each means."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    @property
    def streams(self) -> int:
        """Rows of logits for each picture: with guidance those with the caption, then those without."""
        return 2 if self.guidance != 1 else 1


def choose(
    logits: Float[Tensor, "S K"], uniforms: Float[Tensor, "B K"], options: Options
) -> Int64[Tensor, "B"]:
    """The next code of each picture, S = B or 2 B."""
    logits = logits.float()
    if options.streams == 2:
        told, null = logits.chunk(2)
        logits = null + options.guidance * (told - null)
    return draw(logits, uniforms, options.temperature, options.top_k, options.top_p)


def draw(
    logits: Float[Tensor, "B K"],
    uniforms: Float[Tensor, "B K"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int64[Tensor, "B"]:
    """One code for each row, by the Gumbel-max trick; at temperature 0 the likeliest, without noise."""
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    u = uniforms.clamp(min=torch.finfo(logits.dtype).tiny)
    return (logits - (-u.log()).log()).argmax(dim=1)


def keep_top_k(logits: Float[Tensor, "B K"], k: int | None) -> Float[Tensor, "B K"]:
    """The k largest, and what equals the last of them; the rest become -inf."""
    if k is None:
        return logits
    return logits.masked_fill(logits < logits.topk(k, sorted=False).values.amin(1, keepdim=True), -torch.inf)


def keep_top_p(logits: Float[Tensor, "B K"], p: float | None) -> Float[Tensor, "B K"]:
    """The fewest of the largest whose probabilities add up to p, and what equals the last of them."""
    if p is None or p == 1:
        return logits
    ordered = logits.sort(dim=1, descending=True).values
    probs = ordered.softmax(dim=1)
    kept = (probs.cumsum(dim=1) - probs < p).sum(dim=1, keepdim=True)  # the first always is
    return logits.masked_fill(logits < ordered.gather(1, kept - 1), -torch.inf)
