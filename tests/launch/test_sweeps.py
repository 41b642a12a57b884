"""Sweeps that are killed, that fail in the middle, and are started again. Most jobs are small scripts."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import COMMON, NETS, ROOT, column

from dalle.cli import entry
from dalle.errors import UserError
from dalle.launch import processes
from dalle.launch.processes import safe_path
from dalle.launch.sweeps import Job, as_csv, perform, sweep
from dalle.run_dir import Run
from dalle.run_lock import only_one

FINISHES = """
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
run.mkdir(parents=True, exist_ok=True)
with (run / "log").open("a") as file:
    file.write(" ".join(["ran", *sys.argv[2:]]) + "\\n")
metrics = {"test/loss": 0.25, "test/r1": 0.5}
(run / "manifest.json").write_text(json.dumps({"schema": 1, "metrics": metrics}))
(run / "model.safetensors").write_text("")
"""
FAILS = """
from dalle.cli import entry
from dalle.errors import UserError
def main(_):
    raise {error}
entry.run(main, [])
"""


@pytest.fixture
def job(tmp_path):
    """Makes a job whose process runs `script` with its run directory as first argument."""

    def make(name: str, script: str = FINISHES, **options) -> Job:
        path = tmp_path / f"{name}.py"
        path.write_text(script)
        run = tmp_path / "logs" / "prior" / name
        return Job(run, [sys.executable, str(path), str(run)], [], **options)

    return make


def noted(job: Job) -> dict:
    return json.loads(job.notes.read_text())


def times(job: Job) -> int:
    log = job.run / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_job_that_fails_stops_no_other(job, tmp_path, capsys):
    wrong = FAILS.format(error="UserError('lr must be a number,\\n got fast')")
    jobs = [
        job("lr=1"),
        job("lr=fast", wrong),
        job("lr=2"),
        job("lr=3", FAILS.format(error="KeyError('embed')")),
    ]
    assert sweep(jobs, tmp_path / "logs", "test/loss") == 1
    assert [noted(j)["state"] for j in jobs] == ["finished", "failed", "finished", "failed"]
    assert noted(jobs[1])["reason"] == "lr must be a number, got fast"
    assert noted(jobs[3])["reason"] == "KeyError: 'embed'"
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["job", "state", "test/loss", "reason"]
    assert any(line.endswith("failed               lr must be a number, got fast") for line in shown)
    assert "resume=true tries it again" in shown[-1]


def test_started_again_it_does_only_what_is_left(job, tmp_path):
    wrong = FAILS.format(error="UserError('no')")
    jobs = [job("a"), job("b", wrong), job("c")]
    sweep(jobs[:2], tmp_path / "logs", "test/loss")
    assert sweep(jobs, tmp_path / "logs", "test/loss") == 1  # as long as one is marked
    assert [times(j) for j in jobs] == [1, 0, 1]
    assert noted(jobs[1])["reason"] == "no"
    jobs = [job("a", again=True), job("b", again=True), job("c", again=True)]  # b is right now
    assert sweep(jobs, tmp_path / "logs", "test/loss") == 0
    assert [times(j) for j in jobs] == [1, 1, 1]
    assert noted(jobs[1]) | {"seconds": 0, "overrides": 0} == {
        "state": "finished", "reason": "", "seconds": 0, "overrides": 0,
    }  # fmt: skip
    assert sweep([job("a", overwrite=True)], tmp_path / "logs", "test/loss") == 0
    assert times(jobs[0]) == 2


def test_what_was_begun_is_resumed(job):
    begun = job("a")
    begun.run.mkdir(parents=True)
    (begun.run / "last.ckpt").write_bytes(b"")
    begun.note("running")  # by a sweep that was killed
    assert perform(begun) == "finished"
    assert (begun.run / "log").read_text() == "ran resume=true\n"
    assert perform(job("b")) == "finished"
    assert (job("b").run / "log").read_text() == "ran\n"


def test_a_killed_job_says_how(job):
    killed = job("a", "import os; os.kill(os.getpid(), 9)")
    assert perform(killed) == "failed"
    assert noted(killed)["reason"] == "killed by SIGKILL, as when memory runs out"
    assert perform(job("b", "import sys; sys.exit(7)")) == "failed"
    assert noted(job("b"))["reason"] == "ended with code 7"


def test_ctrl_c_stops_the_sweep_and_marks_nothing_as_failed(job, tmp_path, capsys):
    jobs = [job("a", FAILS.format(error="KeyboardInterrupt")), job("b")]
    assert sweep(jobs, tmp_path / "logs", "test/loss") == 1
    assert noted(jobs[0])["state"] == "stopped"
    assert times(jobs[1]) == 0
    assert "resume=true" not in capsys.readouterr().out
    assert sweep([job("a"), job("b")], tmp_path / "logs", "test/loss") == 0


def test_a_job_that_outlives_its_sweep_is_waited_for(job, tmp_path, capsys):
    """Killed was only the sweep: the job still works in the run directory."""
    slow = (
        "import time, sys, pathlib; pathlib.Path(sys.argv[1]).mkdir(parents=True); time.sleep(3)" + FINISHES
    )
    orphan = job("a", slow)
    script = tmp_path / "sweep.py"
    script.write_text(
        "from pathlib import Path; from dalle.launch.sweeps import Job, perform\n"
        f"perform(Job(Path({str(orphan.run)!r}), {orphan.command}, []))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    while not orphan.run.exists():
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert noted(orphan)["state"] == "running"
    assert sweep([orphan], tmp_path / "logs", "test/loss") == 0
    assert "another process is at work there; waiting for it" in capsys.readouterr().out
    assert times(orphan) == 1
    assert noted(orphan)["state"] == "finished"


def test_other_ranks_of_a_job_on_slurm_wait_for_nobody(job, monkeypatch):
    """SLURM itself starts the ranks of a job: all but the first only join in."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    with only_one(job("a").run):
        assert perform(job("a")) == "finished"
        assert perform(job("b", "import sys; sys.exit(1)")) == "failed"
    assert times(job("a")) == 1
    assert not job("a").notes.exists()


