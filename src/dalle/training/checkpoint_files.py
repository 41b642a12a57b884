"""Checkpoints as files: whole or not there, in the background where asked, earlier ones beside the last."""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from dalle.files import atomic_path, hidden_name
from dalle.stages.base import Stage
from dalle.weight_names import as_today

EARLIER = f"step-{'[0-9]' * 8}.ckpt"  # those that are kept beside the last


class DurableIO(TorchCheckpointIO):
    """Writes checkpoints beside their place, on the same disk. Lightning's own go through the folder of
    temporary files, which may be on another disk: moving them from there is no rename.

    Args:
        stage: what checkpoints are of; those of earlier versions are given with its names of weights.
        keep: how many there are at most, the last one included; the others are called by their step.
        background: training goes on as soon as there is a copy in main memory. One is written at a time, and
            what went wrong with it is raised by the next `save_checkpoint` or `wait`.

    Attributes:
        also: a further name for the next checkpoint.
    """

    def __init__(self, stage: Stage, keep: int = 1, background: bool = False) -> None:
        super().__init__()
        self.stage, self.keep, self.also = stage, keep, ""
        self.pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self.writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        also, self.also = self.also, ""
        self.wait()
        if self.pool is None:
            self.write(checkpoint, Path(path), also)
        else:
            copied = apply_to_collection(checkpoint, Tensor, lambda t: t.detach().to("cpu", copy=True))
            self.writing = self.pool.submit(self.write, copied, Path(path), also)

    def wait(self) -> None:
        """Until what was saved is on the disk.

        Raises:
            UserError: it could not be written.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def write(self, checkpoint: dict[str, Any], path: Path, also: str) -> None:
        with atomic_path(path, kept=lambda: kept(path)) as hidden, hidden.open("wb") as file:
            torch.save(checkpoint, file)
        if also:
            same_file(path, path.with_name(also))
        if self.keep > 1:
            same_file(path, path.with_name(f"step-{checkpoint['global_step']:08d}.ckpt"))
            for old in sorted(path.parent.glob(EARLIER))[: -self.keep]:
                old.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, **options: Any) -> dict[str, Any]:
        to_cpu = map_location or (lambda storage, place: storage)
        checkpoint = super().load_checkpoint(path, to_cpu, **options)
        checkpoint["state_dict"] = as_today(checkpoint["state_dict"], self.stage)
        for state in checkpoint["callbacks"].values():
            if "average" in state:  # of `dalle.training.ema.Ema`
                state["average"] = as_today(state["average"], self.stage.net)
        return checkpoint


def same_file(path: Path, other: Path) -> None:
    """Gives a file a further name, in the place of what has it; a copy where the disk knows no links."""
    hidden = hidden_name(other)
    hidden.unlink(missing_ok=True)
    try:
        os.link(path, hidden)
    except OSError:
        with atomic_path(other) as copied:
            shutil.copyfile(path, copied)
    else:
        hidden.replace(other)


def kept(path: Path) -> str:
    """What is left of a run whose checkpoint cannot be written."""
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # whatever it is, it is no checkpoint to go on from
        return "no checkpoint is there yet; free some space and start again"
    return f"the one of step {step} is kept: free some space and go on with resume=true"
