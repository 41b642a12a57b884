"""How often chance has it right: what the judge says of perfect pictures that were drawn for no caption.

Worth printing beside small shares: a caption that says little is true of many pictures.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.data.scenes import parse, tell
from dalle.data.shapes import unrelated
from dalle.metrics.judge import compare

PICTURES, EACH = 2000, 50  # drawn in all; held against each caption


def chance(captions: Sequence[str]) -> dict[str, Float[Tensor, "n"]]:
    """For each caption the share of unrelated pictures that show what it says, by attribute and of `all`;
    nan where a caption does not say.

    Raises UserError for captions that are not of the grammar of `scenes`.
    """
    shown, rows = tell(unrelated(PICTURES)), []
    for i, claim in enumerate(map(parse, captions)):
        marks = [compare(claim, shown[(EACH * i + k) % PICTURES]) for k in range(EACH)]
        row = {key: _share([mark[key] for mark in marks]) for key in marks[0]}
        rows.append({**row, "all": _share([all(v is not False for v in mark.values()) for mark in marks])})
    return {key: torch.tensor([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def _share(marks: list[bool | None]) -> float:
    said = [mark for mark in marks if mark is not None]
    return sum(said) / len(said) if said else torch.nan
