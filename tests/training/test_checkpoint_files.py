"""Checkpoints in the background, and earlier ones that are kept."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import column, train, weights

from dalle.errors import UserError
from dalle.run_dir import Run
from dalle.stages.base import Stage
from dalle.training import checkpoint_files
from dalle.training.checkpoint_files import DurableIO, same_file
from dalle.training.checkpoints import LastCheckpoint, read_checkpoint


def steps(folder: Path) -> dict[str, int]:
    return {p.name: torch.load(p, weights_only=True)["global_step"] for p in sorted(folder.glob("*.ckpt"))}


def test_it_is_written_while_training_goes_on(tmp_path, monkeypatch):
    """What is written is what there was when it was saved; the next one waits until it is done."""
    go, began, write, order = threading.Event(), threading.Event(), DurableIO.write, []

    def slow(self, checkpoint, path, also):
        began.set()
        assert go.wait(30)
        write(self, checkpoint, path, also)
        order.append(int(checkpoint["global_step"]))

    monkeypatch.setattr(DurableIO, "write", slow)
    weight, path = torch.zeros(3), tmp_path / "last.ckpt"
    io = DurableIO(Stage(), background=True)
    io.save_checkpoint({"global_step": 1, "state_dict": {"w": weight}}, path)
    assert began.wait(30)
    weight += 1
    assert not path.exists()
    second = threading.Thread(target=io.save_checkpoint, args=({"global_step": 2, "state_dict": {}}, path))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # never two at once
    go.set()
    second.join()
    io.wait()
    assert order == [1, 2]
    io.save_checkpoint({"global_step": 3, "state_dict": {"w": weight}}, path)
    weight += 1
    io.wait()
    assert torch.load(path, weights_only=True)["state_dict"]["w"].tolist() == [1, 1, 1]


def test_an_error_in_the_background_is_told_by_the_next(tmp_path):
    (tmp_path / "file").touch()
    io = DurableIO(Stage(), background=True)
    io.save_checkpoint({"global_step": 1}, tmp_path / "file" / "last.ckpt")
    with pytest.raises(UserError, match=r"a file is in the way; no checkpoint is there yet"):
        io.save_checkpoint({"global_step": 2}, tmp_path / "last.ckpt")
    io.wait()  # told once
    io.save_checkpoint({"global_step": 3}, tmp_path / "last.ckpt")
    io.wait()
    assert steps(tmp_path) == {"last.ckpt": 3}


@pytest.mark.parametrize("links", [True, False])
def test_the_last_few_are_kept(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(checkpoint_files.os, "link", refuse)
    mine = {f"step-{name}.ckpt": 7 for name in ("00000001-good", "best", "-")}
    for name, step in mine.items():
        torch.save({"global_step": step}, tmp_path / name)
    io = DurableIO(Stage(), keep=2)
    for step in (5, 50, 500):
        io.save_checkpoint({"global_step": step}, tmp_path / "last.ckpt")
    kept = {"last.ckpt": 500, "step-00000050.ckpt": 50, "step-00000500.ckpt": 500}
    assert steps(tmp_path) == kept | mine
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step-00000500.ckpt") == links
    same_file(tmp_path / "step-00000050.ckpt", tmp_path / "last.ckpt")  # to go back to it
    assert steps(tmp_path)["last.ckpt"] == 50
    assert len(list(tmp_path.iterdir())) == 3 + len(mine)


def test_the_best_is_kept(tmp_path, monkeypatch):
    """By a figure of the validation that no other one is as low as; also beyond a stop."""
    figures = iter([3.0, float("nan"), 1.0, 2.0, 0.5])
    end = LastCheckpoint.on_validation_end

    def with_figure(self, trainer, *more):
        seen = {"val/loss": torch.tensor(next(figures))}
        end(self, SimpleNamespace(callback_metrics=seen, sanity_checking=False), *more)

    monkeypatch.setattr(LastCheckpoint, "on_validation_end", with_figure)
    options = ("trainer.val_check_interval=2", "callbacks.checkpoint.best=val/loss", "callbacks=none",
               "callbacks.checkpoint.background=true")  # fmt: skip
    monkeypatch.setattr("tiny.NETS", {"vae": ("model.net.width=8", "model.net.latent_dim=8")})
    run = train("vae", tmp_path, *[f"+{o}" if ".b" in o else o for o in options], steps=9)
    assert steps(run.path) == {"best.ckpt": 6, "last.ckpt": 9}
    assert read_checkpoint(run.checkpoint)["callbacks"]["LastCheckpoint"]["best_value"] == 1.0
    (run.path / "manifest.json").unlink()
    train("vae", tmp_path, *[f"+{o}" if ".b" in o else o for o in options], "resume=true", steps=11)
    assert steps(run.path) == {"best.ckpt": 10, "last.ckpt": 11}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system knows no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "last.ckpt")
    with pytest.raises(
        UserError, match=r"last\.ckpt cannot be read \(it is no file\); delete it, or start again"
    ):
        read_checkpoint(tmp_path / "last.ckpt")


def test_the_best_is_of_the_figure_that_is_asked_for_now(tmp_path):
    """Not of the one before the run was stopped: a loss of 0.1 is no accuracy that is never reached again."""
    before = LastCheckpoint(tmp_path, best="val/loss")
    before.best_value = 0.1
    same, other = (
        LastCheckpoint(tmp_path, best="val/loss"),
        LastCheckpoint(tmp_path, best="val/top1", best_is="max"),
    )
    for saver, value in ((same, 0.1), (other, None)):
        saver.load_state_dict(before.state_dict())
        assert saver.best_value == value
        assert saver.fits(before.state_dict(), Stage())
    same.load_state_dict({"best_value": 0.2})  # of a version that did not say of what
    assert same.best_value == 0.2
    assert not same.fits({"best_value": float("nan")}, Stage())
    assert not same.fits({"best_value": "low"}, Stage())


def test_a_misspelt_figure_is_said_once(tmp_path, capsys):
    saver = LastCheckpoint(tmp_path, best="val/lss")
    trainer: Any = SimpleNamespace(callback_metrics={"val/loss": torch.tensor(1.0)}, is_global_zero=True)
    for _ in range(2):
        saver.on_validation_end(trainer)
    line = (
        "careful: callbacks.checkpoint.best=val/lss is no figure of the validation; did you mean val/loss?\n"
    )
    assert capsys.readouterr().out == line


def test_a_run_in_the_background_is_that_in_the_foreground(tmp_path):
    runs: list[Run] = []
    for background in ("true", "false"):
        own = (f"paths.run='{tmp_path / background}'", f"callbacks.checkpoint.background={background}",
               "callbacks.checkpoint.every=1", "callbacks.checkpoint.keep=2")  # fmt: skip
        runs.append(train("vae", tmp_path, *own))
    a, b = (weights(run) for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert column(runs[0], "train/loss") == column(runs[1], "train/loss")
    assert steps(runs[0].path) == steps(runs[1].path)
