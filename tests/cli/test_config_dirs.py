"""A user's own configurations reach every process that is started: jobs, upstream stages, evaluations."""

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from tiny import COMMON, NETS

from dalle.cli import evaluate, train
from dalle.cli.compose import compose, conf_dir
from dalle.errors import UserError
from dalle.evaluation import multirun
from dalle.launch import processes, sweeps
from dalle.training import fit

MINE = {
    "model/net/mine.yaml": "# @package model.net\ndefaults: [small_unet]\nhead_dim: 8\n",
    "experiment/mine.yaml": "# @package _global_\nseed: 77\n",
    "sampler/mine.yaml": "defaults: [ddim]\nsteps: 3\n",
    "primary.yaml": "defaults: [train, _self_]\nseed: 78\n",
}
GIVEN = (
    ["--config-dir=mine"],
    ["--config-dir", "mine"],
    ["-cd", "mine"],
    ["hydra.searchpath=[mine]"],
    ["hydra.searchpath=[file://{here}/mine]"],
)


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch) -> Path:
    """A working directory with a user's own configurations in `mine`."""
    for name, text in MINE.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def children(monkeypatch, tmp_path) -> list[dict]:
    """The configurations that children compose; none is started."""
    composed: list[dict] = []

    def call(command: list[str], lock: int | None = None, **environment: str) -> int:
        assert command[:3] == processes.child_command("")[:3]
        if not any(word.startswith("hydra.searchpath=[mine") for word in command):
            (tmp_path / "elsewhere").mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / "elsewhere")
        state = Singleton.get_state()  # this process may be amid a launcher's run
        GlobalHydra.instance().clear()
        (job,) = compose(command[3], command[4:])
        Singleton.set_state(state)
        monkeypatch.chdir(tmp_path)
        composed.append(job.config)
        return 0

    for module in (train, sweeps, multirun):
        monkeypatch.setattr(module, "call", call)
    return composed


def here(words: list[str], folder: Path) -> list[str]:
    return [word.format(here=folder) for word in words]


@pytest.mark.parametrize("given", GIVEN, ids=" ".join)
def test_jobs(children, mine, given):
    train.main(["-m", "model=decoder", "model/net=mine", *here(given, mine), "data.size=64", "seed=0,1",
                "paths.run='logs/${seed}'", "upstream.clip=none", "preflight=true"])  # fmt: skip
    assert [(job["seed"], job["model"]["net"]["head_dim"]) for job in children] == [(0, 8), (1, 8)]


@pytest.mark.parametrize("given", [GIVEN[0], GIVEN[3]], ids=" ".join)
def test_upstream_stages(children, mine, given, monkeypatch):
    """They are put together twice: to be checked here, and by the child that trains them."""
    checked: list[dict] = []
    monkeypatch.setattr("dalle.training.ladder.check", lambda configs: checked.extend(configs) or [])
    monkeypatch.setattr(fit, "train", lambda config: None)
    train.main(["model=prior", *given, "experiment=mine"])
    assert [(config["stage"], config["seed"]) for config in checked] == [("clip", 77), ("prior", 77)]
    assert [(child["stage"], child["seed"]) for child in children] == [("clip", 77)]


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=basic"]], ids=" ".join)
@pytest.mark.parametrize("given", [GIVEN[0], GIVEN[3]], ids=" ".join)
def test_sweeps(children, given, launcher):
    words = ["-m", "hydra=sweep", *given, *launcher, "model=decoder", "model/net=mine", "seed=0,1"]
    with pytest.raises(SystemExit, match="0"):
        train.main(words)
    assert [(job["seed"], job["model"]["net"]["head_dim"]) for job in children] == [(0, 8), (1, 8)]


def test_searches(children, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr("dalle.launch.hparam_search.Search.tell", lambda *_: None)
    with pytest.raises(SystemExit):
        train.main(["hparams_search=optuna", GIVEN[0][0], "model=clip", "experiment=mine", "search.trials=1"])
    assert [child["seed"] for child in children] == [77]


def test_evaluations(children):
    with pytest.raises(UserError, match="1 of 1 evaluations failed"):  # as none was made
        evaluate.main(["-m", *GIVEN[0], "sampler=mine"])
    assert [child["sampler"]["steps"] for child in children] == [3]


def test_a_primary_configuration_of_ones_own(children):
    """Groups that are not there come from ours."""
    words = ["--config-path=mine", "--config-name", "primary", "model/net=mine"]
    train.main(["-m", *words, "model=decoder", "upstream.clip=none", "preflight=true"])
    assert [(child["seed"], child["model"]["net"]["head_dim"]) for child in children] == [(78, 8)]


def test_options_stand_anywhere():
    words = ["model=clip", "--config-dir", "mine", "experiment=mine", "-m", "data.size=64"]
    (job,) = compose("train", words)
    assert job.multirun
    assert job.words == [
        f"--config-dir={Path.cwd() / 'mine'}",
        "model=clip",
        "experiment=mine",
        "data.size=64",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--config-dir=nowhere"], "error: Additional config directory '.*/nowhere' not found"),
        (["--config-dir"], "error: argument --config-dir/-cd: expected one argument"),
        (["--config-path=nowhere"], "error: Primary config directory not found"),
        (["--config-dir=mine", "model=decoder", "model/net=mien"], "did you mean model/net=mine"),
    ],
)
def test_mistakes(command, words, line):
    import re

    assert re.search(line, command("train.py", *words).error)


def test_a_network_of_ones_own_trains(mine):
    (job,) = compose("train", ["--config-dir=mine", "model=vae", "experiment=mine", *COMMON, *NETS["vae"],
                               "trainer.max_steps=2"])  # fmt: skip
    assert fit.train(job.config).keys() >= {"test/loss"}


def test_where_the_configurations_are():
    assert (conf_dir() / "model" / "prior.yaml").is_file()