def test_the_table_has_all_metrics_and_says_what_distinguishes(job, tmp_path, capsys):
    jobs = [job("lr=1"), job("lr=2"), job("bad", FAILS.format(error="UserError('no, or: \"never\"')"))]
    for number, each in enumerate(jobs):
        each.words.extend(["same=1", f"lr={number}"])
    sweep(jobs, tmp_path / "logs", "test/r1")
    with (tmp_path / "logs" / "sweep.csv").open(newline="") as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["prior/bad", "prior/lr=1", "prior/lr=2"]
    assert rows["prior/lr=1"]["test/loss"] == "0.25"
    assert rows["prior/bad"]["reason"] == 'no, or: "never"'
    assert rows["prior/lr=2"]["overrides"].endswith("same=1 lr=1")
    shown = capsys.readouterr().out
    assert "lr=1  finished  0.5" in shown
    assert "same=1" not in shown


def test_no_cell_of_the_table_is_a_formula(tmp_path):
    """Of a name, a setting or a reason that begins as one, if the table is opened as a spreadsheet."""
    texts = ["=HYPERLINK(1)", "+a", "-b", "@c", "\td", "\re", "plain", "'", "-1.5", "+1e-3", "-inf"]
    rows = [{"job": text, "state": "", "reason": text, "seconds": -1.5, "overrides": text} for text in texts]
    read = list(csv.DictReader(io.StringIO(as_csv(rows), newline="")))
    for key in ("job", "reason", "overrides"):
        assert [row[key] for row in read] == [f"'{text}" for text in texts[:6]] + texts[6:]
    assert {row["seconds"] for row in read} == {"-1.5"}


def test_a_way_to_launch_gets_only_what_is_left(job, tmp_path):
    jobs = [job("a"), job("b"), job("c")]
    sweep(jobs[:1], tmp_path / "logs", "test/loss")
    seen: list[Job] = []

    def launch(waiting: list[Job]) -> list[str]:
        seen.extend(waiting)
        return [perform(each) for each in waiting]

    assert sweep(jobs, tmp_path / "logs", "test/loss", launch) == 0
    assert seen == jobs[1:]
    assert sweep(jobs, tmp_path / "logs", "test/loss", launch) == 0
    assert len(seen) == 2


def test_names_of_many_settings_fit_a_file_system(tmp_path):
    names = {
        safe_path(f"{tmp_path}/prior/" + ",".join(f"model.net.some_setting_{i}={j}" for i in range(40)))
        for j in range(3)
    }
    assert len(names) == 3
    for name in names:
        with only_one(name):
            name.mkdir()
    assert safe_path("logs/default/prior/optimizer.lr=0.1") == Path("logs/default/prior/optimizer.lr=0.1")


def test_the_first_reason_counts(monkeypatch, tmp_path):
    """Of several ranks the one that failed first: the others fail because it is gone."""
    monkeypatch.setenv(processes.REASON, str(tmp_path / "reason"))
    for words in ("no data", "connection closed by peer"):
        with pytest.raises(SystemExit):
            entry.run(lambda _, words=words: (_ for _ in ()).throw(UserError(words)), [])
    assert (tmp_path / "reason").read_text() == "no data"


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, "ended too early"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    """The real train.py on two ranks: SIGKILL amid the second of three jobs, one of which cannot work."""
    command = [
        sys.executable, str(ROOT / "train.py"), "-m", "hydra=sweep", "model=clip", *COMMON, *NETS["clip"],
        "trainer=ddp_cpu", "batch_size=4", "trainer.max_steps=60", "callbacks.checkpoint.every=5",
        "paths.run='${paths.logs}/${name}/lr=${optimizer.lr}'", "optimizer.lr=1e-4,3e-4,fast",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    first, second, third = (
        Run(tmp_path / "logs" / "default" / f"lr={lr}") for lr in ("0.0001", "0.0003", "fast")
    )
    wait_for(second.checkpoint, started)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert first.finished
    assert not second.finished
    manifest = (first.path / "manifest.json").stat().st_mtime_ns
    speeds = column(second, "train/samples_per_second") if (second.path / "metrics.csv").exists() else {}

    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 1
    assert (first.path / "manifest.json").stat().st_mtime_ns == manifest
    assert second.manifest()["steps"] == 60
    resumed = column(second, "train/samples_per_second")
    assert min(resumed) > 0 or speeds.items() & resumed.items()
    assert "optimizer.lr=fast" in again.stdout
    assert "  optimizer.lr must be a number above 0 and at most 1000, got 'fast'" in again.stdout
    assert not third.occupied
