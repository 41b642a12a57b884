"""What became of edited pictures, a row for each.

to_original, to_caption   cosines of CLIP's embeddings of what was made, of the original and of the caption
kept/*                    of `shapes`: 1 where something that should have stayed did, 0 where not, nan where
                          nothing is said of it; an original that the judge cannot read says nothing
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dalle.data.scenes import SIZES, coverage, parse, tell
from dalle.errors import UserError
from dalle.metrics.clip_score import ImageTextEmbedder
from dalle.metrics.judge import ATTRIBUTES, Reading, compare
from dalle.metrics.metric import Rows

NEAR = 0.1  # of the picture's side: as far may an object be from where it was
NAMED = (*ATTRIBUTES, "count")


def similarities(
    clip: ImageTextEmbedder,
    made: Float[Tensor, "N 3 H W"],
    original: Float[Tensor, "#N 3 h w"],
    captions: Sequence[str] = (),
) -> Rows:
    """`to_original` and, where there are captions (one for each, or one for all), `to_caption`."""
    seen = clip.embed_image(made)
    rows = {"to_original": cosine_similarity(seen, clip.embed_image(original)).cpu()}
    if captions:
        said = clip.embed_captions(list(captions))["text_embed"]
        rows["to_caption"] = cosine_similarity(seen, said).cpu()
    return rows


def kept_outside(before: Reading, after: Reading, masks: Bool[Tensor, "N H W"]) -> Rows:
    """What should have stayed where masks are false: `kept/objects`, those that no mask touches, each with
    its colour, shape, size and place; `kept/background`.
    """
    was, now, size = before.scenes, after.scenes, masks.shape[-1]
    radius = torch.tensor(list(SIZES.values()))[was.size.clamp(min=0)]
    columns = (was.shape, was.x.float(), was.y.float(), radius)
    shape, x, y, r = (column.flatten() for column in columns)
    covered = coverage(shape, x, y, r, size).unflatten(0, was.shape.shape) > 0
    standing = (was.shape >= 0) & ~(covered & masks[:, None]).flatten(2).any(2)
    same = torch.ones(len(masks), 2, 2, dtype=torch.bool)
    for one, other in ((was.colour, now.colour), (was.shape, now.shape), (was.size, now.size)):
        same &= one[:, :, None] == other[:, None]
    apart = [one[:, :, None] - other[:, None] for one, other in ((was.x, now.x), (was.y, now.y))]
    same &= torch.hypot(*apart) < NEAR
    objects = (same.any(2) | ~standing).all(1).float()
    objects = objects.where(before.sound & standing.any(1), torch.nan)
    background = (was.background == now.background).float().where(before.sound, torch.nan)
    return {"kept/objects": objects, "kept/background": background}


def kept_beside(before: Reading, after: Reading, sources: Sequence[str], captions: Sequence[str]) -> Rows:
    """What should have stayed of what captions do not change: `kept/colour` ... and `kept/all` of these.

    Args:
        sources: what the originals show; an empty one: whatever the caption names is changed.
        captions: what was asked for; an empty one changes nothing.
    """
    marks = []
    for was, now, source, caption, sound in zip(
        tell(before.scenes), tell(after.scenes), sources, captions, before.sound.tolist(), strict=True
    ):
        changed = changes(source, caption) if sound else set(NAMED)
        found = compare(was, now)
        marks.append([torch.nan if name in changed else worth(found[name]) for name in NAMED])
    table = torch.tensor(marks).reshape(-1, len(NAMED))
    rows = {f"kept/{name}": values for name, values in zip(NAMED, table.unbind(1), strict=True)}
    said = ~table.isnan()
    everything = table.nan_to_num(1.0).amin(1).where(said.any(1), torch.nan)
    return {**rows, "kept/all": everything}


def changes(source: str, caption: str) -> set[str]:
    """Which attributes a caption says otherwise than its source, or at all where there is no source; all of
    them where one of both is not of the grammar of `shapes`.
    """
    if not caption:
        return set()
    try:
        claim = parse(caption)
        found = compare(claim, parse(source)) if source else compare(claim, claim)
    except UserError:
        return set(NAMED)
    return {name for name, same in found.items() if same is (not source)}


def worth(mark: bool | None) -> float:
    return torch.nan if mark is None else float(mark)
