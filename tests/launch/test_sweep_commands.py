"""What `dalle train` does with `-m`: which jobs it starts, in which directories. Nothing is trained here."""

import csv
import os
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf.errors import OmegaConfBaseException
from tiny import COMMON, ROOT

from dalle.cli import compose, train
from dalle.errors import UserError
from dalle.launch import sweeps
from dalle.launch.sweeps import Job, perform


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Runs `dalle train` with a command line and gives the jobs' overrides instead of starting them."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[list[str]]:
        started: list[list[str]] = []

        def sweep(jobs: list[compose.Job], launcher: list[str]) -> int:
            started.extend([*job.words, *launcher] for job in jobs)
            return 0

        monkeypatch.setattr(train, "run_job", started.append)
        monkeypatch.setattr(train, "sweep", sweep)
        if {"-m", "hydra=sweep"} <= set(arguments):
            with pytest.raises(SystemExit, match="0"):
                train.main([*arguments])
        else:
            train.main([*arguments])
        return started

    return run


def directories(jobs: list[list[str]]) -> list[str]:
    return [job[-1].split("=", 1)[1].strip("'") for job in jobs]


def test_stages_in_order(jobs):
    started = jobs("-m", "model=clip,prior,decoder", "name=mine")
    assert [job[0] for job in started] == ["model=clip", "model=prior", "model=decoder"]
    assert directories(started) == ["logs/mine/clip", "logs/mine/prior", "logs/mine/decoder"]
    assert all("name=mine" in job for job in started)


def test_a_sweep_gives_every_job_its_own_directory(jobs):
    started = jobs("-m", "hydra=sweep", "model=prior", "optimizer.lr=1e-4,3e-4", "seed=0,1")
    assert len(started) == 4
    assert len(set(directories(started))) == 4
    assert directories(started)[1] == "logs/default/prior/optimizer.lr=0.0001,seed=1"
    assert started[1][1:4] == ["model=prior", "optimizer.lr=0.0001", "seed=1"]


def test_jobs_of_a_sweep_are_told_apart_by_what_differs(jobs):
    started = jobs(
        "-m",
        "hydra=sweep",
        "model=prior",
        "name=lr",
        "data=shapes",
        "precision=fp32",
        "optimizer.lr=1e-4,3e-4",
    )
    assert directories(started) == ["logs/lr/prior/optimizer.lr=0.0001", "logs/lr/prior/optimizer.lr=0.0003"]


