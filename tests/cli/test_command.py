"""The command `dalle`, and the scripts that are doors onto it."""

import os
import sys

import pytest
from tiny import ROOT

from dalle import __version__
from dalle.cli import command as cli
from dalle.cli.train import TYPED
from dalle.launch.processes import child_command
from dalle.training.checks import check_config


def dalle(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dalle", *arguments])
    cli.main()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_alone_it_lists_its_commands(monkeypatch, capsys, arguments):
    dalle(monkeypatch, *arguments)
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split() for line in lines if line.startswith("  ")]
    assert [words[0] for words in listed] == list(cli.COMMANDS)
    assert all(len(words) > 3 for words in listed)


def test_it_knows_its_version(monkeypatch, capsys):
    dalle(monkeypatch, "--version")
    assert capsys.readouterr().out == f"dalle {__version__}\n"


def test_an_unknown_command(monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: there is no command 'trian'; did you mean dalle train\?$"):
        dalle(monkeypatch, "trian", "model=clip")
    with pytest.raises(SystemExit, match=r"'model=clip'; there are costs, dashboard, .*workspace$"):
        dalle(monkeypatch, "model=clip")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as ended:
        dalle(monkeypatch, name, "--help")
    assert not ended.value.code
    assert f"dalle {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "sample", "evaluate"])
def test_a_script_is_a_door(command, monkeypatch, capfd, name):
    """The same words are the same configuration, and the same mistake the same line."""
    shown = command(f"{name}.py", "seed=3", "--cfg", "job")
    assert shown.code == 0
    assert "\nseed: 3\n" in shown.out
    dalle(monkeypatch, name, "--cfg", "job", "seed=3")
    assert capfd.readouterr().out == shown.out
    line = command(f"{name}.py", "sampler=dim").error
    with pytest.raises(SystemExit) as ended:
        dalle(monkeypatch, name, "sampler=dim")
    assert ended.value.code == line
    assert "there is no sampler=dim; did you mean sampler=ddim?" in line


def test_usage_names_the_program(command, monkeypatch, capfd):
    assert "usage: train.py " in command("train.py", "--nonsense").err
    with pytest.raises(SystemExit):
        dalle(monkeypatch, "train", "--nonsense")
    assert "usage: dalle train " in capfd.readouterr().err


def test_the_command_line_stays_for_the_ranks_that_lightning_starts(command, monkeypatch):
    """Lightning starts them with the words that this process was started with."""
    command("train.py", "--cfg", "job", "prompt=a, b")
    assert sys.argv == [str(ROOT / "train.py"), "--cfg", "job", "prompt=a, b"]
    with pytest.raises(SystemExit):
        dalle(monkeypatch, "train", "model=clpi")
    assert sys.argv == ["dalle", "train", "model=clpi"]


def test_children_start_from_any_folder():
    assert child_command("train") == [sys.executable, "-m", "dalle", "train"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dalle tr", "train"),
        ("dalle train model=cl", "model=clip"),
        ("dalle sample pipeline=v", "pipeline=vae"),
    ],
)  # fmt: skip
def test_a_shell_completes_commands_and_settings(monkeypatch, capsys, typed, offered):
    monkeypatch.setenv("COMP_LINE", typed)
    monkeypatch.setenv("COMP_POINT", str(len(typed)))
    dalle(monkeypatch, "-sc", "query=bash")
    assert offered in capsys.readouterr().out.split()


def test_a_shell_learns_to_complete(monkeypatch, capsys):
    """By the line of the docs."""
    assert 'eval "$(dalle -sc install=bash)"' in (ROOT / "docs" / "first_steps.md").read_text(
        encoding="utf-8"
    )
    monkeypatch.delenv("COMP_LINE", raising=False)
    dalle(monkeypatch, "-sc", "install=bash")
    script = capsys.readouterr().out
    assert "complete -o nospace" in script
    assert "dalle" in script.splitlines()[-1].split()


def test_a_run_keeps_what_was_typed(monkeypatch, tmp_path):
    """In its config.yaml, also where a process was started for it by another."""
    kept, started = [], []

    def train(config):
        check_config(config)
        kept.append(config["command"])

    monkeypatch.setattr("dalle.training.fit.train", train)
    monkeypatch.setattr("dalle.cli.train.run_job", lambda *_: started.append(os.environ[TYPED]))
    words = ["model=clip", "trainer=cpu", f"paths.logs={tmp_path}", "name=a b"]
    dalle(monkeypatch, "train", *words)
    dalle(monkeypatch, "train", "-m", *words[:3], "name=a,b")
    typed = f"dalle train -m model=clip trainer=cpu paths.logs={tmp_path} name=a,b"
    assert kept == [f"dalle train model=clip trainer=cpu paths.logs={tmp_path} 'name=a b'"]
    assert TYPED not in os.environ
    monkeypatch.setenv(TYPED, typed)
    dalle(monkeypatch, "train", *words)
    assert kept[-1] == typed
    assert started == [typed] * len(started) != []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["demo"], "the following arguments are required: runs; dalle demo --help"),
        (["demo", "logs", "--n", "ten"], "argument --n: invalid int value: 'ten'; dalle demo --help"),
        (["dashboard", "logs", "--foo"], "unrecognized arguments: --foo"),
        (["gate"], "the following arguments are required: runs"),
        (["data", "check"], "the following arguments are required: path"),
        (["data"], "the following arguments are required: check"),
        (["workspace"], "the following arguments are required"),
    ],
)
def test_a_wrong_option_is_one_line(monkeypatch, capsys, arguments, line):
    with pytest.raises(SystemExit) as ended:
        dalle(monkeypatch, *arguments)
    assert str(ended.value.code).startswith(f"error: {line}")
    assert capsys.readouterr() == ("", "")
