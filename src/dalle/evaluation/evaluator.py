"""Evaluator at pictures under the Trainer: every rank makes its share and keeps rows, which are then pooled.

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
from dalle.data.sources import captions_of, identity_collate
from dalle.errors import UserError
from dalle.evaluation.metrics import Distances, Meter, Rows
from dalle.evaluation.plan import Plan
from dalle.images import from_uint8, save_png, to_pil, to_uint8
from dalle.machine import is_main_process, peak_memory

SHOWN = 16  # in the grid


class Evaluator(lightning.LightningModule):
    """Makes this rank's pictures, looks at them, and keeps the rows."""

    def __init__(self, plan: Plan, cache: Path, work: Path, batch_size: int, save_pictures: bool) -> None:
        super().__init__()
        self.plan, self.cache, self.work = plan, cache, work
        self.batch_size, self.save_pictures = batch_size, save_pictures
        nets = [meter.network.owner for meter in plan.meters if isinstance(meter, Distances)]
        self.parts = nn.ModuleList([plan.target.module, *nets, *([plan.scorer] if plan.scorer else [])])
        self.rows: dict[str, list[Rows]] = defaultdict(list)
        self.seconds: list[tuple[float, int]] = []
        self.shown: dict[int, Tensor] = {}
        self.bar = tqdm(disable=True)
        self.kept = {
            k: kept for k, meter in enumerate(plan.meters) if (kept := self.reference(meter)) is not None
        }

    def reference(self, meter: Meter) -> Rows | None:
        """The rows of the real pictures, where they are kept; nothing where none are needed."""
        path = self.reference_path(meter)
        return ({} if meter.key is None else None) if path is None or not path.exists() else read_rows(path)

    def reference_path(self, meter: Meter) -> Path | None:
        source = self.plan.source
        facts = [meter.key, source.fingerprint(), source.image_size, self.plan.real]
        return None if meter.key is None else self.cache / cache_key("real pictures", *facts)

    def predict_dataloader(self) -> DataLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        real = self.plan.real if len(self.kept) < len(self.plan.meters) else 0
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
        self.note("extra", items, extra)
        for k, meter in enumerate(plan.meters):
            self.note(f"made {k}", items, meter.rows(image, captions, items))
        for item, picture in zip(items, image.cpu(), strict=True):
            if item < SHOWN:
                self.shown[item] = picture
            if self.save_pictures:
                save_png(to_pil(from_uint8(picture)), self.work / "pictures" / f"{item:06d}.png")

    def look_at_real(self, items: list[int]) -> None:
        image = to_uint8(self.plan.source.images(items)).to(self.device)
        captions = [some[0] for some in captions_of(self.plan.source, items)]
        for k, meter in enumerate(self.plan.meters):
            if k not in self.kept:
                self.note(f"real {k}", items, meter.rows(image, captions, items))

    def note(self, name: str, items: list[int], rows: Rows) -> None:
        self.rows[name].append(
            {"item": torch.tensor(items), **{k: v.detach().cpu() for k, v in rows.items()}}
        )


class Rank:
    """The rows, times and pictures of this rank; `pool` gives those of all, on every rank."""

    def __init__(self, looking: Evaluator) -> None:
        merged = {name: {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
                  for name, parts in looking.rows.items()}  # fmt: skip
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
        self.own = {"rows": merged, "seconds": looking.seconds, "shown": looking.shown, "memory": memory}

    def pool(self) -> dict[str, Any]:
        ranks: list[Any] = [self.own]
        if distributed.is_available() and distributed.is_initialized():
            ranks = [None] * distributed.get_world_size()
            distributed.all_gather_object(ranks, self.own)
        rows: dict[str, Rows] = {}
        for name in {name for rank in ranks for name in rank["rows"]}:
            parts = [rank["rows"][name] for rank in ranks if name in rank["rows"]]
            order = torch.cat([part["item"] for part in parts]).argsort()
            keys = [key for key in parts[0] if key != "item"]
            rows[name] = {key: torch.cat([part[key] for part in parts])[order] for key in keys}
        return {
            "rows": rows,
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