@pytest.mark.parametrize(
    ("choice", "places"),
    [
        ("precision=fp32,bf16", ["default/prior/precision=fp32", "default/prior/precision=bf16"]),
        ("trainer=cpu,ddp_cpu", ["default/prior/trainer=cpu", "default/prior/trainer=ddp_cpu"]),
        (
            "data=shapes,folder ++data.root=own",
            ["default/prior/++data.root=own,data=shapes", "default/prior/++data.root=own,data=folder"],
        ),
        ("name=one,two", ["one/prior", "two/prior"]),
        ("experiment=none,shapes_laptop", ["default/prior", "shapes_laptop/prior"]),
        ("model=prior,clip", ["default/prior", "default/clip"]),
    ],
)
def test_whatever_is_swept_over_every_job_has_a_directory_and_a_row(monkeypatch, tmp_path, choice, places):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "perform", lambda job: job.note("finished"))
    words = [*([] if "model" in choice else ["model=prior"]), *choice.split()]
    with pytest.raises(SystemExit, match="0"):
        train.main(["-m", "hydra=sweep", *words])
    folder = Path("logs", places[0].split("/")[0])
    with (folder / "sweep.csv").open(newline="") as file:
        rows = {os.path.normpath(folder / row["job"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(f"logs/{place}" for place in places)
    assert {row["state"] for row in rows.values()} == {"finished"}


@pytest.mark.parametrize("words", [["precision=fp32,bf16"], ["hydra=sweep", "precision=fp32,fp32"]])
def test_two_jobs_of_one_directory_are_refused(jobs, words):
    with pytest.raises(UserError, match="2 jobs would train in logs/default/prior"):
        jobs("-m", "model=prior", *words)


def test_nothing_lands_in_a_run_directory_or_beside_the_project(jobs, tmp_path):
    jobs("-m", "model=clip,prior", "paths.logs=here")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "here", "here/.multirun", "here/.multirun/multirun.yaml",
    ]  # fmt: skip


def test_one_mistake_and_no_job_starts(jobs):
    with pytest.raises(OmegaConfBaseException, match="nonsense"):
        jobs("-m", "model=clip,prior", "optimizer.lr=${nonsense}")


@pytest.mark.parametrize("words", [["-m", "model=clip,prior,odd"], ["model=odd"]])
def test_a_network_that_cannot_be_is_refused_before_what_it_needs_is_trained(jobs, tmp_path, words):
    """Which sides a decoder's feature maps have is known once the pictures are; its CLIP is still to come."""
    (tmp_path / "own" / "model").mkdir(parents=True)
    odd = "defaults: [decoder]\nnet: {attention: [7]}\n"
    (tmp_path / "own" / "model" / "odd.yaml").write_text(odd)
    with pytest.raises(UserError, match=r"attention names feature maps of side \[7\]; there are \["):
        jobs(f"--config-dir={tmp_path / 'own'}", *words, *COMMON)
    assert not (tmp_path / "logs" / "default").exists()


def test_the_overrides_of_a_job_are_those_it_was_given(jobs):
    """They go to another process as they are: quoted values must survive."""
    (job,) = jobs("-m", "model=clip", "paths.logs='some where'", "+upstream.note='a, b'")
    assert "paths.logs='some where'" in job
    assert job[-1] == "paths.run='some where/default/clip'"
    assert Path(directories([job])[0]) == Path("some where/default/clip")


def test_a_launcher_is_for_sweeps_alone(jobs):
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    for job in jobs("-m", "hydra=sweep", "model=clip", "seed=0,1", *words):
        assert job[-2:] == words
    with pytest.raises(UserError, match="hydra/launcher is for -m hydra=sweep"):
        jobs("-m", "model=clip,prior", *words)


MEETS = """
import pathlib, sys, time
mine, other = sys.argv[-1].split("=")[1].strip("'"), sys.argv[-2].split("=")[1]
pathlib.Path(mine).mkdir(parents=True)
for _ in range(600):
    if pathlib.Path(other).exists():
        sys.exit()
    time.sleep(0.1)
sys.exit("the other has not come")
"""


SLURM = {  # as much of it as submitit sees: an array of tasks, started at once; no result and ended is failed
    "sbatch": """
for i in $(seq 0 $(grep -oE 'array=0-[0-9]+' "${@: -1}" | grep -oE '[0-9]+$')); do
  { SLURM_JOB_ID=$((9 + i)) SLURM_ARRAY_JOB_ID=9 SLURM_ARRAY_TASK_ID=$i bash "${@: -1}"
    echo "9_$i|FAILED|here" >>"$0.ended"; } >/dev/null 2>&1 </dev/null &
done
echo Submitted batch job 9""",
    "srun": """
while [[ $1 == -* ]]; do [[ $1 == *=* || $1 == --unbuffered ]] || shift; shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=here "$@" """,
    "sacct": "echo 'JobID|State|NodeList'; cat $(dirname $0)/sbatch.ended 2>/dev/null",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_a_launcher_does_jobs_side_by_side(launcher, monkeypatch, tmp_path):
    """Each job ends well only when it meets the other. SLURM is played by three scripts."""
    for name, script in SLURM.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    pytest.importorskip(launcher.split("_")[0])
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    (tmp_path / "meets.py").write_text(MEETS)
    command = [sys.executable, str(tmp_path / "meets.py")]
    two = [
        Job(
            tmp_path / mine,
            command,
            ["model=clip", f"name={tmp_path / other}", f"paths.run='{tmp_path / mine}'"],
        )
        for mine, other in ("ab", "ba")
    ]
    words = [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    states = compose.launch("train", [job.words for job in two], words, lambda k: perform(two[k]))
    assert states == ["finished", "finished"]


def test_wandbs_own_sweeps(jobs, monkeypatch):
    """What an agent of docs/wandb_sweep.yaml calls, put together as W&B does it, is a training that works."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    lr = sweep["parameters"]["optimizer.lr"]
    assert isinstance(lr["min"], float)
    assert isinstance(lr["max"], float)  # 1e-4 would be a word to W&B
    given = {"optimizer.lr": {"value": lr["min"]}, "optimizer.warmup": {"value": 50}}
    words = utils.create_sweep_command_args({"args": given})["args_no_hyphens"]
    command = [w for w in sweep["command"] if not w.startswith("${")] + words
    assert sweep["command"][-1] == "${args_no_hyphens}"
    started: list[dict] = []
    monkeypatch.setattr("dalle.training.fit.may_start", lambda config: started.append(config))
    jobs(*command)
    (config,) = started
    assert config["paths"]["run"] == "logs/wandb_sweep/prior/optimizer.lr=0.0001,optimizer.warmup=50"
    assert config["logger"]["wandb"]["project"] == sweep["project"]
    assert sweep["program"] == "train.py"
