"""A run's life: whose directory it is, one process at a time, stopped and resumed as if it never had been."""

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from tiny import overrides, train, weights

from dalle import files, run_lock
from dalle.errors import UserError
from dalle.evaluation.results import publish
from dalle.evaluation.run import alone
from dalle.machine import is_main_process
from dalle.run_dir import Run
from dalle.run_lock import MARKER, claimed, locked, only_one
from dalle.stages.base import Stage
from dalle.training import checkpoint_files, checkpoints
from dalle.training import fit as training
from dalle.training.checkpoints import read_checkpoint

MEASURED = ("train/samples_per_second", "train/cpu_cores")  # of a machine, not of a run


def rows(run: Run) -> list[dict[str, str]]:
    with (run.path / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def same_weights(one: Run, other: Run) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class At(lightning.Callback):
    """Calls `act` in a hook when so many steps are done."""

    def __init__(self, step: int, act, hook: str = "on_train_batch_start") -> None:
        setattr(self, hook, lambda trainer, *_: act() if trainer.global_step == step else None)


@pytest.fixture
def at(monkeypatch):
    """Puts an `At` into the next run, before the callback that saves; None takes it out."""
    made = training.make_trainer

    def put(callback: At | None) -> None:
        def make_trainer(config, run):
            trainer = made(config, run)
            if callback is not None:
                trainer.callbacks.insert(0, callback)
            return trainer

        monkeypatch.setattr(training, "make_trainer", make_trainer)

    return put


def fail(*_) -> None:
    raise RuntimeError("elsewhere")


def stop(number: int):
    return lambda: os.kill(os.getpid(), number)


# Whose directory it is


@pytest.fixture
def run(tmp_path) -> Run:
    """A directory that a run has claimed, with a few of its files."""
    run = Run(tmp_path / "logs" / "default" / "clip")
    with claimed(run, overwrite=False):
        for name in ("config.yaml", "last.ckpt", "samples/old.png", ".model.safetensors.7.tmp"):
            (run.path / name).parent.mkdir(exist_ok=True)
            (run.path / name).touch()
    return run


def test_overwrite_deletes_the_files_of_a_run(run):
    with claimed(run, overwrite=True):
        assert os.listdir(run.path) == [MARKER]


@pytest.mark.parametrize("name", ["notes.txt", "other/config.yaml", "Samples/a.png"])
def test_what_is_foreign_is_named_and_nothing_is_deleted(run, name):
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).touch()
    before = sorted(run.path.rglob("*"))
    with pytest.raises(UserError, match=name.split("/")[0]), claimed(run, overwrite=True):
        pass
    assert sorted(run.path.rglob("*")) == before


@pytest.mark.parametrize("names", [["thesis.tex"], ["samples/holiday.png"], ["config.yaml", "data.csv"]])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_other_files_is_never_claimed(tmp_path, names, overwrite):
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "mine" / name).write_text("text: mine")
    with pytest.raises(UserError, match="nothing is del"), claimed(Run(tmp_path / "mine"), overwrite):
        pass
    assert not (tmp_path / "mine" / MARKER).exists()
    assert all((tmp_path / "mine" / name).exists() for name in names)


def test_a_parent_of_runs_is_no_run(run):
    parent = run.path.parent
    with pytest.raises(UserError, match="clip"), claimed(Run(parent), overwrite=True):
        pass
    assert (run.path / "last.ckpt").exists()


def test_beside_the_jobs_of_a_sweep_there_is_room(run):
    (run.path.parent / ".jobs").mkdir()
    with claimed(Run(run.path.parent), overwrite=False):
        pass
    assert run.checkpoint.exists()


