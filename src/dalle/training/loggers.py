"""Loggers: a CSV file per run, always; W&B that works without an account; TensorBoard is Lightning's.

Each is told the same: what a run is and is made from (`begin`), pictures and verdicts on the way, and what it
leaves behind (`end`).
"""

import contextlib
import csv
import io
import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from dalle.errors import UserError
from dalle.files import write_text
from dalle.images import grid, to_pil
from dalle.ranges import NonNegative, Place, Text
from dalle.run_dir import Run
from dalle.training.dashboard_spec import tensorboard_layout

MAX_NAME = 128  # of a run or an artifact, in W&B


class MetricsCsv(Logger):
    """``metrics.csv``: a row per logged step, a column per metric. A resumed run goes on in the same file.

    Rows at or after the step a run is resumed from are dropped: they are about to be written again.
    """

    def __init__(self, directory: Place) -> None:
        super().__init__()
        self.run = Run(Path(directory))
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
            self.rewind(step)
        assert self.rows is not None
        values = {k: float(v) if isinstance(v, Tensor | float) else v for k, v in metrics.items()}
        if self.rows and int(self.rows[-1]["step"]) == step:
            self.rows[-1].update(values)
        else:
            self.rows.append({"step": step, **values})

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drops the rows of this step and those after it: they are about to be written again."""
        self.rows = [row for row in self.run.metric_rows() if int(row["step"]) < step]

    @rank_zero_only
    def save(self) -> None:
        if self.rows is None:
            return
        columns = sorted({key for row in self.rows for key in row} - {"step"})
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *columns])
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.run.path / "metrics.csv", text.getvalue(), sync=False)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with contextlib.suppress(*[UserError] if status == "failed" else []):  # that is the second error
            self.save()


class RunLogger(WandbLogger):
    """W&B's logger, which also keeps where a run comes from and what it leaves behind, as artifacts.

    Args:
        logs: the folder of all runs; a run and its artifacts are named after the way from there.
        artifact_gb: larger weights stay here; 0: all do.
    """

    def __init__(self, logs: Path | None, artifact_gb: float, **options: Any) -> None:
        super().__init__(**options)
        self.logs, self.artifact_gb = logs, artifact_gb

    def artifact(self, run: Run) -> Any:
        """The weights of a finished run with their manifest, not yet logged; None where they are too large.

        Where W&B's latest version holds the same files this is that version, whoever logs it.
        """
        from wandb import Artifact

        weights = run.path / "model.safetensors"
        if weights.stat().st_size > self.artifact_gb * 1e9:
            return None
        made = Artifact(artifact_name(run.path, self.logs), type="model", metadata=run.manifest())
        for path in (weights, run.path / "manifest.json"):
            made.add_file(str(path), policy="immutable")  # no second copy of what nobody changes
        return made

    @rank_zero_only
    def log_upstream(self, runs: Sequence[Run]) -> None:
        """Notes the artifacts that a run is made from in its configuration, and in its lineage.

        Offline there is no lineage: `dalle.training.wandb_workspace` makes it from the notes once the run has
        been synced.
        """
        uses = [f"{artifact_name(run.path, self.logs)}:{run.manifest()['weights']}" for run in runs]
        self.experiment.config.update({"uses": uses}, allow_val_change=True)
        if not self.experiment.offline:
            for run in runs:
                if (made := self.artifact(run)) is not None:
                    self.experiment.use_artifact(made, aliases=[run.manifest()["weights"]])

    @rank_zero_only
    def log_run(self, run: Run) -> None:
        """Logs the weights of a finished run, and the pictures it has drawn on the way, as artifacts."""
        from wandb import Artifact

        if (made := self.artifact(run)) is not None:
            self.experiment.log_artifact(made, aliases=["latest", run.manifest()["weights"]])
        elif self.artifact_gb > 0:
            print(f"W&B is not given the weights in {run}: over logger.wandb.artifact_gb={self.artifact_gb}")
        if any((run.path / "samples").glob("*.png")):
            samples = Artifact(f"{artifact_name(run.path, self.logs)}-samples", type="samples")
            samples.add_dir(str(run.path / "samples"), policy="immutable")
            self.experiment.log_artifact(samples)


def run_name(directory: Path, logs: Path | None) -> str:
    """``default-prior``, from a run's directory; without the folder of all runs its last part."""
    known = logs is not None and directory.is_relative_to(logs)
    name = "-".join(directory.relative_to(logs).parts if logs is not None and known else directory.parts[-1:])
    return shortened(name, MAX_NAME)


