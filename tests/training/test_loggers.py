"""metrics.csv across resumed runs, W&B without an account, and what loggers are given besides numbers."""

import csv
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import lightning
import pytest
import torch
from PIL import Image
from tiny import wandb_history, wandb_records, without_account

from dalle.errors import UserError
from dalle.run_dir import Run
from dalle.training import loggers
from dalle.training.loggers import MetricsCsv, RunLogger, artifact_name, in_words, log_verdicts


def read(path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_per_step_and_a_column_per_metric(tmp_path):
    log = MetricsCsv(tmp_path / "new")
    log.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 0}, step=1)
    log.log_metrics({"val/loss": 0.25}, step=1)
    log.log_metrics({"train/loss": 0.125}, step=2)
    log.save()
    assert read(tmp_path / "new") == [
        {"step": "1", "epoch": "0", "train/loss": "0.5", "val/loss": "0.25"},
        {"step": "2", "epoch": "", "train/loss": "0.125", "val/loss": ""},
    ]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["metrics.csv"]


def test_a_resumed_run_drops_what_it_writes_again(tmp_path):
    first = MetricsCsv(tmp_path)
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step=step)
    first.save()
    second = MetricsCsv(tmp_path)
    second.save()  # nothing logged yet: nothing lost
    assert len(read(tmp_path)) == 6
    second.log_metrics({"train/loss": 30.0, "new": 1}, step=3)
    second.log_metrics({"train/loss": 40.0}, step=4)
    second.finalize("success")
    rows = read(tmp_path)
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        ("0", "0.0"),
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "30.0"),
        ("4", "40.0"),
    ]
    assert [row["new"] for row in rows] == ["", "", "", "1", ""]


def test_numbers_keep_their_digits(tmp_path):
    log = MetricsCsv(tmp_path)
    log.log_metrics({"x": 0.1 + 0.2}, step=0)
    log.save()
    again = MetricsCsv(tmp_path)
    again.log_metrics({"x": 1.0}, step=1)
    again.save()
    assert float(read(tmp_path)[0]["x"]) == 0.1 + 0.2


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    without_account(monkeypatch, tmp_path)


def test_wandb_is_offline_without_an_account(no_account, tmp_path):
    import wandb

    run = tmp_path / "run"
    log = loggers.wandb(run, name="clip", group="default")
    try:
        log.log_metrics({"train/loss": 0.5}, step=0)
        log.log_image("samples", [Image.new("RGB", (8, 8))], step=1)
        assert log.experiment.settings.mode == "offline"
    finally:
        wandb.finish()
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert wandb_history(wandb_records(offline))["train/loss"] == 0.5
    assert len(list(offline.glob("files/media/images/samples_*.png"))) == 1


def test_a_wandb_run_is_named_after_its_directory_and_goes_on_when_resumed(no_account, tmp_path):
    import wandb

    run = tmp_path / "logs" / "default" / "prior" / "optimizer.lr=0.1"

    def begun(**options) -> tuple[str, str]:
        log = loggers.wandb(run, logs=tmp_path / "logs", **options)
        try:
            return log.experiment.name, log.experiment.id
        finally:
            wandb.finish()

    name, first = begun(resume=True)  # nothing to resume yet
    assert name == "default-prior-optimizer.lr=0.1"
    assert begun(resume=True) == (name, first)
    second = begun()[1]
    assert second != first
    assert begun(resume=True, name="mine") == ("mine", second)
    assert loggers.wandb(run, logs=tmp_path / "elsewhere")._wandb_init["name"] == "optimizer.lr=0.1"
    long = loggers.wandb(tmp_path / ("x" * 200 + "~1a2b3c4d"))._wandb_init["name"]
    assert len(long) == 128
    assert long.endswith("xxx~1a2b3c4d")


def test_wandb_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'dalle\[wandb\]'"):
        loggers.wandb(tmp_path)


def test_wandb_is_online_with_a_key(no_account, monkeypatch, tmp_path):
    def mode() -> str:
        return loggers.wandb(tmp_path)._wandb_init["mode"]

    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")  # what is asked for wins
    assert mode() == "offline"


def test_wandb_login_is_found(no_account, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    assert loggers.has_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not loggers.has_account()
    netrc.write_text("nonsense\n")
    assert not loggers.has_account()


class Account:
    """What an online W&B run is told."""

    offline = False

    def __init__(self):
        self.config, self.used, self.logged = {}, [], []

    def use_artifact(self, artifact, aliases):
        self.used.append((artifact.name, artifact.digest, aliases))

    def log_artifact(self, artifact, aliases=("latest",)):
        self.logged.append((artifact.name, artifact.digest, list(aliases)))


def run_logger(logs, artifact_gb: float = 1.0) -> tuple[RunLogger, Account]:
    log = loggers.wandb(logs / "w", logs=logs, artifact_gb=artifact_gb)
    account = Account()
    account.config = SimpleNamespace(update=lambda values, **_: account.__dict__.update(values))
    log._experiment = account
    return log, account


def test_what_one_run_leaves_is_what_the_next_is_made_from(no_account, untrained_stages, tmp_path):
    logs = tmp_path / "logs"
    shutil.copytree(untrained_stages, logs)
    clip = Run(logs / "default" / "clip")
    weights = clip.manifest()["weights"]
    log, first = run_logger(logs)
    log.log_run(clip)
    log, second = run_logger(logs)
    log.log_upstream([clip])
    (logged,), (used,) = first.logged, second.used
    assert logged == ("default-clip", used[1], ["latest", weights])
    assert used == ("default-clip", logged[1], [weights])
    assert second.uses == [f"default-clip:{weights}"]


def test_large_weights_stay_here(no_account, untrained_stages, tmp_path, capsys):
    logs = tmp_path / "logs"
    shutil.copytree(untrained_stages, logs)
    prior = Run(logs / "default" / "prior")
    (prior.path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(prior.path / "samples" / "step-0000002.png")
    log, account = run_logger(logs, artifact_gb=1e-6)
    log.log_run(prior)
    log.log_upstream([prior])
    assert [name for name, _, _ in account.logged] == ["default-prior-samples"]
    assert account.used == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"not given the weights in {prior}: over logger.wandb.artifact_gb=1e-06" in said
    log, account = run_logger(logs, artifact_gb=0)
    log.log_run(prior)
    assert capsys.readouterr().out == ""


def test_names_of_artifacts(tmp_path):
    job = tmp_path / "default" / "prior" / "optimizer.lr=0.1,model.net.width=64"
    assert artifact_name(job, tmp_path) == "default-prior-optimizer.lr-0.1-model.net.width-64"
    assert len(artifact_name(tmp_path / ("x" * 300), tmp_path) + "-samples") <= 128


def test_verdicts_without_a_judge_and_in_words():
    trainer = Mock(spec=lightning.Trainer, loggers=[], global_step=1)
    bare = log_verdicts(trainer, "key", ["a dog", "a cat"], torch.zeros(2, 3, 8, 8), {})
    marks = {"colour": torch.tensor([0.0, float("nan")]), "all": torch.tensor([0.0, 1.0])}
    judged = log_verdicts(trainer, "key", ["a dog", "a cat"], torch.zeros(2, 3, 8, 8), marks)
    assert bare.tobytes() != judged.tobytes()
    assert in_words({}) == ""
    assert in_words({"colour": None, "count": True, "all": True}) == "(right)"
    assert in_words({"colour": False, "count": False, "all": False}) == "(not: colour, count)"
