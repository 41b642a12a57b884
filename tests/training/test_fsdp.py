"""Shards over two ranks on the CPU: the same weights as one process has, and the same files."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from ranks import in_ranks
from tiny import column, configure, weights
from torch.distributed.tensor import DTensor

from dalle.run_dir import Run
from dalle.stages.base import Stage
from dalle.stages.nan_guard import Guard
from dalle.training import checkpoints, fit
from dalle.training.checkpoints import read_checkpoint

STAGES = ("prior", "ar_prior", "decoder", "dit", "upsampler", "vae", "dalle")
COMMON = (
    "data.size=16", "trainer.val_check_interval=2", "trainer.gradient_clip_val=0.1", "optimizer=adamw",
    "optimizer.weight_decay=0.5", "optimizer.eps=1e-3", "optimizer.warmup=0",
)  # fmt: skip
SHARDS = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "batch_size=4")


def config_of(stage: str, logs: Path, run: str, *more: str, steps: int = 3) -> dict[str, Any]:
    own = (f"paths.run='{logs / 'fsdp' / stage / run}'", f"trainer.max_steps={steps}")
    return configure(stage, logs, *COMMON, *own, *more)


def as_two_ranks(self: Any, batch: Any, batch_idx: int) -> dict[str, Any]:
    """A step of one process that does with its batch what two ranks do with their halves."""
    seen, losses = self.trainer.fit_loop.epoch_loop.batch_progress.total, []
    for rank in range(2):
        torch.manual_seed(hash((self.seed, rank, seen.processed)))
        losses.append(self.step({key: value[rank::2] for key, value in batch.items()})["loss"])
    return {"loss": self.guard.marked((losses[0] + losses[1]) / 2)}


@contextmanager
def calling(hook: str, do: Callable[[Any, Any], None]):
    """Puts a callback into the next runs: `do(trainer, stage)` at a hook of Lightning's."""
    made = fit.make_trainer

    def make_trainer(*args: Any) -> lightning.Trainer:
        trainer: Any = made(*args)
        callback = type("Calls", (lightning.Callback,), {hook: lambda _, t, m, *more: do(t, m)})()
        trainer.callbacks.insert(0, callback)
        return trainer

    fit.make_trainer = make_trainer
    try:
        yield
    finally:
        fit.make_trainer = made


# What the two ranks do


def seen_in_shards(trainer: Any, stage: Any) -> None:
    for p in stage.net.parameters():
        assert isinstance(p, DTensor)
        assert p.to_local().shape[0] in (-(-p.shape[0] // 2), p.shape[0] // 2)
    if trainer.global_step:
        for state in trainer.optimizers[0].state.values():
            assert isinstance(state["exp_avg"], DTensor)


def stop(trainer: Any, stage: Any) -> None:
    if trainer.global_step == 1 and trainer.global_rank == 1:
        os.kill(os.getpid(), signal.SIGINT)


def resumed(stage: str, logs: Path) -> None:
    checkpoints.STOP_EVERY = 1
    fit.train(config_of(stage, logs, "long", *SHARDS, steps=5))
    with calling("on_train_batch_start", stop):
        try:
            fit.train(config_of(stage, logs, "parts", *SHARDS, steps=5))
        except SystemExit:
            torch.distributed.barrier()
    fit.train(config_of(stage, logs, "parts", *SHARDS, "resume=true", steps=5))


def spoilt(logs: Path) -> None:
    """A loss that is no number, on the second rank in the second step."""
    marked, seen = Guard.marked, []

    def mark(self: Guard, loss: Any, which: int = 0) -> Any:
        seen.append(loss)
        mine = os.environ["LOCAL_RANK"] == "1" and len(seen) == 2
        return marked(self, loss + float("nan") if mine else loss, which)

    before: list[Any] = []

    def look(trainer: Any, stage: Any) -> None:
        before.append([p.to_local().clone() for p in stage.net.parameters()])

    Guard.marked = mark
    try:
        with calling("on_train_batch_end", look):
            fit.train(config_of("prior", logs, "spoilt", *SHARDS))
    finally:
        Guard.marked = marked
    first, second, third = before
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))


def main(logs: Path) -> None:
    with calling("on_train_batch_start", seen_in_shards):
        for stage in STAGES:
            fit.train(config_of(stage, logs, "shards", *SHARDS))
    fit.train(config_of("decoder", logs, "recomputed", *SHARDS, "model.net.checkpoint=true"))
    for stage in ("prior", "decoder", "dalle"):
        half = ("trainer.strategy=fsdp2_bf16", "precision=bf16")
        fit.train(config_of(stage, logs, "half", *SHARDS, *half))
    for stage in ("decoder", "dvae"):
        resumed(stage, logs)
    spoilt(logs)


@pytest.fixture(scope="module")
def logs(untrained_stages, tmp_path_factory) -> Path:
    """logs/fsdp/<stage>/ of all the runs above."""
    cwd = tmp_path_factory.mktemp("shards")
    (cwd / "logs").mkdir()
    (cwd / "logs" / "default").symlink_to(untrained_stages / "default")
    in_ranks(__file__, cwd, str(cwd / "logs"), seconds=900)
    return cwd / "logs"


