"""edit.json, beside the pictures of an edit: what became of each, by a CLIP and, of `shapes`, the judge."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from dalle.errors import UserError
from dalle.metrics.edits import kept_beside, kept_outside, similarities
from dalle.metrics.judge import Judge
from dalle.metrics.metric import Rows
from dalle.run_dir import Run

FILE = "edit.json"
CHANGED_BY = ("text_diff", "restyle")  # edits that a caption asks for, and nothing but what it says
SMALLEST = 16  # px, of what the judge can read


def drew_shapes(run: str | Path) -> bool:
    """Whether what draws the pictures was trained on the embedded data set."""
    try:
        source = Run(Path(run)).source()
        return source is not None and source["_target_"] == "dalle.data.shapes.Shapes"
    except (UserError, KeyError):
        return False


def rows_of(
    kind: str,
    images: Float[Tensor, "N 3 H W"],
    original: Float[Tensor, "3 h w"],
    mask: Bool[Tensor, "S S"] | None,
    prompt: str,
    source: str,
    clip: Any,
    judged: bool,
) -> Rows:
    """A row for each picture: similarities, where there is a CLIP; `judge/*`, what shows as the prompt asks;
    `kept/*`, what stayed that should have: outside the mask, or what the captions do not change.
    """
    n, rows = len(images), Rows()
    if clip is not None:
        device = clip.device
        rows |= similarities(clip, images.to(device), original[None].to(device), [prompt] if prompt else ())
    if not (judged and readable(images)):
        return rows
    judge = Judge()
    after = judge.read(images)
    if prompt:
        with contextlib.suppress(UserError):  # not a caption of the grammar
            rows |= {f"judge/{name}": marks for name, marks in judge.score(after, [prompt] * n).items()}
    if not readable(original):
        return rows
    before = judge.read(original[None].expand(n, -1, -1, -1))
    if mask is not None:
        rows |= kept_outside(before, after, mask.expand(n, -1, -1))
    elif kind == "variations" or kind in CHANGED_BY:
        rows |= kept_beside(before, after, [source] * n, [prompt] * n)
    return rows


def readable(image: Float[Tensor, "*B 3 H W"]) -> bool:
    """Whether the judge can look at it."""
    return image.shape[-2] == image.shape[-1] >= SMALLEST


def report(
    kind: str, prompt: str, names: list[str], rows: Rows, figures: Mapping[str, float]
) -> dict[str, Any]:
    """As it is written: figures of the edit, means over pictures, and each picture's; what is not known is
    left out.
    """
    means = {name: values.nanmean().item() for name, values in rows.items()}
    each = [known({name: values[i].item() for name, values in rows.items()}) for i in range(len(names))]
    return {
        "edit": kind,
        "prompt": prompt,
        "figures": known(figures),
        "means": known(means),
        "pictures": dict(zip(names, each, strict=True)),
    }


def known(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items() if math.isfinite(value)}


def said(found: Mapping[str, Any]) -> str | None:
    """One line on the means; None where nothing is known."""
    names = {
        "to_original": "CLIP similarity to the original {:.2f}",
        "to_caption": "to the caption {:.2f}",
        "judge/all": "as asked {:.0%}",
        "kept/objects": "objects outside the mask kept {:.0%}",
        "kept/all": "all else kept {:.0%}",
    }
    parts = [text.format(found["means"][name]) for name, text in names.items() if name in found["means"]]
    return ", ".join(parts) or None
