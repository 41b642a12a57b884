"""Loggers: a CSV file per run, always; W&B that works without an account; TensorBoard is Lightning's."""

import csv
import io
import os
from argparse import Namespace
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from dalle.errors import UserError

MAX_NAME = 128  # of a run, in W&B


class MetricsCsv(Logger):
    """``metrics.csv``: a row per logged step, a column per metric. A resumed run goes on in the same file.

    Rows at or after the step a run is resumed from are dropped: they are about to be written again.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self.rows: list[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration is beside the file, in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        step = step or 0
        if self.rows is None:
            self.rows = [row for row in self._read() if int(row["step"]) < step]
        values = {k: float(v) if isinstance(v, Tensor | float) else v for k, v in metrics.items()}
        if self.rows and int(self.rows[-1]["step"]) == step:
            self.rows[-1].update(values)
        else:
            self.rows.append({"step": step, **values})

    @rank_zero_only
    def save(self) -> None:
        if not self.rows:
            return
        columns = sorted({key for row in self.rows for key in row} - {"step"})
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *columns])
        writer.writeheader()
        writer.writerows(self.rows)
        aside = self.path.with_name(".metrics.csv.tmp")
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text.getvalue(), encoding="utf-8")
        aside.replace(self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def wandb(
    directory: str | Path,
    project: str = "dalle",
    name: str | None = None,
    group: str | None = None,
    logs: str | Path | None = None,
    resume: bool = False,
) -> WandbLogger:
    """A W&B logger; offline where no account is set up here (``wandb sync`` uploads such a run later).

    Args:
        name: without one, where `directory` is below `logs`: ``default-prior-optimizer.lr=0.001``.
        resume: go on in the W&B run that was last written to `directory`, if any.
    """
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError("logger=wandb needs the wandb package: pip install 'dalle[wandb]'") from None
    mode = os.environ.get("WANDB_MODE", "online" if has_account() else "offline")
    folder = Path(directory)
    below = logs is not None and folder.is_relative_to(logs)
    name = name or "-".join(
        folder.relative_to(logs).parts if logs is not None and below else folder.parts[-1:]
    )
    begun = sorted(folder.glob("wandb/*run-*-*/"), key=lambda path: path.stat().st_mtime_ns)
    number = begun[-1].name.rsplit("-", 1)[1] if resume and begun else None
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME - 31]}...{name[-28:]}"  # what tells jobs of many settings apart ends it
    folder.mkdir(parents=True, exist_ok=True)
    return WandbLogger(project=project, name=name, group=group, save_dir=folder, mode=mode, id=number)


def has_account() -> bool:
    """Whether W&B finds a key without asking for one: in the environment or where `wandb login` keeps it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC", Path.home() / ".netrc")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False
