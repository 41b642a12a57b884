"""A search with Optuna whose trials are small scripts: what it proposes, and how it goes on when killed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dalle.cli import train
from dalle.errors import UserError
from dalle.launch.hparam_search import Search

optuna = pytest.importorskip("optuna")

TRIAL = """
import json, math, pathlib, sys
given = dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:])
run = pathlib.Path(given["paths.run"].strip("'"))
run.mkdir(parents=True, exist_ok=True)
(run / "given.json").write_text(json.dumps(given))
lr, depth = float(given["optimizer.lr"]), int(given["model.net.depth"])
loss = (math.log10(lr) + 3) ** 2 + {loss}
metrics = {{"test/loss": loss if math.isfinite(loss) else None}}
(run / "manifest.json").write_text(json.dumps({{"schema": 1, "metrics": metrics}}))
(run / "model.safetensors").write_text("")
"""
SPACE = {
    "optimizer.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "model.net.depth": {"low": 1, "high": 4},
    "batch_size": [32, 64],
    "compile": [True, False],
}


@pytest.fixture
def search(tmp_path):
    """Runs a search in tmp_path/logs and gives its exit code and its study."""

    def run(
        trials: int, loss: str = "depth", overwrite: bool = False, words=(), **options: Any
    ) -> tuple[int, Any]:
        script = tmp_path / "trial.py"
        script.write_text(TRIAL.format(loss=loss))
        settings = {"metric": "test/loss", "direction": "minimize", "space": SPACE, "seed": 0, **options}
        made = Search(str(tmp_path / "logs"), trials=trials, **settings)
        code = made.run(tmp_path / "logs" / "prior", [sys.executable, str(script)], list(words), overwrite)
        return code, made.study(str(tmp_path / "logs" / "prior"), overwrite=False)

    return run


def study_of(tmp_path: Path) -> Any:
    return Search(str(tmp_path / "logs"), "test/loss", "minimize", 1, 0, SPACE).study(
        str(tmp_path / "logs" / "prior"), overwrite=False
    )


def given(tmp_path: Path, number: int) -> dict[str, str]:
    return json.loads((tmp_path / "logs" / "prior" / f"trial-{number:03d}" / "given.json").read_text())


def test_it_proposes_within_the_space_and_says_what_was_best(search, tmp_path, capsys):
    code, study = search(8)
    assert code == 0
    values = [trial.value for trial in study.trials]
    for number in range(8):
        words = given(tmp_path, number)
        assert 1e-5 <= float(words["optimizer.lr"]) <= 1e-1
        assert 1 <= int(words["model.net.depth"]) <= 4
        assert words["batch_size"] in ("32", "64")
        assert words["compile"] in ("true", "false")
        assert words["paths.run"] == f"'{tmp_path}/logs/prior/trial-{number:03d}'"
    assert len({given(tmp_path, number)["optimizer.lr"] for number in range(8)}) == 8
    best = values.index(min(values))
    shown = capsys.readouterr().out
    assert f"best: test/loss {min(values):.4g} in {tmp_path}/logs/prior/trial-{best:03d}\n" in shown
    assert (tmp_path / "logs" / "sweep.csv").read_text().count("finished") == 8


def test_it_goes_on_where_it_was(search, tmp_path):
    """Killed amid the third trial: that one is done with the settings it had, then new ones are proposed."""
    search(2)
    study = search(2)[1]
    third = study.ask(Search("x", "m", "minimize", 1, 0, SPACE).space)  # as when it was killed right here
    first = {number: given(tmp_path, number) for number in range(2)}
    code, study = search(5)
    assert code == 0
    assert {number: given(tmp_path, number) for number in range(2)} == first
    assert float(given(tmp_path, 2)["optimizer.lr"]) == third.params["optimizer.lr"]
    rates = {given(tmp_path, number)["optimizer.lr"] for number in range(5)}
    assert len(rates) == len(study.trials) == 5
    assert len(search(5)[1].trials) == 5


def test_a_trial_that_fails_stops_no_other(search, tmp_path, capsys):
    code, study = search(6, loss="(depth if depth < 3 else 1 / 0)", seed=1)
    states = [trial.state.name for trial in study.trials]
    assert set(states) == {"COMPLETE", "FAIL"}
    assert code == 0
    shown = capsys.readouterr().out
    assert shown.count("ended with code 1") == states.count("FAIL")
    code, study = search(1, loss="math.nan", overwrite=True)
    assert (code, [trial.state.name for trial in study.trials]) == (1, ["FAIL"])
    assert "test/loss is no number" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"metric": "test/los"}, "there is no search.metric=test/los; there are test/loss"),
        ({"space": {}}, "search.space is empty"),
        ({"space": {"optimizer.lr": 3}}, "search.space.optimizer.lr=3 is neither a list nor low and high"),
        ({"space": {"optimizer.lr": {"low": 2, "high": 1}}}, "neither a list nor low and high"),
        ({"space": {"optimizer.lr": {"low": 1, "high": 2, "lag": True}}}, "neither a list nor low and high"),
    ],
)
def test_mistakes(search, options, line):
    with pytest.raises(UserError, match=line):
        search(1, **options)


def test_another_space_is_another_search(search):
    search(1)
    with pytest.raises(UserError, match=r"search.space has changed since .*study.db was begun"):
        search(2, space={**SPACE, "batch_size": [16]})


@pytest.mark.parametrize("other", [{"direction": "maximize"}, {"metric": "test/other"}])
def test_another_goal_is_another_search(search, other):
    search(1)
    with pytest.raises(UserError, match=r"study.db was begun to minimize test/loss, not to "):
        search(2, **other)


def test_a_trial_hears_nothing_of_the_search(search, tmp_path):
    search(
        1,
        words=(
            "hparams_search=optuna",
            "search.trials=3",
            "++search.space={a:[1]}",
            "paths.run='x'",
            "seed=4",
        ),
    )
    assert given(tmp_path, 0).keys() == {*SPACE, "seed", "paths.run"}
    assert given(tmp_path, 0)["paths.run"] == f"'{tmp_path}/logs/prior/trial-000'"


def test_train_hands_over(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(Search, "run", lambda self, *given: started.append((self, *given)) or 0)
    words = ["model=prior", "hparams_search=optuna", "search.trials=3", "search.metric=test/cosine_image"]
    with pytest.raises(SystemExit, match="0"):
        train.main(["-m", *words, "seed=4"])
    ((made, run, command, given, overwrite),) = started
    assert (made.trials, made.metric, made.seed) == (3, "test/cosine_image", 4)
    assert run == Path("logs/default/prior")
    assert command == [sys.executable, "-m", "dalle", "train"]
    assert given == [*words, "seed=4", "paths.run='logs/default/prior'"]
    assert overwrite is False


@pytest.mark.parametrize(
    ("pragma", "reason"),
    [("query_only=ON", "attempt to write a readonly database"), ("max_page_count=1", "disk is full")],
)
def test_a_disk_that_takes_no_more_is_one_line_and_loses_no_trial(search, tmp_path, pragma, reason):
    """SQLite itself refuses, once with the study as it is and once with the first trial done."""
    from sqlalchemy import Engine, event

    search(1)
    before = given(tmp_path, 0)

    def refuse(connection: Any, _: Any) -> None:
        connection.execute(f"PRAGMA {pragma}")

    event.listen(Engine, "connect", refuse)
    try:
        with pytest.raises(UserError, match=rf"study\.db cannot be read or written \(.*{reason}\)"):
            search(40)
    finally:
        event.remove(Engine, "connect", refuse)
    told = [trial.number for trial in study_of(tmp_path).trials if trial.state.name != "RUNNING"]
    wanted = len(told) + 2
    code, study = search(wanted)
    assert code == 0
    assert [trial.state.name for trial in study.trials].count("COMPLETE") == wanted
    assert given(tmp_path, 0) == before


def test_a_trial_that_was_done_when_the_disk_was_full_is_not_done_again(search, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise optuna.exceptions.StorageInternalError("told") from OperationalError("tell", {}, cause)

    from sqlalchemy.exc import OperationalError

    cause = Exception("database or disk is full")
    monkeypatch.setattr(Search, "tell", full)
    with pytest.raises(UserError, match=r"database or disk is full\); its runs are kept"):
        search(2)
    monkeypatch.undo()
    done = (tmp_path / "logs" / "prior" / "trial-000" / "given.json").stat().st_mtime_ns
    assert len(search(2)[1].trials) == 2
    assert (tmp_path / "logs" / "prior" / "trial-000" / "given.json").stat().st_mtime_ns == done


def test_a_study_that_is_no_database_is_one_line(search, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "study.db").write_bytes(b"no database, but long enough to be read as one" * 40)
    with pytest.raises(UserError, match=r"study\.db cannot be read or written \(file is not a database\)"):
        search(1)