def close(a: Any, b: Any, path: str = "") -> None:
    """Two nests of one layout, their numbers close."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=lambda said: f"{path}: {said}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            close(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for k, pair in enumerate(zip(a, b, strict=True)):
            close(*pair, f"{path}.{k}")
    else:
        assert a == (pytest.approx(b, rel=1e-4) if isinstance(b, float) else b), path


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_weights_and_files_are_those_of_one_process(logs, stage, monkeypatch):
    """Adam's moments, the average and the norms that were clipped, too; in the same layout."""
    monkeypatch.setattr(Stage, "training_step", as_two_ranks)
    fit.train(config_of(stage, logs, "one", "batch_size=8"))
    one, shards = (Run(logs / "fsdp" / stage / name) for name in ("one", "shards"))
    close(weights(shards), weights(one))
    a, b = (read_checkpoint(run.checkpoint) for run in (shards, one))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        close(a[key], b[key], key)
    close(a["callbacks"]["Ema"], b["callbacks"]["Ema"])
    close(column(shards, "train/grad_norm"), column(one, "train/grad_norm"))
    decays = {group["weight_decay"] for group in a["optimizer_states"][0]["param_groups"]}
    assert decays == {0.5, 0.0}  # matrices and vectors are told apart by the shape of the whole
    assert shards.manifest()["parameters"] == one.manifest()["parameters"]


@pytest.mark.slow
def test_recomputing_blocks_changes_nothing(logs):
    close(*(weights(Run(logs / "fsdp" / "decoder" / name)) for name in ("recomputed", "shards")))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prior", "decoder", "dalle"])
def test_weights_that_are_gathered_in_bf16_stay_in_fp32(logs, stage):
    half, full = (Run(logs / "fsdp" / stage / name) for name in ("half", "shards"))
    for name, weight in weights(half).items():
        assert weight.dtype == weights(full)[name].dtype
    losses = column(half, "train/loss")
    assert losses == pytest.approx(column(full, "train/loss"), rel=0.03)
    assert losses != column(full, "train/loss")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decoder", "dvae"])
def test_stopped_and_resumed_is_as_never_stopped(logs, stage):
    """dVAEs have running statistics, which are no weights."""
    parts, long = (Run(logs / "fsdp" / stage / name) for name in ("parts", "long"))
    assert read_checkpoint(parts.checkpoint)["global_step"] == 5
    assert all(torch.equal(w, weights(long)[name]) for name, w in weights(parts).items())
    for name in ("train/loss", "val/loss"):
        assert column(parts, name) == column(long, name)
    assert parts.manifest()["metrics"] == long.manifest()["metrics"]


@pytest.mark.slow
def test_a_run_goes_on_without_shards(logs, capsys):
    """Its checkpoint is that of any other run."""
    alone = Run(logs / "fsdp" / "vae" / "alone")
    shutil.copytree(logs / "fsdp" / "vae" / "shards", alone.path)
    (alone.path / "manifest.json").unlink()
    fit.train(config_of("vae", logs, "alone", "trainer=cpu", "batch_size=4", "resume=true", steps=5))
    said = capsys.readouterr().out
    assert "trainer.strategy=auto (was fsdp2)" in said
    assert alone.manifest()["steps"] == 5


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_moves_none(logs):
    assert list(column(Run(logs / "fsdp" / "prior" / "spoilt"), "train/skipped").values()) == [0, 1, 1]


@pytest.mark.parametrize(
    ("words", "line"),
    [("model=prior optimizer=muon", "optimizer=muon needs whole matrices"),
     ("model=gan", "trainer=fsdp does not go with a stage of several optimizers"),
     ("model=clip optimizer=adamw", "trainer=fsdp cannot shard a network with a scalar weight"),
     ("model=prior precision=fp16", "precision=16-mixed does not go with trainer=fsdp"),
     ("model=prior compile=true", "compile=true was never tried with trainer=fsdp"),
     ("model=prior lora.rank=2", "lora.rank does not go with trainer=fsdp"),
     ("model=prior trainer.strategy=fsdp", "trainer.strategy=fsdp is FSDP's first version")],
)  # fmt: skip
def test_what_does_not_go_with_shards_is_one_line(command, no_training, untrained_stages, words, line):
    places = (f"paths.logs='{untrained_stages}'", f"upstream.clip='{untrained_stages / 'default' / 'clip'}'")
    usual = ("trainer=fsdp", "trainer.accelerator=cpu", "name=new")
    assert line in command("train.py", *usual, *places, *words.split()).error


def test_blocks_are_the_layers():
    from dalle.training.fsdp import blocks

    inner = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    net = torch.nn.Module()
    net.levels, net.head = torch.nn.ModuleList([inner, torch.nn.Conv2d(1, 1, 1)]), torch.nn.Linear(1, 1)
    net.tower = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert [*blocks(net)] == [*inner, net.levels[1]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
