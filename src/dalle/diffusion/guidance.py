"""Guidance: functions from denoiser to denoiser, to put between a model and a sampler.

Classifier-free guidance (Ho & Salimans 2022) as a weighted sum of x0 estimates under different conditions,
all evaluated as one stacked batch. A scale here is 1 + w of that paper: 1 is no guidance.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.diffusion.denoiser import Denoiser
from dalle.diffusion.samplers import Denoise
from dalle.errors import UserError

Scale = float
Branch = tuple[Scale, dict[str, Any]]  # the weight of an estimate, and the condition it is made under

THRESHOLDS = ("none", "static", "dynamic")


def one_scale(cond: dict[str, Any], null: dict[str, Any], scale: Scale) -> list[Branch]:
    """null + scale (cond - null)."""
    return [(1 - scale, null), (scale, cond)]


def two_scales(
    both: dict[str, Any], image: dict[str, Any], null: dict[str, Any], image_scale: Scale, text_scale: Scale
) -> list[Branch]:
    """null + image_scale (image - null) + text_scale (both - image), for an image embedding and a text."""
    return [(1 - image_scale, null), (image_scale - text_scale, image), (text_scale, both)]


def guide(
    denoise: Denoise, branches: Sequence[Branch], rescale: Scale = 0.0, denoiser: Denoiser | None = None
) -> Denoise:
    """A denoiser of (x_t, t) whose x0 is the weighted sum over `branches`; the weights must add up to 1.

    Branches of weight 0 cost nothing. The last branch left is the fullest condition: its variance is kept
    where that is learned, and `rescale` pulls the spread of the sum towards its (phi of Lin et al. 2024,
    eq. 15-16): that of what the network of `denoiser` predicts (eps, v ...), or of x0 without one. Conditions
    may hold tensors (B, ...), None, and lists, tuples and dicts of them, the same in every branch.
    """
    if abs(sum(weight for weight, _ in branches) - 1) > 1e-6:
        raise ValueError(f"guidance weights must add up to 1: {[weight for weight, _ in branches]}")
    branches = [(weight, cond) for weight, cond in branches if abs(weight) > 1e-9]
    weights, n = [weight for weight, _ in branches], len(branches)
    cond = stack([cond for _, cond in branches])  # constant over the steps

    def guided(x_t: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        out = denoise(x_t.repeat(n, *[1] * (x_t.ndim - 1)), t.repeat(n), **cond)
        x0, fraction = out if isinstance(out, tuple) else (out, None)
        estimates = x0.chunk(n)
        x0 = estimates[0] * weights[0] if n > 1 else estimates[0]
        for weight, estimate in zip(weights[1:], estimates[1:], strict=True):
            x0 = x0 + weight * estimate
        if rescale and n > 1:
            if denoiser is None:
                x0 = match_spread(x0, estimates[-1], rescale)
            else:
                both, told = (denoiser.output_of(x_t, estimate, t) for estimate in (x0, estimates[-1]))
                x0 = denoiser.x0_of(x_t, match_spread(both, told, rescale), t)
        return (x0, None if fraction is None else fraction.chunk(n)[-1]) if isinstance(out, tuple) else x0

    return guided


def threshold(denoise: Denoise, kind: str = "dynamic", percentile: Scale = 0.995) -> Denoise:
    """A denoiser whose x0 is held in [-1, 1]: `none`, `static` (clamp) or `dynamic` (Saharia et al. 2022)."""
    if kind not in THRESHOLDS:
        raise UserError(f"unknown threshold '{kind}': choose one of {', '.join(THRESHOLDS)}")
    if kind == "none":
        return denoise

    def thresholded(x_t: Tensor, t: Tensor, **cond: Any) -> Tensor | tuple[Tensor, Tensor | None]:
        out = denoise(x_t, t, **cond)
        x0, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        x0 = x0.clamp(-1, 1) if kind == "static" else dynamic_threshold(x0, percentile)
        return x0 if rest is None else (x0, *rest)

    return thresholded


def clamped(denoise: Denoise, most: Scale) -> Denoise:
    """A denoiser whose x0 is held in [-most, most]; one that tells no variance."""
    return lambda x_t, t, **cond: denoise(x_t, t, **cond).clamp(-most, most)  # pyright: ignore[reportAttributeAccessIssue]  # a tensor


def match_spread(
    x: Float[Tensor, "B *S"], reference: Float[Tensor, "B *S"], phi: Scale
) -> Float[Tensor, "B *S"]:
    """Part phi of the way from x to x with each sample's standard deviation that of `reference`."""
    ratio = reference.flatten(1).std(1) / x.flatten(1).std(1).clamp(min=1e-8)
    return x * (1 + phi * (ratio - 1)).reshape(-1, *[1] * (x.ndim - 1))


def dynamic_threshold(x0: Float[Tensor, "B *S"], percentile: Scale = 0.995) -> Float[Tensor, "B *S"]:
    """x0 clamped to [-s, s] and divided by s: the `percentile` of a sample's |x0|, at least 1.

    Saharia et al. 2022, sec. 2.3; the percentile is interpolated linearly.
    """
    size = x0.abs().flatten(1).float() if x0.dtype.itemsize < 4 else x0.abs().flatten(1)
    rank = percentile * (size.shape[1] - 1)
    below = int(rank)  # kthvalue: torch.quantile refuses more than 2^24 numbers
    low = size.kthvalue(below + 1, dim=1).values
    high = size.kthvalue(min(below + 2, size.shape[1]), dim=1).values
    s = torch.lerp(low, high, rank - below).clamp(min=1).to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


def stack(trees: Sequence[Any]) -> Any:
    """Concatenate equal nests of tensors (B, ...) along the batch. Raises ValueError where they differ."""
    first = trees[0]
    if any(type(tree) is not type(first) for tree in trees):
        raise ValueError(f"branches differ in kind: {[type(tree).__name__ for tree in trees]}")
    if isinstance(first, Tensor):
        return torch.cat(list(trees)) if len(trees) > 1 else first
    if isinstance(first, dict):
        if any(tree.keys() != first.keys() for tree in trees):
            raise ValueError(f"branches differ in keys: {[sorted(tree) for tree in trees]}")
        return {key: stack([tree[key] for tree in trees]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(stack(parts) for parts in zip(*trees, strict=True))
    if any(tree != first for tree in trees):
        raise ValueError(f"branches differ in a value that is no tensor: {list(trees)}")
    return first
