"""What tests of the command line share: entry points in this process, and tiny stages that never trained."""

import json
import os
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from tiny import ROOT, configure

from dalle.cli import import_weights
from dalle.cli.command import run as run_command
from dalle.errors import UserError
from dalle.instantiate import instantiate
from dalle.run_dir import Run
from dalle.training import fit
from dalle.training.fit import prepare


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr of a command that failed as it should."""
        assert self.code == 1, self
        assert "Traceback" not in self.err
        line, nothing = self.err.split("\n")
        assert line.startswith("error: "), self.err
        assert not nothing
        return line


@pytest.fixture
def command(monkeypatch, tmp_path, capfd) -> Callable[..., Ended]:
    """`command("train.py", "model=prior")` in an empty folder, as from a shell but without a new process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(script: str, *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)  # as the interpreter does
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture
def no_training(monkeypatch):
    """Nothing may begin to train, in this process or another: what is wrong must be found before."""

    def refuse(*args, **kwargs):
        raise AssertionError("training has begun")

    monkeypatch.setattr(lightning.Trainer, "fit", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)


def untrained(model: str, logs: Path, *more: str, seed: int = 0) -> Run:
    """A finished run of a tiny stage with random weights: all that training leaves behind, in a moment."""
    config = configure(model, logs, *more)
    run = Run(Path(config["paths"]["run"]))
    datamodule, _ = prepare(config, run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stage = instantiate(config["model"], "model")
        for p in stage.net.parameters():  # heads are zero at birth: nothing would depend on anything
            p.data += torch.randn_like(p) * 0.2
    if "clip" in config["datamodule"]:
        datamodule.prepare_data()  # measures what embeddings are normalised with
    run.path.mkdir(parents=True)
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    if "tokenizer" in config["datamodule"]:
        run.tokenizer.write_text(json.dumps(datamodule.tokenizer.to_dict()))
    run.save(stage.net.state_dict(), {"stage": config["stage"], **datamodule.describe(), "metrics": {}})
    return run


@pytest.fixture(scope="session")
def untrained_stages(tmp_path_factory) -> Path:
    """logs/ with a run of each stage that others need or pipelines use, named `default`.

    Read only: copy what you change.
    """
    logs = tmp_path_factory.mktemp("untrained") / "logs"
    for model in ("clip", "prior", "ar_prior", "decoder", "dvae", "dalle"):
        untrained(model, logs)
    return logs


def files_below(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, to see that nothing has changed."""
    return {
        os.path.relpath(path, folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def shell(command, monkeypatch):
    """Runs a command line with all its jobs in this process, and no training longer than two steps."""
    make_trainer = fit.make_trainer

    def short(config, run):
        return make_trainer({**config, "trainer": {**config["trainer"], "max_steps": 2}}, run)

    def call(arguments, lock=None):
        _, dash, package, name, *words = arguments
        assert (dash, package) == ("-m", "dalle")
        GlobalHydra.instance().clear()
        try:
            run_command(name, words)
        except SystemExit as ended:
            raise AssertionError(arguments) from ended
        return 0

    monkeypatch.setattr(fit, "make_trainer", short)
    monkeypatch.setattr("dalle.launch.processes.call", call)

    def run(line: str):
        script, *arguments = shlex.split(line)
        ended = command(script, *arguments)
        assert ended.code == 0, (line, ended.err)
        return ended

    return run


@pytest.fixture
def imported(tmp_path) -> Callable[..., Run]:
    """``imported("clip", PATH, "activation=gelu")`` -> the run of `dalle import`."""

    def run(kind: str, place: Path, *settings: str, name: str = "mine") -> Run:
        import_weights.main([kind, str(place), f"name={name}", f"paths.logs={tmp_path / 'logs'}", *settings])
        return Run(tmp_path / "logs" / name / kind)

    return run


@pytest.fixture
def refused(imported) -> Callable[..., str]:
    """The line in which an import that cannot be done ends."""

    def run(kind: str, place: Path, *settings: str, name: str = "mine") -> str:
        with pytest.raises(UserError) as refusal:
            imported(kind, place, *settings, name=name)
        line = str(refusal.value)
        assert "\n" not in line
        return line

    return run
