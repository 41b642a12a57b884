"""Sweeps and comparisons through `dalle evaluate`, their jobs in this process; two ranks in two processes."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import files_below, untrained
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tiny import ROOT

from dalle.cli.compose import compose as compose_jobs
from dalle.cli.entry import one_line
from dalle.errors import UserError
from dalle.evaluation import multirun
from dalle.evaluation.multirun import typed
from dalle.evaluation.results import Result
from dalle.evaluation.run import evaluate
from dalle.launch.overrides import quote
from dalle.launch.processes import REASON, STOPPED

FAST = (
    "steps=2",
    "pipeline.prior_sampler.steps=2",
    "n=8",
    "precision=fp32",
    "trainer=cpu",
)
RANDOM = "features=random"  # asked for only where a metric looks at features


@pytest.fixture
def stages(untrained_stages, tmp_path) -> Path:
    """logs/ of its own, with CLIP, prior and decoder named `default`."""
    shutil.copytree(untrained_stages, tmp_path / "logs")
    return tmp_path / "logs"


@pytest.fixture
def jobs(monkeypatch) -> list[list[str]]:
    """The jobs that were started; each is done in this process."""
    started = []

    def call(command: list[str], lock: int | None = None, **environment: str) -> int:
        assert command[:4] == [sys.executable, "-m", "dalle", "evaluate"]
        started.append(command[4:])
        try:
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                config = OmegaConf.to_container(compose("evaluate", command[4:]), resolve=True)
            assert isinstance(config, dict)
            evaluate(config)
        except UserError as error:
            Path(environment[REASON]).write_text(one_line(error))
            return 1
        except KeyboardInterrupt:
            Path(environment[REASON]).write_text(STOPPED)
            return 1
        return 0

    monkeypatch.setattr(multirun, "call", call)
    return started


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "figures.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_leaves_one_table_and_one_report(command, stages, jobs, tmp_path):
    sweep = ("-m", "guidance=1,2", "metrics=[fid,clip_score,judge,speed]", *FAST, RANDOM)
    ended = command("evaluate.py", *sweep)
    assert ended.code == 0, ended
    assert len(jobs) == 2
    report = tmp_path / "logs" / "default" / "reports" / "001"
    made = {path.name for path in report.iterdir()}
    assert made == {"table.md", "figures.csv", "report.html"}
    assert [row["options.decoder.guidance"] for row in rows(report)] == ["1", "2"]
    assert len({row["protocol"] for row in rows(report)}) == 1
    assert "| guidance=2 |" in ended.out
    assert len(list((tmp_path / "logs" / "default" / "evaluations").iterdir())) == 2
    page = (report / "report.html").read_text()
    assert all(
        f"dalle evaluate {words}" in page for words in ("-m guidance=1,2 ", "guidance=1 ", "guidance=2 ")
    )

    again = command("evaluate.py", *sweep)  # started again: nothing is done twice
    assert again.out.count("this was evaluated before") == 2
    assert rows(report.parent / "002") == rows(report)


def test_priors_side_by_side(command, stages, jobs, tmp_path):
    """Alone, and by what the decoder draws after each."""
    both = "run='logs/default/prior','logs/default/ar_prior'"
    ended = command("evaluate.py", "-m", both, "n=8", "precision=fp32", "trainer=cpu")
    assert ended.code == 0, ended
    reports = tmp_path / "logs" / "default" / "reports"
    assert [row["kind"] for row in rows(reports / "001")] == ["prior", "ar_prior"]
    assert len({row["protocol"] for row in rows(reports / "001")}) == 1
    assert all(row["cosine_image"] and row["parameters"] for row in rows(reports / "001"))
    ended = command("evaluate.py", "-m", "prior=prior,ar_prior", "metrics=[judge]", *FAST)
    assert ended.code == 0, ended
    assert ", ar_prior)" in ended.out
    assert len(rows(reports / "002")) == 2


def test_a_job_that_fails_does_not_stop_the_others(command, stages, jobs, tmp_path):
    ended = command("evaluate.py", "-m", "steps=2,0,3", "metrics=[judge]", *FAST[1:])
    mistake = "steps must be a whole number from 1 to 100000 or null, got 0"
    assert re.search(rf"1 of 3 evaluations failed; the first: .*steps=0.*: {mistake}", ended.error)
    report = tmp_path / "logs" / "default" / "reports" / "001"
    assert len(rows(report)) == 2
    assert mistake in (report / "report.html").read_text()


def test_ctrl_c_stops_the_sweep(command, stages, jobs, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle.evaluation.evaluator.Evaluator.look_at_made", stopped)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning goes deaf once it has heard
    ended = command("evaluate.py", "-m", "guidance=1,2", "metrics=[judge]", *FAST)
    assert ended.err.strip().endswith("stopped")
    assert len(jobs) == 1
    assert not (tmp_path / "logs" / "default" / "reports").exists()
    assert list((tmp_path / "logs" / "default" / "evaluations").iterdir()) == []


def test_families_side_by_side_on_the_same_prompts(command, stages, jobs, tmp_path):
    for model in ("gan", "vae"):
        untrained(model, stages)
    shutil.copytree(stages / "default", stages / "default2")
    for k, name in enumerate(("default", "default2")):
        decoder = stages / name / "decoder"
        lines = "".join(f"{step},{1 / (step + 1)},{1 + k}\n" for step in range(30))
        (decoder / "metrics.csv").write_text(f"step,train/loss,train/grad_norm\n{lines}")
        for stage in ("clip", "prior", "decoder"):
            manifest = stages / name / stage / "manifest.json"
            facts = {**json.loads(manifest.read_text()), "seconds_training": 10.0 * (k + 1)}
            manifest.write_text(json.dumps(facts))
    of_unclip = ("steps=2", "pipeline.prior_sampler.steps=2", "prior=prior")  # the others know no such thing
    shared = ("n=8", "precision=fp32", "trainer=cpu", "features=random", *of_unclip)
    ended = command(
        "evaluate.py", f"compare=['{stages}/default*']", *shared, "metrics=[fid,judge,speed,clip_score]"
    )
    assert ended.code == 0, ended
    report = tmp_path / "logs" / "comparisons" / "001"
    families = {row["kind"]: row for row in rows(report)}
    assert list(families) == ["unclip", "dalle", "gan", "vae"]
    assert len({row["protocol"] for row in families.values()}) == 1
    assert "measured by another protocol" not in ended.out
    unclip = families["unclip"]
    assert (unclip["training/seconds.low"], unclip["training/seconds.high"]) == ("30.0", "60.0")
    for kind, row in families.items():
        assert f"| {kind} |" in ended.out
        assert all(row[name] for name in ("fid_random_biased", "judge/all", "clip_score", "parameters")), kind
    assert "vae reads no captions" in (report / "report.html").read_text()


def test_folders_whose_names_are_quoted(command, stages, tmp_path, monkeypatch):
    place, asked = tmp_path / "o'brien's runs, all", []
    stages.rename(place)
    monkeypatch.setattr(multirun, "run_all", lambda jobs: ([], asked.extend(jobs) or []))
    monkeypatch.setattr(multirun, "conclude", lambda *_: None)
    assert command("evaluate.py", f"compare=[{quote(str(place / 'default'))}]").code == 0
    for words in asked:
        (job,) = compose_jobs("evaluate", words)
        assert job.config["paths"]["logs"] == str(place)
        assert job.config["scorer"] == str(place / "default" / "clip")


def test_commands_as_they_were_typed():
    assert typed([["a=1", "b=[x]"], ["a=2", "b=[x]"]]) == [
        "dalle evaluate -m a=1,2 'b=[x]'", "dalle evaluate a=1 'b=[x]'", "dalle evaluate a=2 'b=[x]'",
    ]  # fmt: skip
    each = ["dalle evaluate a=1 b=1", "dalle evaluate a=2 b=2"]
    assert typed([["a=1", "b=1"], ["a=2", "b=2"]]) == each  # no grid of a and b
    assert typed([["a=1"], ["b=2"]]) == ["dalle evaluate a=1", "dalle evaluate b=2"]
    assert typed([["a=1"], ["a=2", "b=2"]]) == ["dalle evaluate a=1", "dalle evaluate a=2 b=2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[nowhere]", "compare: there is no folder nowhere"),
        ("[logs/none*]", r"compare: there is no folder logs/none\*"),
        ("5", "compare: there is no folder 5"),
        ("[logs]", "compare: logs holds no finished run of decoder, dalle"),
    ],
)
def test_nothing_to_compare(command, stages, jobs, given, message):
    assert re.search(message, command("evaluate.py", f"compare={given}").error)
    assert not jobs


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["pipeline=unclop"], "there is no pipeline=unclop; did you mean pipeline=unclip?"),
        (["metric=fid"], "there is no setting metric; did you mean metrics?"),
        (["-m", "compare=[a]", "seed=0,1"], "compare= measures several pipelines by itself; leave out -m"),
        (["metrics=[fit]"], "there is no metric 'fit'; there are fid"),
        (["guidance=1,2"], "several values are several jobs; say so with -m"),
        (["name=nobody"], "nobody/decoder holds no finished run"),
        (["data=folder"], "data.root is needed: give it as data.root=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(command, tmp_path, arguments, line):
    assert line in command("evaluate.py", *arguments).error
    assert files_below(tmp_path).keys() <= {"logs/.multirun/multirun.yaml"}


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(stages, tmp_path):
    """Nine pictures, which two ranks cannot share out equally."""
    metrics = "metrics=[fid,kid,precision_recall,clip_score,retrieval,judge,speed]"
    shared = [f"paths.logs='{stages}'", *FAST, RANDOM, "n=9", "batch_size=4", metrics, "save_pictures=true"]
    for trainer in ("cpu", "ddp_cpu"):
        places = [f"out='{tmp_path / trainer}'", f"paths.cache='{tmp_path / trainer / 'cache'}'"]
        job = subprocess.run(
            [sys.executable, str(ROOT / "evaluate.py"), *shared, *places, f"trainer={trainer}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
            timeout=300, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert job.returncode == 0, job.stderr
    one, two = (Result.read(tmp_path / trainer / "001") for trainer in ("cpu", "ddp_cpu"))
    of_speed = {"seconds_per_image", "images_per_second", "peak_memory_gb"}
    names = set(one.figures) - of_speed
    assert set(two.figures) == set(one.figures)
    for name in names:
        assert two.figures[name] == pytest.approx(one.figures[name], rel=1e-3, abs=1e-6), name
    assert one.protocol.pop("processes") == 1
    assert two.protocol.pop("processes") == 2
    assert two.protocol == one.protocol
    assert len(list((tmp_path / "ddp_cpu" / "001" / "pictures").glob("*.png"))) == 9