def shortened(name: str, most: int) -> str:
    """What tells jobs of many settings apart ends the name: that end is kept."""
    return name if len(name) <= most else f"{name[: most - 31]}...{name[-28:]}"


def artifact_name(directory: Path, logs: Path | None) -> str:
    """The same in the letters that W&B allows, with room for ``-samples``."""
    return shortened(re.sub(r"[^\w.-]+", "-", run_name(directory, logs)), MAX_NAME - 8)


def wandb(
    directory: Place,
    project: Text = "dalle",
    name: Text | None = None,
    group: Text | None = None,
    job_type: Text | None = None,
    tags: Sequence[Text] = (),
    logs: Place | None = None,
    resume: bool = False,
    artifact_gb: NonNegative = 1.0,
) -> RunLogger:
    """A W&B logger; offline where no account is set up here (``wandb sync`` uploads such a run later).

    Args:
        name: without one, where `directory` is below `logs`: ``default-prior-optimizer.lr=0.001``.
        resume: go on in the W&B run that was last written to `directory`, if any.
        artifact_gb: see `RunLogger`.
    """
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError("logger=wandb needs the wandb package: pip install 'dalle[wandb]'") from None
    mode = os.environ.get("WANDB_MODE", "online" if has_account() else "offline")
    folder, below = Path(directory), None if logs is None else Path(logs)
    name = run_name(folder, below) if name is None else shortened(name, MAX_NAME)
    begun = sorted(folder.glob("wandb/*run-*-*/"), key=lambda path: path.stat().st_mtime_ns)
    number = begun[-1].name.rsplit("-", 1)[1] if resume and begun else None
    folder.mkdir(parents=True, exist_ok=True)
    if mode == "offline":  # what is uploaded later, pictures of tables too, stays with the run: not in ~
        os.environ.setdefault("WANDB_DATA_DIR", str(folder.absolute() / "wandb"))
    return RunLogger(
        below, artifact_gb, project=project, name=name, group=group, job_type=job_type, tags=list(tags),
        save_dir=folder, mode=mode, id=number,
    )  # fmt: skip


def has_account() -> bool:
    """Whether W&B finds a key without asking for one: in the environment or where `wandb login` keeps it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC", Path.home() / ".netrc")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def begin(
    loggers: Sequence[Logger], config: dict[str, Any], facts: dict[str, Any], upstream: Sequence[Run]
) -> None:
    """Tells loggers what a run is before it begins: its configuration, facts, and what it is made from."""
    for logger in loggers:
        logger.log_hyperparams({**config, **facts})
        if isinstance(logger, RunLogger):
            logger.log_upstream(upstream)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(tensorboard_layout(config["stage"]))


def end(loggers: Sequence[Logger], run: Run) -> None:
    """Gives a finished run to the loggers that keep such."""
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.log_run(run)


def log_picture(trainer: lightning.Trainer, key: str, picture: Any) -> None:
    """Gives a PIL picture to every logger that shows pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(picture.height, picture.width, -1)
            logger.experiment.add_image(key, pixels, trainer.global_step, dataformats="HWC")


def log_verdicts(
    trainer: lightning.Trainer,
    key: str,
    captions: Sequence[str],
    images: Tensor,
    verdicts: Mapping[str, Tensor],
) -> Any:
    """Gives pictures with what was asked for and how they were judged to every logger: as a labelled grid,
    and to W&B as a table besides.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        verdicts: by attribute (B,): 1, 0, or nan where a caption does not say; none without a judge.

    Returns: the grid.
    """
    columns = {
        key: [None if v != v else bool(v) for v in column.tolist()] for key, column in verdicts.items()
    }
    rows = [{key: column[i] for key, column in columns.items()} for i in range(len(captions))]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            from wandb import Image

            cells = zip(captions, images, rows, strict=True)
            data = [[caption, Image(to_pil(image)), *row.values()] for caption, image, row in cells]
            logger.log_table(key, ["prompt", "image", *columns], data, step=trainer.global_step)
    labels = [f"{caption} {in_words(row)}".strip() for caption, row in zip(captions, rows, strict=True)]
    picture = grid(images, labels)
    log_picture(trainer, f"{key}_sheet", picture)
    return picture


def in_words(row: Mapping[str, bool | None]) -> str:
    """A row of verdicts: ``(right)``, or ``(not: colour, count)``; nothing without a judge."""
    wrong = [attribute for attribute, right in row.items() if right is False and attribute != "all"]
    return "" if not row else f"(not: {', '.join(wrong)})" if wrong else "(right)"
