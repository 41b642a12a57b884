"""Looks at pictures under the Trainer: every rank makes its share and keeps rows, which are then pooled.

A picture depends on its number alone, and features are computed one picture at a time, so the pooled rows are
the same for any number of ranks (up to the rounding of batched products).
"""

import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dalle.data.embedding_cache import BrokenCache, cache_key, open_or_build, read_meta
from dalle.data.sources import first_captions, identity_collate
from dalle.errors import UserError
from dalle.evaluation.plan import Plan
from dalle.images import from_uint8, save_png, to_pil, to_uint8
from dalle.machine import is_main_process, peak_memory
from dalle.metrics.fid import FrechetDistance
from dalle.metrics.metric import EvaluationMetric, Rows

SHOWN = 16  # in the grid


class Evaluator(lightning.LightningModule):
    """Makes this rank's pictures, looks at them, and keeps the rows."""

    def __init__(self, plan: Plan, cache: Path, work: Path, batch_size: int, save_pictures: bool) -> None:
        super().__init__()
        self.plan, self.cache, self.work = plan, cache, work
        self.batch_size, self.save_pictures = batch_size, save_pictures
        nets = [metric.network.owner for metric in plan.metrics if isinstance(metric, FrechetDistance)]
        self.parts = nn.ModuleList([plan.target.module, *nets, *([plan.scorer] if plan.scorer else [])])
        self.rows: dict[str, list[Tensor]] = defaultdict(list)  # what targets measure on the way
        self.seconds: list[tuple[float, int]] = []
        self.shown: dict[int, Tensor] = {}
        self.bar = tqdm(disable=True)
        self.kept = {
            k: kept for k, metric in enumerate(plan.metrics) if (kept := self.reference(metric)) is not None
        }

    def reference(self, metric: EvaluationMetric) -> Rows | None:
        """The rows of the real pictures, where they are kept; nothing where none are needed."""
        path = self.reference_path(metric)
        return {} if path is None else read_rows(path) if path.exists() else None

    def reference_path(self, metric: EvaluationMetric) -> Path | None:
        source = self.plan.source
        facts = [metric.reference, source.fingerprint(), source.image_size, self.plan.real]
        return None if metric.reference is None else self.cache / cache_key("real pictures", *facts)

    def predict_dataloader(self) -> DataLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        real = self.plan.real if len(self.kept) < len(self.plan.metrics) else 0
        made, real = (range(n)[rank::world] for n in (self.plan.made, real))
        self.bar = tqdm(
            total=len(made) + len(real), desc="evaluating", unit="image", disable=None if not rank else True
        )
        batches: Any = [
            (look, list(items[start : start + self.batch_size]))
            for look, items in (("made", made), ("real", real))
            for start in range(0, len(items), self.batch_size)
        ]
        return DataLoader(batches, batch_size=None, collate_fn=identity_collate)

    def transfer_batch_to_device(
        self, batch: tuple[str, list[int]], device: torch.device, dataloader_idx: int
    ) -> tuple[str, list[int]]:
        return batch

    def predict_step(self, batch: tuple[str, list[int]], batch_idx: int) -> None:
        look, items = batch
        self.look_at_made(items) if look == "made" else self.look_at_real(items)
        self.bar.update(len(items))

    def look_at_made(self, items: list[int]) -> None:
        plan = self.plan
        captions = [plan.captions[item] for item in items] if plan.captions else []
        started = time.perf_counter()
        made, extra = plan.target.make(plan.source, items, captions)
        self.seconds.append((time.perf_counter() - started, len(items)))
        if bad := int((~made.isfinite().flatten(1).all(1)).sum()):
            raise UserError(
                f"{bad} of {len(made)} pictures hold values that are not finite; "
                "try precision=fp32, and look whether the training ended well"
            )
        image = to_uint8(made).to(self.device)
        for name, values in {"item": torch.tensor(items), **extra}.items():
            self.rows[name].append(values.detach().cpu())
        for metric in plan.metrics:
            metric.update(image, captions, items)
        for item, picture in zip(items, image.cpu(), strict=True):
            if item < SHOWN:
                self.shown[item] = picture
            if self.save_pictures:
                save_png(to_pil(from_uint8(picture)), self.work / "pictures" / f"{item:06d}.png")

    def look_at_real(self, items: list[int]) -> None:
        image = to_uint8(self.plan.source.images(items)).to(self.device)
        captions = first_captions(self.plan.source, items)
        for k, metric in enumerate(self.plan.metrics):
            if k not in self.kept:
                metric.update(image, captions, items, real=True)

    def pool(self) -> dict[str, Any]:
        """Rows, times and pictures of all ranks, on every rank, which must all call it."""
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
        own = {"rows": {name: torch.cat(parts) for name, parts in self.rows.items()},
               "seconds": self.seconds, "shown": self.shown, "memory": memory}  # fmt: skip
        ranks: list[Any] = [own]
        if distributed.is_available() and distributed.is_initialized():
            ranks = [None] * distributed.get_world_size()
            distributed.all_gather_object(ranks, own)
        parts = [rank["rows"] for rank in ranks if rank["rows"]]
        rows = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        order = rows.pop("item", torch.zeros(0)).argsort()
        return {
            "metrics": [metric.pooled() for metric in self.plan.metrics],
            "extra": {name: values[order] for name, values in rows.items()},
            "seconds": [rank["seconds"] for rank in ranks],
            "shown": {item: picture for rank in ranks for item, picture in rank["shown"].items()},
            "memory": max(rank["memory"] for rank in ranks),
        }


def keep_rows(path: Path | None, rows: Rows) -> None:
    if path is None:
        return

    def save(folder: Path) -> dict[str, Any]:
        for name, values in rows.items():
            np.save(folder / f"{name}.npy", values.numpy())
        return {}

    open_or_build(path, lambda found, _: found, save, "features of real pictures", verify=False)


def read_rows(path: Path) -> Rows | None:
    """None where a file is missing or has changed: then they are computed again."""
    try:
        meta = read_meta(path, verify=True)
        return {Path(name).stem: torch.from_numpy(np.load(path / name)) for name in meta["files"]}
    except (BrokenCache, OSError, ValueError, KeyError, TypeError, AttributeError):
        if is_main_process():
            shutil.rmtree(path, ignore_errors=True)
        return None
