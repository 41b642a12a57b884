"""A user's mistake is one clear line: on the real exceptions of the installed Hydra."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tiny import ROOT, mistake

from dalle.cli import entry
from dalle.cli.compose import compose as compose_jobs
from dalle.errors import UserError
from dalle.files import atomic_folder, atomic_path
from dalle.launch.processes import call


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model=pirior", "there is no model=pirior; did you mean model=prior?"),
        ("sampler=zzz", "there is no sampler=zzz; there are ddim, ddpm, dpmpp, heun"),
        ("logger=[csv,nope]", "there is no logger=nope"),
        ("modle=prior", "there is no setting modle; did you mean model?"),
        ("opimizer.lr=1", "there is no setting opimizer; did you mean optimizer?"),
        ("optimizer.lrr=1", "there is no setting optimizer.lrr; did you mean optimizer.lr?"),
        ("model.net.widht=3", "there is no setting model.net.widht; did you mean model.net.width?"),
        ("sampler.zzz=1", "there is no setting sampler.zzz; there are eta, method, spacing, steps"),
        ("name.x.y=1", "there is no setting name.x"),
        ("smapler=ddim", "there is no setting smapler; did you mean sampler?"),
        ("sampler=dd", "there is no sampler=dd; did you mean sampler=ddim or sampler=ddpm?"),
        ("modl/net=dit", "there is no setting modl/net; did you mean model/net?"),
        ("model/nte=dit", "there is no setting model/nte; did you mean model/net?"),
        (
            "hydra/launcher=basik",
            "there is no hydra/launcher=basik; did you mean hydra/launcher=basic?; pip install",
        ),
        ("steps=3", "there is no setting steps; did you mean sampler.steps?"),
        ("lr=1", "there is no setting lr; did you mean callbacks.lr or optimizer.lr?"),
        ("model.width=3", "there is no setting model.width; did you mean model.net.width?"),
        ("hydra.sweep.drr=1", "there is no setting hydra.sweep.drr; did you mean hydra.sweep.dir?"),
        ("data=folder", "data.root is needed: give it as data.root=VALUE"),
        ("model=prior,clip", "model=prior,clip: several values are several jobs; say so with -m"),
        ("~optimizer.nothing", "Could not delete from config. 'optimizer.nothing' does not exist."),
    ],
)
def test_hydras_errors_in_one_line(override, line):
    error = mistake(override)
    assert entry._is_users(error)
    assert entry.one_line(error).startswith(line)
    assert "\n" not in entry.one_line(error)


def test_the_home_of_nobody():
    with pytest.raises(RuntimeError) as error:
        Path("~nobody-of-this-name/x").expanduser()
    assert entry.said(error.value).startswith("a path begins with ~ and the name of nobody here")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data.root=~/pictures", "data.root=/home/me/pictures"),
        ("paths.logs='~/my logs'", "paths.logs='/home/me/my logs'"),
        ("data.shards=[~/a.tar,'~/b.tar']", "data.shards=[/home/me/a.tar,'/home/me/b.tar']"),
        ("init_from=~/a,~/b", "init_from=/home/me/a,/home/me/b"),
        ("data.root=a~/b", "data.root=a~/b"),
        ("~callbacks.ema", "~callbacks.ema"),
        ("prompt=~/ is a tilde", "prompt=~/ is a tilde"),
    ],
)
def test_paths_at_home(monkeypatch, typed, meant):
    """bash leaves them as they are where a name has a dot, and Hydra does not take them."""
    monkeypatch.setenv("HOME", "/home/me")
    assert entry.at_home(typed) == meant


@pytest.mark.parametrize("command", ["sample", "evaluate", "encode"])
@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("~n", "n is needed: do not take it away"),
        ("~pipeline.prior", "pipeline.prior is needed: do not take it away"),
        ("~paths=default", "paths is needed"),
        ("+promt=x", "there is no setting promt"),
    ],
)
def test_what_a_command_cannot_do_without(command, word, line):
    with pytest.raises(UserError, match=line):
        compose_jobs(command, [word])
    others = [
        "~data.sources.a",
        "+data@data.sources.a=folder",
        "~sampler.eta",
        "+sampler.x=1",
        "++n=4",
        "+own=a",
    ]
    entry.check_whole(others, ["own"])


@pytest.mark.parametrize("override", ["optimizer.lr=[1", "foo", "a b=c", "prompt='x"])
def test_what_cannot_be_read_is_quoted(override):
    line = entry.one_line(mistake(override))
    assert line.startswith(f"{override!r} cannot be read; write key=value")
    assert "http" not in line


def test_a_network_that_is_not_there():
    line = entry.one_line(mistake("model=decoder", "model/net=vit"))
    assert line == "there is no model/net=vit; did you mean model/net=dit?"
    assert entry.one_line(mistake("model=prior", "model/net=vit")).startswith(
        "Could not override 'model/net'."
    )


def test_user_errors_lose_their_line_breaks():
    assert entry.one_line(UserError("wrong:\n  all of it")) == "wrong: all of it"


def run_with(error: BaseException, *arguments: str):
    def main(_):
        raise error

    entry.run(main, arguments)


def test_a_users_mistake_ends_with_code_1_and_one_line():
    with pytest.raises(SystemExit, match=r"^error: do this$") as ended:
        run_with(UserError("do\n this"))
    assert ended.value.code == "error: do this"  # Python prints it on stderr and exits with 1


@pytest.mark.parametrize(
    "arguments", [["debug=true"], ["debug=traceback"], ["+debug=true"], ["debug=one_batch"]]
)
def test_debug_shows_where(arguments):
    with pytest.raises(UserError):
        run_with(UserError("x"), *arguments)


@pytest.mark.parametrize("arguments", [["debug=false"], ["debug=none"], ["name=debug=true"]])
def test_no_debug_no_traceback(arguments):
    with pytest.raises(SystemExit):
        run_with(UserError("x"), *arguments)


def test_a_bug_is_no_users_mistake():
    with pytest.raises(SystemExit) as ended:
        run_with(ZeroDivisionError("by zero"))
    assert str(ended.value.code).startswith(
        f"error: {entry.BUG}: ZeroDivisionError: by zero (debug=true shows"
    )
    with pytest.raises(ZeroDivisionError):
        run_with(ZeroDivisionError(), "debug=true")


def test_ctrl_c_is_no_traceback():
    with pytest.raises(SystemExit, match="stopped"):
        run_with(KeyboardInterrupt())


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_end_a_command_as_ctrl_c_does(tmp_path, capsys, name, code):
    number = getattr(signal, name)

    def work(_: list[str]) -> None:
        with atomic_folder(tmp_path / "new" / "folder") as folder, atomic_path(tmp_path / "file") as hidden:
            (folder / "half").write_text("a")
            hidden.write_text("half of it")
            os.kill(os.getpid(), number)
            time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        entry.run(work, [])
    assert ended.value.code == code
    assert capsys.readouterr().err == f"\nstopped by {name}; files that were written are whole\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_is_to_be_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        entry.run(lambda _: os.kill(os.getpid(), signal.SIGHUP), [])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_is_told_of_signals_before_its_parent_ends(tmp_path):
    """Else it would go on alone, with nobody to say what came of it."""
    sleeper = "import os, signal, time; os.kill(os.getppid(), signal.SIGHUP); time.sleep(60)"

    def work(_: list[str]) -> None:
        assert call([sys.executable, "-c", sleeper]) == -signal.SIGHUP

    entry.run(work, [])


def read(argument: str) -> object:
    """What Hydra and OmegaConf make of an argument."""
    value = OverridesParser.create().parse_override(entry.quoted(argument)).value()
    return OmegaConf.to_container(OmegaConf.create({"prompt": value}), resolve=True)["prompt"]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example("a red circle, a blue square")
@example("a {red} [circle] = (big) # $x ~ + : / % @ !")
@example('it\'s a "red" circle')
@example("'tis red")
@example("costs ${price}, or $5")
@example("back\\slash \\' and at the end \\")
@example("${oc.env:HOME}")
@example("\\${x} \\\\${y}")
@example("ein grüner Würfel — 赤い丸 🔴")
@example("1e3")
@example("true")
@example(" ")
@example("line\nbreak\\\n")
@example("$${x} \\ \\\\ ${x}\\")
def test_a_prompt_is_plain_text(text):
    whole = len(text) > 1 and text[0] + text[-1] in ("[]", "''", '""')
    if text not in ("null", "???") and not whole:
        assert read("prompt=" + text) == text
        assert read("+prompt=" + text) == text


def test_lists_quoted_and_empty_prompts_stay_hydras():
    assert read("prompt=[a red circle, 'b, c']") == ["a red circle", "b, c"]
    assert read("prompt='a, b'") == read('prompt="a, b"') == "a, b"
    assert read("prompt=null") is None
    assert entry.quoted("prompts=a, b") == "prompts=a, b"
    assert entry.quoted("sampler.prompt=a, b") == "sampler.prompt=a, b"


def test_settings_of_earlier_versions_are_understood(capsys):
    assert entry.escaped(["prime=cat.png", "+prime_rows=2", "n=2"]) == [
        "init_image=cat.png",
        "+init_rows=2",
        "n=2",
    ]
    assert capsys.readouterr().err.splitlines() == [
        "note: prime is called init_image now",
        "note: prime_rows is called init_rows now",
    ]


@pytest.mark.parametrize(("old", "new"), entry.RENAMED.items())
def test_a_name_that_was_replaced_has_a_successor(old, new):
    primary, choice = ("train", "model=dvae") if new.startswith("model.") else ("sample", "pipeline=dalle")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(primary, [choice])
    assert OmegaConf.select(config, old) is None
    inside, _, name = new.rpartition(".")
    assert name in (OmegaConf.select(config, inside) if inside else config)


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["experiment=shapes_laptop", "model=decoder"], ""),
        (["experiment=shapes_laptop", "model=vae"], "shapes_laptop_vae"),
        (["model=vae"], ""),
        (["experiment=mine", "model=clip"], ""),
        (["experiment=mine", "model=vae"], "mine_vae"),
    ],
)
def test_an_experiment_that_says_nothing_of_a_stage_is_known(tmp_path, words, missing):
    for name in ("mine", "stage/mine_clip"):
        path = tmp_path / "experiment" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# @package _global_\nseed: 1\n")
    (job,) = compose_jobs("train", [f"--config-dir={tmp_path}", *words])
    assert job.missing == missing
