"""Drawing a picture's codes one after another from an autoregressive network (DALL-E sec. 2.6).

Classifier-free guidance has both streams in one batch, which share the code drawn; codes that are known stay,
be they a picture's first (sec. 3.3, completion) or all but those of a region.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dalle.autoregressive.draws import OnStep, Options, Uniform, choose
from dalle.autoregressive.static import Static
from dalle.errors import UserError


@torch.no_grad()
def generate(
    net: Any,
    text: Int64[Tensor, "B T"],
    keep_text: Bool[Tensor, "B"] | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    prefix: Int64[Tensor, "B P"] | None = None,
    known: Int64[Tensor, "B N"] | None = None,
    uniform: Uniform = torch.rand_like,
    cached: bool = True,
    static: Static | None = None,
    on_step: OnStep | None = None,
) -> Int64[Tensor, "B N"]:
    """Codes of a picture for each caption.

    Args:
        net: `nets.dalle.DALLE` in evaluation mode, or what has its `prefill`, `step`, `image_vocab`, `codes`.
        keep_text: where false, the caption is dropped.
        temperature: 0 takes the likeliest code.
        guidance: 1 + w of Ho & Salimans 2022; 1 is none, and costs half.
        prefix: the first P codes, which are kept.
        known: codes that are kept anywhere, -1 where one is drawn; in place of `prefix`. A code sees those
            before it in raster order, not the known ones after it.
        uniform: makes the uniforms (B, K) of a step, one call for each place at which a code is drawn.
        cached: false computes the whole stream anew for every code: slow, and the same codes.
        static: draws the same codes over a cache of fixed size, by CUDA graphs on a GPU; for networks that
            know how, whose own it is.
        on_step: called after each code drawn, to show what there is.

    Raises:
        UserError: an option out of its range, a prefix longer than a picture, or a code that does not exist.
    """
    check_options(net.image_vocab, temperature, top_k, top_p)
    options = Options(temperature, top_k, top_p, guidance)
    first = None if known is not None else 0 if prefix is None else prefix.shape[1]
    known = known_codes(text, net.codes, net.image_vocab, prefix, known)
    codes, drawn = known.clamp(min=0), known < 0
    anywhere = first is None
    places = drawn.any(dim=0).nonzero().flatten().tolist() if anywhere else list(range(first, net.codes))
    if not places:
        return codes
    if static is not None and cached and hasattr(net, "reach"):
        return static(net, text, keep_text, known, places, options, uniform, on_step)
    wanted, streams = set(places), options.streams
    if streams == 2:  # with the caption and without
        keep = torch.ones_like(text[:, 0], dtype=torch.bool) if keep_text is None else keep_text
        text, keep_text = text.repeat(2, 1), torch.cat((keep, torch.zeros_like(keep)))

    cache = None
    for i in range(places[0], places[-1] + 1):
        if cache is None or not cached:
            logits, cache = net.prefill(text, keep_text, codes[:, :i].repeat(streams, 1))
        else:
            logits = net.step(codes[:, i - 1].repeat(streams), i - 1, cache)
        if i not in wanted:  # the cache has to know it all the same
            continue
        logits = logits.float()
        noise = uniform(logits[: len(codes)]) if temperature else logits[: len(codes)]
        codes[:, i] = torch.where(drawn[:, i], choose(logits, noise, options), codes[:, i])
        if on_step is not None:
            on_step(i + 1, codes)
    return codes


def known_codes(
    text: Int64[Tensor, "B T"],
    codes: int,
    vocab: int,
    prefix: Int64[Tensor, "B P"] | None,
    known: Int64[Tensor, "B N"] | None,
) -> Int64[Tensor, "B N"]:
    """What is known of `codes` codes of each picture, -1 where one is to be drawn."""
    given, name = (known, "known") if prefix is None else (prefix, "prefix")
    if prefix is not None and known is not None:
        raise ValueError("give `prefix` or `known`, not both")
    if given is None:
        return text.new_full((len(text), codes), -1)
    count = given.shape[1]
    if count > codes or (name == "known" and count < codes):
        raise UserError(f"{name}: {count} codes, but a picture has {codes}.")
    least = 0 if name == "prefix" else -1
    if count and not (least <= int(given.min()) and int(given.max()) < vocab):
        wrong = int(given.max()) if int(given.min()) >= least else int(given.min())
        raise UserError(f"{name}: codes go from 0 to {vocab - 1}, and one is {wrong}.")
    return torch.nn.functional.pad(given, (0, codes - count), value=-1)


def check_options(vocab: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature >= 0:
        raise UserError(f"temperature is 0 (the likeliest code) or more, not {temperature}.")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise UserError(f"top_k is 1 to {vocab}, the codes there are, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is more than 0 and at most 1, not {top_p}.")
