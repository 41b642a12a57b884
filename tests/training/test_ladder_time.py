"""How long a ladder takes is told before it begins, by measured steps; nothing of the measuring stays."""

import re
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import files_below
from tiny import configure

from dalle import machine
from dalle.cli import train
from dalle.run_dir import Run
from dalle.training import ladder, resume

STAGES = ("clip", "prior", "ar_prior", "decoder", "dvae", "dalle")


def long(model: str, folder: Path, steps: int = 1000, **trainer) -> dict:
    config = configure(model, folder)
    config["trainer"] |= {"max_steps": steps, "max_epochs": -1, **trainer}
    return config


def test_every_stage_is_told(tmp_path):
    line = ladder.how_long(ladder.check([long(model, tmp_path) for model in STAGES]))
    assert line
    first, listed, _ = re.fullmatch(r"about (.*) of training .*measured: (.*); (.*)", line).groups()
    assert [word.split()[0] for word in listed.split(", ")] == list(STAGES)
    assert all(re.fullmatch(r"\w+ \d+ (s|min)", word) for word in listed.split(", "))
    assert re.fullmatch(r"\d+ (s|min)", first)
    assert files_below(tmp_path) == {}, "nothing is written"


def test_the_time_is_that_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "seconds_of_step", lambda config, stage, datamodule: 0.5)
    built = ladder.check([long("clip", tmp_path), long("prior", tmp_path, 300)])
    line = ladder.how_long(built)
    assert line.startswith("about 11 min of training on this machine")  # 500 s and 150 s
    assert "clip 8 min, prior 2 min" in line


def test_ctrl_c_amid_the_measuring_is_ctrl_c(tmp_path, monkeypatch):
    """Not an end without a word: what Lightning makes of it is an exit, and its lines are not shown here."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ladder.Clock, "on_train_start", stopped)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            ladder.how_long(ladder.check([long("clip", tmp_path)]))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones


def test_a_clock_reads_the_median_of_what_is_not_warming_up():
    clock = ladder.Clock()
    clock.started, clock.ends = 0.0, [5.0, 9.0, 10.0, 11.0, 14.0]
    assert clock.seconds == 1.0
    clock.ends = [5.0]
    assert clock.seconds == 5.0


@pytest.mark.parametrize("cut", [{"fast_dev_run": True}, {"overfit_batches": 2}, {"max_steps": 100}])
def test_short_trainings_are_not_measured(tmp_path, cut):
    config = long("clip", tmp_path)
    config["trainer"] |= cut
    assert ladder.how_long(ladder.check([config])) is None


def test_a_ladder_says_its_time_and_its_place(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run_job", lambda words: None)
    monkeypatch.setattr(ladder, "how_long", lambda built: f"{len(built)} trainings")
    train.main(["-m", "model=clip,prior", "name=a"])
    assert capsys.readouterr().out.splitlines() == [
        "2 trainings", "[1/2] clip: logs/a/clip", "[2/2] prior: logs/a/prior"
    ]  # fmt: skip


class Spinning:
    """Threads that are slow together where there are too many of them."""

    def __init__(self, monkeypatch, threads: int, times: dict[int, float], load: float) -> None:
        self.now = threads
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0))
        monkeypatch.setattr(machine.torch, "get_num_threads", lambda: self.now)
        monkeypatch.setattr(machine.torch, "set_num_threads", lambda n: setattr(self, "now", n))
        monkeypatch.setattr(machine, "seconds_of_small_operations", lambda: times[self.now])


@pytest.mark.parametrize(
    ("load", "times", "expected"),
    [
        (2.0, {8: 1.0, 4: 0.5, 2: 0.4, 1: 0.39}, 2),
        (2.0, {8: 1.0, 4: 0.9}, 8),  # not worth other last bits
        (2.0, {8: 9.0, 4: 5.0, 2: 2.0, 1: 1.0}, 1),
        (0.1, {}, 8),  # a quiet machine: not even tried
    ],
)
def test_as_few_threads_as_are_fastest(monkeypatch, load, times, expected):
    cpu = Spinning(monkeypatch, 8, times, load)
    machine.settle_threads()
    assert cpu.now == expected


def test_a_given_number_of_threads_stays(monkeypatch):
    cpu = Spinning(monkeypatch, 8, {}, 5.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    machine.settle_threads()
    assert cpu.now == 8


def test_small_operations_take_time():
    started = time.perf_counter()
    took = machine.seconds_of_small_operations(3)
    assert 0 < took < time.perf_counter() - started


@pytest.mark.parametrize(("saved", "expected"), [(1, 1), (None, 2), (64, 2), ("1", 2)])
def test_a_resumed_run_keeps_its_threads(monkeypatch, saved, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    state = {} if saved is None else {"threads": saved}
    monkeypatch.setattr(resume, "read_checkpoint", lambda path: {"callbacks": {"LastCheckpoint": state}})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        resume.keep_threads(Run(Path("run")))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
