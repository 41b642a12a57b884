"""One measure of pictures, the same in training and in evaluation.

A new one is one file and one line of config. The file holds a class with the names of its `columns` and with
`rows`, what is measured on each picture; the figure of a column is the mean over pictures with its interval,
unless `figures` says otherwise:

    class Contrast(EvaluationMetric):
        columns = ("contrast",)

        def rows(self, image, captions):
            return {"contrast": image.float().std((1, 2, 3))}

The line is ``extra_metrics=[{_target_: mylab.contrast.Contrast}]`` of evaluate.py, and in training
``callbacks.generation.extra_metrics=[...]``: the figure is logged as ``test/contrast``. Either way the
package is one that ``trust=[mylab]`` names.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, distributed
from torchmetrics import Metric

from dalle.images import to_uint8
from dalle.metrics.intervals import Figure, exact, of_mean

Rows = dict[str, Tensor]  # a row for each picture
BIASED = "_biased"  # marks the name of a distance that is mostly bias, by too few pictures


class EvaluationMetric(Metric):
    """Keeps rows of generated and of real pictures; `compute` makes figures of those of all ranks.

    Pictures are taken as the 8 bits they are saved with, and rows in the order of their items: figures depend
    neither on the number of ranks nor on the type in which pictures come.

    Attributes:
        columns: names of the rows.
        reference: tells the rows of real pictures apart (a network's hash ...); None: they are not needed.
        notes: what to know of the figures, once they are made.
    """

    full_state_update = False
    columns: Sequence[str] = ()

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gather)
        self.notes = list[str]()
        for name in ("item", "text", *self.columns):
            self.add_state(f"made_{name}", [], dist_reduce_fx="cat")
            self.add_state(f"real_{name}", [], dist_reduce_fx="cat")

    @property
    def reference(self) -> Any:
        return None

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str]) -> Rows:
        """Rows of a batch, by column; `captions` is empty where pictures have none."""
        raise NotImplementedError

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        """Figures of all pictures, in the order of their items. Needs no ranks and no network."""
        return {name: of_mean(made[name]) for name in self.columns}

    def update(
        self,
        image: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"],
        captions: Sequence[str],
        items: Sequence[int],
        real: bool = False,
    ) -> None:
        """Adds pictures, 8 bits or in [-1, 1], with the caption and the number of each."""
        if captions and len(image) != len(captions):
            raise ValueError(f"{len(image)} pictures, but {len(captions)} captions")
        pixels = image if image.dtype == torch.uint8 else to_uint8(image)
        with torch.autocast(image.device.type, enabled=False):
            self.keep(self.rows(pixels, list(captions)), items, captions, "real" if real else "made")

    def keep(
        self, rows: Rows, items: Sequence[int], captions: Sequence[str] = (), kind: str = "made"
    ) -> None:
        """Adds rows of pictures of these numbers."""
        text = "".join(f"{json.dumps(caption)}\n" for caption in captions).encode()
        kept = {"item": torch.tensor(items), "text": torch.tensor(list(text), dtype=torch.uint8), **rows}
        for name, values in kept.items():
            getattr(self, f"{kind}_{name}").append(values.detach().cpu())

    def compute(self) -> dict[str, Figure]:
        """The figures, none without pictures; every rank must call it."""
        made, captions = self.seen("made")
        return self.figures(made, self.seen("real")[0], captions) if made else {}

    def seen(self, kind: str) -> tuple[Rows, list[str]]:
        """The rows kept so far (of all ranks, where states are synchronised) and the captions."""
        table = {name: self._state(f"{kind}_{name}") for name in ("item", *self.columns)}
        order = table.pop("item").argsort(stable=True)
        lines = bytes(self._state(f"{kind}_text").byte().tolist()).decode().splitlines()
        texts = [json.loads(line) for line in lines]
        rows = {name: values[order] for name, values in table.items() if len(values)}
        return rows, [texts[i] for i in order.tolist()] if texts else []

    def pooled(self) -> tuple[Rows, Rows]:
        """Rows of generated and of real pictures of all ranks; every rank must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self.seen("made")[0], self.seen("real")[0]

    def _state(self, name: str) -> Tensor:
        parts = getattr(self, name)
        parts = [part.cpu() for part in (parts if isinstance(parts, list) else [parts])]
        return torch.cat(parts) if parts else torch.zeros(0)


class PictureCount(EvaluationMetric):
    """`pictures`: how many there are; compare distances of equal numbers only."""

    columns = ("shown",)

    def rows(self, image: UInt8[Tensor, "B 3 H W"], captions: list[str]) -> Rows:
        return {"shown": torch.ones(len(image))}

    def figures(self, made: Rows, real: Rows, captions: list[str]) -> dict[str, Figure]:
        return {"pictures": exact(len(made["shown"]))}


def gather(values: Tensor, group: Any = None) -> list[Tensor]:
    """Those of all ranks. Unlike for torchmetrics' own, tensors may be on the CPU, and ranks have none."""
    parts: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(parts, values.cpu(), group)
    return [part for part in parts if len(part)] or [values]


def update_all(
    metrics: Sequence[EvaluationMetric],
    made: Float[Tensor, "B 3 H W"],
    real: Float[Tensor, "B 3 h w"],
    captions: Sequence[str],
    items: Sequence[int],
) -> None:
    """Adds generated pictures, and to those metrics that need them the real ones of the same captions."""
    for metric in metrics:
        metric.update(made, captions, items)
        if metric.reference is not None:
            metric.update(real, captions, items, real=True)


def values_of(metrics: Sequence[EvaluationMetric]) -> dict[str, float]:
    """All figures of several metrics without their intervals, to be logged; every rank must call it."""
    return {name: figure.value for metric in metrics for name, figure in metric.compute().items()}


def without_marks(values: dict[str, float]) -> dict[str, float]:
    """Names as they are logged: a curve keeps its own, however many pictures there are."""
    return {name.removesuffix(BIASED): value for name, value in values.items()}