def test_links_are_never_followed(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").touch()
    shutil.rmtree(run.path / "samples")
    (run.path / "samples").symlink_to(tmp_path / "pictures")
    with claimed(run, overwrite=True):
        assert os.listdir(run.path) == [MARKER]
    assert (tmp_path / "pictures" / "cat.png").exists()


def test_a_run_on_another_disk_is_emptied_and_its_link_stays(run, tmp_path):
    scratch = tmp_path / "scratch"
    run.path.rename(scratch)
    run.path.symlink_to(scratch)
    with claimed(run, overwrite=True):
        pass
    assert run.path.is_symlink()
    assert os.listdir(scratch) == [MARKER]
    shutil.rmtree(scratch)
    with pytest.raises(UserError, match="is a link to nowhere"):
        run_lock.check_place({"name": "a", "stage": "b", "paths": {"run": str(run.path), "cache": "c"}})


def test_what_cannot_be_deleted_is_named(run, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EPERM, "no", path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=r"samples .*cannot be deleted"), claimed(run, overwrite=True):
        pass


def test_a_run_without_a_marker_is_known_by_its_files(untrained_stages, tmp_path):
    shutil.copytree(untrained_stages / "default" / "clip", tmp_path / "clip")
    (tmp_path / "clip" / MARKER).unlink(missing_ok=True)
    with claimed(Run(tmp_path / "clip"), overwrite=True):
        assert os.listdir(tmp_path / "clip") == [MARKER]


@pytest.mark.parametrize(
    "setting",
    ["name=../../x", "name=/abs", "name=''", "name=a/b", "name=.", "name=..", "name=[a]", "name=.a",
     "stage=.", "stage=''", "stage=..", "name=null", "stage=null"],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_names_are_plain_names(command, no_training, run, tmp_path, setting, overwrite):
    before = sorted(tmp_path.rglob("*"))
    words = overrides("clip", Path("logs"), setting, f"overwrite={overwrite}")
    assert setting.split("=")[0] in command("train.py", *words).error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["file/clip", "file", "/proc/nowhere", "/sys/x"])
@pytest.mark.parametrize("key", ["paths.run", "paths.logs", "paths.cache"])
def test_places_that_cannot_be_written(command, no_training, tmp_path, place, key):
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert (
        "cannot be written" in command("train.py", *overrides("clip", Path("logs"), f"{key}={place}")).error
    )
    assert sorted(tmp_path.rglob("*")) == before


# One process at a time

HOLD = """
import sys, time
from pathlib import Path
from dalle.run_lock import MARKER, locked
with locked(Path(sys.argv[1]) / MARKER):
    print("claimed", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_has_ended(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="another process trains there"), claimed(run, overwrite=True):
            pass
        assert run.checkpoint.exists()
    finally:
        holder.kill()
        holder.wait()
    with claimed(run, overwrite=True):  # stale locks are none
        assert not run.checkpoint.exists()


def test_a_missing_upstream_that_is_being_trained_is_waited_for(run, capsys):
    code = HOLD.replace("600", "0.5")
    holder = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    with only_one(run.path):
        assert holder.wait(60) == 0
    assert "waiting for it" in capsys.readouterr().out


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
def test_what_is_no_file_is_not_waited_for(run, make):
    """Whoever opens a pipe waits for somebody at its other end."""
    (run.path / MARKER).unlink(missing_ok=True)
    (run.path / "manifest.json").write_text('{"schema": 1, "stage": "clip", "weights": "0"}')
    make(run.path / MARKER)
    for claim in (claimed(run, overwrite=True), only_one(run.path)):
        with (
            pytest.raises(UserError, match=rf"\A[^\n]*{MARKER} (is no regular file|cannot be written)"),
            claim,
        ):
            pass
    assert run.checkpoint.exists()


def test_copies_of_a_process_do_not_hold_its_lock(tmp_path):
    with locked(tmp_path / "lock") as lock:
        child = os.fork()
        if not child:
            try:
                os.fstat(lock or 0)
            except OSError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_without_locks_everybody_goes_on(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with claimed(run, overwrite=False), only_one(run.path):
        pass


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),  # Lightning's own processes
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),  # torchrun, two machines
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun has numbered anew
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
    ],
)
def test_the_first_of_all_processes(monkeypatch, environment, first):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() is first


# Checkpoints on any disk


def test_a_kill_during_a_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """Whatever the folder of temporary files: the new one is written beside, and renamed when it is whole."""
    path, places = tmp_path / "last.ckpt", []
    path.write_bytes(b"old")
    real = torch.save

    def save(state, file):
        real(state, file)
        places.append(Path(file.name).parent)
        assert path.read_bytes() == b"old"

    monkeypatch.setattr(torch, "save", save)
    checkpoints.DurableIO(Stage()).save_checkpoint({"global_step": 3}, path)
    assert places == [tmp_path]
    assert torch.load(path)["global_step"] == 3
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.fixture
def fit(tmp_path):
    """A tiny CLIP in its own folder: `fit(step=..., ...)`."""

    def go(*more: str, steps: int = 6, name: str = "run") -> Run:
        place = f"paths.run='{tmp_path / name}'"
        return train("clip", tmp_path / "logs", place, "trainer.val_check_interval=2", *more, steps=steps)

    return go


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(fit, tmp_path, monkeypatch):
    real = checkpoint_files.atomic_path

    def full(path, **options):
        if Path(path).exists():
            monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        return real(path, **options)

    monkeypatch.setattr(checkpoint_files, "atomic_path", full)
    with pytest.raises(UserError, match=r"last.ckpt cannot .*: the disk is full; the one of step 2 is"):
        fit("callbacks.checkpoint.every=2")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 2
    assert [p for p in (tmp_path / "run").iterdir() if p.suffix == ".tmp"] == []
    assert fit("callbacks.checkpoint.every=2", "resume=true").finished


# Stopped and resumed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_run_that_goes_on_has_the_records_of_one_that_was_not_stopped(fit, at, tmp_path, number):
    whole = fit(name="whole")
    at(At(3, stop(number)))  # a validation is due when step 4 is done
    with pytest.raises(SystemExit):
        fit()
    at(None)
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 4
    parts = fit("resume=true")
    assert rows(parts) == rows(whole)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(parts).values(), weights(whole).values(), strict=True)
    )


@pytest.mark.parametrize(
    "hook",
    ["on_train_batch_end", "on_before_optimizer_step", "on_validation_start", "on_validation_batch_end"],
)
def test_an_error_amid_a_step_does_not_save_half_of_it(fit, at, tmp_path, hook):
    whole = fit("callbacks.checkpoint.every=3", name="whole")
    at(At(4, fail, hook))
    with pytest.raises(RuntimeError, match="elsewhere"):
        fit("callbacks.checkpoint.every=3")
    at(None)
    kept = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert kept["callbacks"]["Ema"]["updates"] == kept["global_step"]
    parts = fit("callbacks.checkpoint.every=3", "resume=true")
    assert rows(parts) == rows(whole)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(parts).values(), weights(whole).values(), strict=True)
    )


def test_leftovers_and_times_of_a_resumed_run(fit, at, tmp_path):
    at(At(3, stop(signal.SIGTERM)))
    with pytest.raises(SystemExit):
        fit()
    at(None)
    path = tmp_path / "run" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["callbacks"]["LastCheckpoint"]["seconds"] > 0
    state["callbacks"]["LastCheckpoint"]["seconds"] = 1000.0
    torch.save(state, path)
    left = tmp_path / "run" / f".last.ckpt.{files._host()}-4194305.tmp"  # more than any process's number
    left.touch()
    run = fit("resume=true")
    assert run.manifest()["seconds_training"] >= 1000
    assert not left.exists()


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("stopped")
    made = training.make_trainer

    def make_trainer(config, run):
        trainer = made(config, run)
        trainer.callbacks.insert(0, At(1, stop(signal.SIGTERM)))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_trainer", make_trainer)
        with pytest.raises(SystemExit):
            train(
                "clip", home / "logs", f"paths.run='{home / 'run'}'", "trainer.val_check_interval=2", steps=6
            )
    return home / "run"


@pytest.fixture
def stopped(stopped_once, tmp_path) -> Run:
    """A run that was stopped after two of six steps."""
    return Run(shutil.copytree(stopped_once, tmp_path / "run"))


@pytest.mark.parametrize(
    "setting",
    ["optimizer.lr=1e-5", "batch_size=4", "seed=1", "data.size=48", "precision=bf16", "optimizer=sgd",
     "optimizer=adamw", "trainer.gradient_clip_val=0.5", "optimizer.warmup=1",
     "trainer.accumulate_grad_batches=2"],
)  # fmt: skip
def test_another_setting_is_refused_by_name(fit, stopped, setting):
    before = {p: p.read_bytes() for p in stopped.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=rf"cannot go on with other settings: .*{setting.split('=')[0][:9]}"):
        fit("resume=true", setting)
    assert {p: p.read_bytes() for p in stopped.path.rglob("*") if p.is_file()} == before


def test_an_end_that_is_over_is_refused(fit, stopped):
    before = {p: p.read_bytes() for p in stopped.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"has done 2 steps already, so trainer.max_steps=1 is over"):
        fit("resume=true", steps=1)
    state = torch.load(stopped.checkpoint, weights_only=True)
    state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 3
    torch.save(state, stopped.checkpoint)
    before[stopped.checkpoint] = stopped.checkpoint.read_bytes()
    with pytest.raises(UserError, match=r"has done 3 epochs already, so trainer.max_epochs=2 is over"):
        fit("resume=true", "trainer.max_epochs=2")
    assert {p: p.read_bytes() for p in stopped.path.rglob("*") if p.is_file()} == before


def test_what_may_change_is_noted_with_its_step(fit, stopped):
    run = fit("resume=true", "trainer.val_check_interval=3", "callbacks.checkpoint.every=7", steps=8)
    (note,) = run.config()["resumed"]
    assert note["step"] == 2
    assert note["changed"] == {
        "trainer.max_steps": [6, 8],
        "trainer.val_check_interval": [2, 3],
        "callbacks.checkpoint.every": [500, 7],
    }
    assert run.manifest()["resumed"] == [note]


def test_other_data_are_refused(fit, stopped):
    state = torch.load(stopped.checkpoint, weights_only=True)
    state["callbacks"]["LastCheckpoint"]["facts"]["data"] = "Folder 0123"
    torch.save(state, stopped.checkpoint)
    with pytest.raises(UserError, match=r"data is .*, it was Folder 0123"):
        fit("resume=true")


def test_a_run_of_an_earlier_version_goes_on(fit, stopped):
    """Without a marker, and without what newer checkpoints and configurations say."""
    state = torch.load(stopped.checkpoint, weights_only=True)
    del state["callbacks"]["LastCheckpoint"]
    torch.save(state, stopped.checkpoint)
    config = yaml.safe_load((stopped.path / "config.yaml").read_text())
    del config["compile"], config["trainer"]["barebones"]
    (stopped.path / "config.yaml").write_text(yaml.safe_dump(config))
    (stopped.path / MARKER).unlink()
    assert fit("resume=true").finished


# Damage


def remove(*keys):
    return lambda state: [state.pop(key) for key in keys]


def put(key, value):
    return lambda state: state.update({key: value})


def within(place, *value):
    """Puts a value at a place (keys with dots between; a slash is a dot in a key), or takes what is there."""

    def damage(state):
        *way, last = [int(k) if k.isdigit() else k.replace("/", ".") for k in place.split(".")]
        for key in way:
            state = state[key]
        if value:
            state[last] = value[0]
        else:
            del state[last]

    return damage


DAMAGE = {
    "empty": lambda state: state.clear(),
    "weights only": remove("optimizer_states", "lr_schedulers", "loops", "callbacks"),
    **{f"without {key}": remove(key) for key in checkpoints.FRAME},
    "loops empty": put("loops", {}),
    "loops without progress": put("loops", {"fit_loop": {"epoch_loop.state_dict": {}}}),
    "optimizers empty": put("optimizer_states", []),
    "optimizers of numbers": put("optimizer_states", [5]),
    "optimizer without groups": put("optimizer_states", [{"state": {}}]),
    "steps a word": put("global_step", "four"),
    "steps negative": put("global_step", -1),
    "weights a list": put("state_dict", []),
    "weights of words": put("state_dict", {"net.a": "b"}),
    "callbacks a list": put("callbacks", []),
    "callbacks of words": put("callbacks", {"Ema": "on"}),
    "a tensor of another shape": within("optimizer_states.0.state.0.exp_avg", torch.zeros(3)),
    "a step counter of another shape": within("optimizer_states.0.state.0.step", torch.zeros(3)),
    "a tensor of whole numbers": lambda state: within(
        "optimizer_states.0.state.0.exp_avg", state["optimizer_states"][0]["state"][0]["exp_avg"].long()
    )(state),
    "a tensor that is none": within("optimizer_states.0.state.0.exp_avg", 5),
    "a tensor without numbers": lambda state: state["optimizer_states"][0]["state"][0]["exp_avg"].fill_(
        float("nan")
    ),
    "a tensor missing": within("optimizer_states.0.state.0.exp_avg_sq"),
    "the state of a weight that is not there": within("optimizer_states.0.state.999", {}),
    "the state of a weight a list": within("optimizer_states.0.state.0", []),
    "a group too few": within("optimizer_states.0.param_groups.1"),
    "a group without a rate": within("optimizer_states.0.param_groups.0.lr"),
    "a group with a word for a rate": within("optimizer_states.0.param_groups.0.lr", "high"),
    "a group of fewer weights": within("optimizer_states.0.param_groups.0.params", [0]),
    "an optimizer too many": lambda state: state["optimizer_states"].append(state["optimizer_states"][0]),
    "a schedule too many": lambda state: state["lr_schedulers"].append({}),
    "a schedule without its step": within("lr_schedulers.0.last_epoch"),
    "a schedule of words": within("lr_schedulers.0.base_lrs", ["a", "b"]),
    "a schedule without its factors": within("lr_schedulers.0.lr_lambdas"),
    "steps of the optimizer a word": within(
        "loops.fit_loop.epoch_loop/automatic_optimization/optim_progress.optimizer.step.total.completed", "a"
    ),
    "without steps of the optimizer": within(
        "loops.fit_loop.epoch_loop/automatic_optimization/optim_progress"
    ),
    "loaders of words": within("loops.fit_loop.state_dict.combined_loader", "all"),
    "an average of another network": within("callbacks.Ema.average", {"a": torch.zeros(1)}),
    "an average of another shape": within("callbacks.Ema.average.text_projection/weight", torch.zeros(1)),
    "an average a list": within("callbacks.Ema.average", []),
    "no average": within("callbacks.Ema.average"),
    "updates a word": within("callbacks.Ema.updates", "two"),
    "a grid due at a word": within("callbacks.SampleGrid.due", "soon"),
    "a grid without its time": within("callbacks.SampleGrid.due"),
    "losses of other bins": within("callbacks.LossByTime.sums", torch.zeros(3)),
    "losses a word": within("callbacks.LossByTime.sums", "none"),
    "seconds a word": within("callbacks.LastCheckpoint.seconds", "long"),
    "facts a number": within("callbacks.LastCheckpoint.facts", 5),
    "guard a list": put("guard", []),
    "guard of words": within("guard.skipped", "none"),
    "guard without limits": within("guard.limits"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(fit, stopped, how):
    state = torch.load(stopped.checkpoint, weights_only=True)
    DAMAGE[how](state)
    torch.save(state, stopped.checkpoint)
    before = {p: p.read_bytes() for p in stopped.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"last\.ckpt"):
        fit("resume=true")
    assert {p: p.read_bytes() for p in stopped.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("content", [b"", b"a list", b"PK\x03\x04", None, [1, 2]])
def test_what_is_no_checkpoint_is_one_line(fit, stopped, content):
    if isinstance(content, list):
        torch.save(content, stopped.checkpoint)
    elif content is None:
        weight = torch.load(stopped.checkpoint, weights_only=True)
        next(iter(weight["state_dict"].values())).fill_(float("nan"))
        torch.save(weight, stopped.checkpoint)
    else:
        stopped.checkpoint.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.ckpt .*(cannot be read|is no checkpoint|no numbers)"):
        fit("resume=true")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"a,b\n1,2\n"),
        ("metrics.csv", b"step,b\nabc,2\n"),
        ("metrics.csv", b"step,b\n\xe9,2\n"),
        ("metrics.csv", b"step,b\n1,2,3\n"),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[1]"),
        ("tokenizer.json", b"\xff"),
        ("config.yaml", b"a: ["),
        ("config.yaml", b"5"),
    ],
)
def test_damage_beside_a_checkpoint_is_one_line(fit, stopped, name, content):
    (stopped.path / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        fit("resume=true")


# Other things that are written, read and replaced


def test_an_evaluation_replaces_its_own_files_only(tmp_path):
    home, work = tmp_path / "evaluations", tmp_path / "evaluations" / ".id.partial"
    for again in (False, True):
        work.mkdir(parents=True)
        (work / "result.json").write_text(str(again))
        taken = home / "001" if again else None
        assert publish(work, home, taken) == home / "001"
        assert (home / "001" / "result.json").read_text() == str(again)
        assert os.listdir(home) == ["001"]
        (home / "001" / "mine.txt").touch()
        (home / "001" / "pictures").symlink_to(tmp_path)
    assert (home / "001" / "mine.txt").exists()


def test_an_evaluation_is_made_by_one_process_at_a_time(tmp_path):
    work = tmp_path / "evaluations" / ".id.partial"
    with alone(work), pytest.raises(UserError, match="another process makes"), alone(work):
        pass
    assert os.listdir(work.parent) == []


@pytest.mark.parametrize("out", ["file", "file/more", "/proc/nowhere"])
def test_pictures_that_cannot_be_written_are_refused_before_they_are_drawn(command, untrained_stages, out):
    Path("file").touch()
    words = (f"paths.logs='{untrained_stages}'", "prompt=a red ring", f"out={out}")
    assert f"{out} " in command("sample.py", *words).error
    words = (f"paths.logs='{untrained_stages}'", "n=8", "metrics=[judge]", f"out={out}", "trainer=cpu")
    assert "cannot be written" in command("evaluate.py", *words).error


def test_a_recipe_finds_runs_that_were_moved(command, untrained_stages, tmp_path):
    fast = ("steps=2", "pipeline.prior_sampler.steps=2", "precision=fp32")
    shutil.copytree(untrained_stages / "default", "logs/first")
    assert command("sample.py", "name=first", "prompt=a red ring", *fast).code == 0
    pictures = Path("logs/first/samples/001/000-00.png").read_bytes()

    Path("logs/first").rename("logs/second")  # with its recipe: found beside it
    recipe = "recipe=logs/second/samples/001/recipe.yaml"
    assert command("sample.py", recipe, "out=made").code == 0
    assert Path("made/000-00.png").read_bytes() == pictures

    Path("logs/second/samples/001/recipe.yaml").rename("recipe.yaml")
    assert "say where its runs are now" in command("sample.py", "recipe=recipe.yaml").error
    assert command("sample.py", "recipe=recipe.yaml", "name=second", "out=again").code == 0
    assert Path("again/000-00.png").read_bytes() == pictures
    words = [f"pipeline.{stage}=logs/second/{stage}" for stage in ("clip", "prior", "decoder")]
    assert command("sample.py", "recipe=recipe.yaml", *words, "out=third").code == 0
    assert Path("third/000-00.png").read_bytes() == pictures


def test_a_run_that_was_killed_before_its_test_has_the_same_records(tmp_path):
    run = train("vae", tmp_path / "logs")
    whole = rows(run)
    for name in ("manifest.json", "model.safetensors"):
        (run.path / name).unlink()
    train("vae", tmp_path / "logs", "resume=true")
    assert run.finished
    assert rows(run) == whole
