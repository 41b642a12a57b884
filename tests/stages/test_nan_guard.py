"""Losses and gradients that are no numbers: left out in every stage, counted, and many end a run."""

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from conftest import untrained
from safetensors.torch import load_file, save_file
from tiny import NETS, column, train
from torch.utils.data import DataLoader

from dalle.errors import UserError
from dalle.optim.factory import OptimizerFactory
from dalle.run_dir import Run, load_stage
from dalle.stages.base import Stage
from dalle.stages.nan_guard import Guard
from dalle.training import fit as training
from dalle.training.ema import Ema

STAGES = [model for model in NETS if model != "dit"]
SPOILT = 2  # the batch


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """logs/ with the networks that others need."""
    logs = tmp_path_factory.mktemp("logs")
    for model in ("clip", "dvae"):
        untrained(model, logs)
    return logs


class Watch(lightning.Callback):
    """What a step may move, before and after each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def look(self, trainer: Any, stage: Any) -> None:
        ema = next((c for c in trainer.callbacks if isinstance(c, Ema)), None)
        state = {f"stage.{k}": v.clone() for k, v in stage.state_dict().items()}
        state |= {f"average.{k}": v.clone() for k, v in (ema.average if ema else {}).items()}
        for i, optimizer in enumerate(trainer.optimizers):
            for j, moments in optimizer.state_dict()["state"].items():
                state |= {f"optimizer.{i}.{j}.{k}": v.clone() for k, v in moments.items()}
        self.seen.append(state)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)

    def same(self, batch: int) -> bool:
        before, after = self.seen[batch : batch + 2]
        return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """Watches the next run, as the last of its callbacks."""
    made, watcher = training.make_trainer, Watch()

    def make_trainer(*args: Any) -> lightning.Trainer:
        trainer: Any = made(*args)
        trainer.callbacks.append(watcher)
        return trainer

    monkeypatch.setattr(training, "make_trainer", make_trainer)
    return watcher


def spoil_losses(monkeypatch, value: float, first: int = SPOILT, last: int = SPOILT) -> None:
    marked, seed_batch, seen = Guard.marked, Stage.seed_batch, []
    monkeypatch.setattr(Stage, "seed_batch", lambda self: (seen.append(0), seed_batch(self)))

    def spoilt(self: Guard, loss: Any, which: int = 0) -> Any:
        return marked(self, loss + value if first <= len(seen) - 1 <= last else loss, which)

    monkeypatch.setattr(Guard, "marked", spoilt)


def spoil_gradients(monkeypatch, value: float) -> None:
    """Of the first weight of the network only."""
    seed_batch, seen = Stage.seed_batch, []

    def seed_and_spoil(self: Any) -> None:
        seed_batch(self)
        if not seen:
            weight = next(self.net.parameters())
            weight.register_hook(lambda g: torch.full_like(g, value) if len(seen) - 1 == SPOILT else g)
        seen.append(0)

    monkeypatch.setattr(Stage, "seed_batch", seed_and_spoil)


def options(logs: Path, name: str) -> tuple[str, ...]:
    return f"paths.run='{logs / name}'", "overwrite=true", "optimizer.warmup=0", "model.disc_start=0"


def trained(model: str, logs: Path, name: str, *more: str, steps: int = 4) -> Run:
    own = [o for o in options(logs, name) if model == "vqgan" or "disc_start" not in o]
    return train(model, logs, *own, *more, steps=steps)


@pytest.mark.parametrize("model", STAGES)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_one_step_is_left_out(model, kind, logs, watch, monkeypatch, capsys):
    """A loss of nan or infinity plus a constant, whose gradient would be a number; or one gradient."""
    if kind == "loss":
        spoil_losses(monkeypatch, float("inf") if model in ("prior", "gan") else float("nan"))
    else:
        spoil_gradients(monkeypatch, float("nan") if model in ("prior", "gan") else -float("inf"))
    run = trained(model, logs, f"{kind}/{model}", "callbacks.checkpoint.every=1")
    moved = [
        k for k in watch.seen[SPOILT] if not torch.equal(watch.seen[SPOILT][k], watch.seen[SPOILT + 1][k])
    ]
    if kind == "gradient" and model == "gan":  # its discriminator has taken its step before
        moved = [k for k in moved if not k.startswith(("stage.discriminator", "optimizer.1", "stage.r1"))]
    assert not moved
    assert not any(watch.same(batch) for batch in (0, 1, 3))
    assert list(column(run, "train/skipped").values()) == [0, 0, 1, 1]
    assert capsys.readouterr().out.count(f"careful: step {SPOILT} had a loss or a gradient") == 1
    assert all(torch.isfinite(w).all() for w in load_file(run.path / "model.safetensors").values())
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["global_step"] == run.manifest()["steps"] == 4
    assert [s["last_epoch"] >= 4 for s in state["lr_schedulers"]] == [True] * len(state["lr_schedulers"])
    assert state["guard"]["skipped"] == 1


@pytest.mark.parametrize("model", ["clip", "prior", "gan", "vqgan", "muon"])
def test_a_deferred_guard_leaves_out_the_same_steps(model, logs, watch, monkeypatch, capsys):
    """As on a GPU: nobody asks the device, and what it has left out is known a step later."""
    started = Stage.on_train_start
    monkeypatch.setattr(
        Stage, "on_train_start", lambda self: (started(self), setattr(self.guard, "deferred", True))
    )
    spoil_losses(monkeypatch, float("nan"))
    own = ("optimizer=muon",) if model == "muon" else ()
    run = trained("prior" if model == "muon" else model, logs, f"deferred/{model}", *own)
    before, after = watch.seen[SPOILT : SPOILT + 2]
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert not [k for k in moved if not k.startswith("average.")]  # comes nearer to the weights
    assert not any(watch.same(batch) for batch in (0, 1, 3))
    assert list(column(run, "train/skipped").values()) == [0, 0, 0, 1]
    assert capsys.readouterr().out.count(f"careful: step {SPOILT} had a loss or a gradient") == 1
    guard = torch.load(run.checkpoint, weights_only=True)["guard"]
    assert guard["skipped"] == 1
    assert guard["limits"]


def test_both_guards_take_the_same_steps(logs, monkeypatch):
    """Where nothing is spoilt they make the same weights."""
    waited = load_file(trained("prior", logs, "waited", "optimizer=muon").path / "model.safetensors")
    started = Stage.on_train_start
    monkeypatch.setattr(
        Stage, "on_train_start", lambda self: (started(self), setattr(self.guard, "deferred", True))
    )
    made = load_file(trained("prior", logs, "made", "optimizer=muon").path / "model.safetensors")
    assert all(torch.equal(made[k], waited[k]) for k in waited)


@pytest.mark.parametrize("model", ["clip", "vqgan"])
def test_many_in_a_row_end_the_run(model, logs, monkeypatch):
    spoil_losses(monkeypatch, float("nan"), first=2, last=10**9)
    name = f"many/{model}"
    with pytest.raises(
        UserError, match=r"step 2 and all 2 steps after it had a loss or a gradient .*optimizer.lr"
    ):
        trained(model, logs, name, "stop_after_skipped=3", "callbacks.checkpoint.every=2", steps=50)
    assert not Run(logs / name).finished
    assert torch.load(Run(logs / name).checkpoint, weights_only=True)["global_step"] == 4


def test_broken_data_are_named(logs, monkeypatch):
    seed_batch = Stage.on_train_batch_start

    def spoil(self: Any, batch: Any, batch_idx: int) -> None:
        seed_batch(self, batch, batch_idx)
        batch["image"][0, 0, 0, 0] = torch.nan

    monkeypatch.setattr(Stage, "on_train_batch_start", spoil)
    with pytest.raises(UserError, match=r"likely the data are broken \(image of the last batch\)"):
        trained("vae", logs, "data", "stop_after_skipped=2")


@pytest.mark.parametrize("model", STAGES)
def test_a_learning_rate_of_1000_is_no_success(model, logs):
    name = f"fast/{model}"
    with pytest.raises(UserError, match=r"optimizer\.lr=1000 is too high"):
        trained(model, logs, name, "optimizer.lr=1000", steps=6)
    assert not Run(logs / name).finished
    assert not Run(logs / name).checkpoint.exists()


def test_steps_mostly_left_out_are_no_success(logs, monkeypatch):
    spoil_losses(monkeypatch, float("nan"), first=1, last=10**9)
    with pytest.raises(UserError, match="3 of 4 steps had a loss or a gradient that is no number"):
        trained("vae", logs, "mostly")


def test_metrics_that_are_no_numbers_are_null(logs, monkeypatch, capsys):
    evaluate = Stage._evaluate

    def spoilt(self: Any, split: str, batch: Any, batch_idx: int) -> Any:
        if split == "test":
            batch["image"] = batch["image"] * torch.nan
        return evaluate(self, split, batch, batch_idx)

    monkeypatch.setattr(Stage, "_evaluate", spoilt)
    run = trained("vae", logs, "null", steps=2)
    text = (run.path / "manifest.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"]["test/loss"] is None
    assert "careful: no number came out for" in capsys.readouterr().out


class TestWeights:
    """That are no numbers."""

    def test_are_not_saved(self, tmp_path):
        net = torch.nn.Linear(2, 2)
        net.bias.data[0] = torch.nan
        with pytest.raises(UserError, match=r"holds weights that are no numbers \(bias\)"):
            Run(tmp_path).save(net.state_dict(), {})
        assert not list(tmp_path.iterdir())

    def test_are_not_loaded(self, tmp_path):
        run = untrained("vae", tmp_path)
        weights = load_file(run.path / "model.safetensors")
        next(iter(weights.values())).fill_(torch.inf)
        save_file(weights, run.path / "model.safetensors")
        with pytest.raises(UserError, match=r"model\.safetensors holds weights that are no numbers"):
            load_stage(run.path)

    def test_are_not_gone_on_with(self, tmp_path):
        run = train("vae", tmp_path, steps=1)
        state = torch.load(run.checkpoint, weights_only=True)
        next(iter(state["state_dict"].values())).fill_(torch.nan)
        torch.save(state, run.checkpoint)
        (run.path / "manifest.json").unlink()
        with pytest.raises(UserError, match=r"last\.ckpt holds weights that are no numbers"):
            train("vae", tmp_path, "resume=true", steps=2)


class Steps(lightning.Trainer):
    """A trainer of which only its steps are asked."""

    global_step = 0


def test_averages_of_bf16_weights_move():
    """A step of 1 - .998 is below the 8 bits of a bf16 number."""
    stage, ema, trainer = Stage(), Ema(0.998), Steps.__new__(Steps)
    stage.net = torch.nn.Linear(4, 4).to(torch.bfloat16)
    ema.updates = 10**6  # beyond the warm-up
    ema.on_fit_start(trainer, stage)
    before = ema.average["weight"].clone()
    with torch.no_grad():
        stage.net.weight += 1
    for trainer.global_step in range(1, 11):
        ema.on_train_batch_end(trainer, stage)
    moved = (ema.average["weight"] - before) / (stage.net.weight.float() - before)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.998**10))
    ema.swap_in(stage)
    assert stage.net.weight.dtype == torch.bfloat16


def test_accumulated_steps_are_whole_and_validations_count_steps(logs, monkeypatch):
    """Five batches an epoch and four a step: one is left over, and would have made a step of a quarter."""
    steps = []
    end = Guard.end
    monkeypatch.setattr(Guard, "end", lambda self: (steps.append(0), end(self))[1])
    more = ("data.size=40", "trainer.accumulate_grad_batches=4", "trainer.val_check_interval=2")
    run = trained("vae", logs, "accumulated", *more, steps=4)
    assert len(steps) == 4
    state = torch.load(run.checkpoint, weights_only=True)
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert progress["processed"] == 16
    assert list(column(run, "val/loss")) == [1, 3]


class SpoiltOnOne(Stage):
    """In its second step one rank has a loss that is no number."""

    def __init__(self) -> None:
        super().__init__(
            OptimizerFactory(torch.optim.SGD, lr=0.1, weight_decay=0.0, warmup=0, decay="constant")
        )
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)

    def step(self, batch: Any) -> dict[str, Any]:
        loss = self.net(batch["image"]).square().mean()
        return {"loss": loss * torch.nan if (self.global_rank, self.global_step) == (1, 1) else loss}


@pytest.mark.slow
def test_a_loss_of_one_rank_that_is_no_number_is_left_out_on_both(tmp_path):
    """Three steps of two ranks, one of them left out, are two steps of one, as all items are the same."""
    weights, quiet = [], {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    for devices, steps in ((1, 2), (2, 3)):
        stage = SpoiltOnOne()
        fit = lightning.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp_spawn" if devices > 1 else "auto",
            max_steps=steps, default_root_dir=tmp_path, enable_model_summary=False, **quiet,
        )  # fmt: skip
        fit.fit(stage, DataLoader([{"image": torch.ones(4)}] * 12, batch_size=2))
        weights.append(stage.net.weight.detach())
    assert fit.callback_metrics["train/skipped"] == 1
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], SpoiltOnOne().net.weight)
