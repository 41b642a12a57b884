"""Trains one stage: `dalle train model=prior data=folder data.root=PICTURES`; several: `-m model=clip,prior`.

Hydra only puts the configuration together, from conf/train.yaml and the command line, and all of it before
any work starts; what happens then is dalle.training.fit, and dalle.launch.sweeps for the jobs of
`-m hydra=sweep`.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any, TypedDict

from dalle.cli.compose import Job, compose, conf_dir, launch
from dalle.errors import UserError
from dalle.files import check_writable
from dalle.launch.overrides import quote
from dalle.launch.processes import call, child_command, safe_path
from dalle.machine import is_main_process, started_by_others
from dalle.ranges import Text, check_value, check_values
from dalle.run_lock import only_one

# What is about one stage alone; everything else also holds for those that have to be trained before it.
OWN = ("model", "optimizer", "sampler", "callbacks", "datamodule", "batch_size", "at_most", "stage", "debug",
       "resume", "overwrite", "paths.run", "hydra")  # fmt: skip
SEARCHPATH = "hydra.searchpath="  # where configurations are: of all


TYPED = "DALLE_COMMAND"  # the variable by which the processes of a command know what was typed


class Sweep(TypedDict):
    """conf/hydra/sweep.yaml: where the table is left, and the metric that is shown."""

    folder: Text
    metric: Text


def main(arguments: list[str]) -> None:
    first = TYPED not in os.environ
    os.environ.setdefault(TYPED, typed(arguments))
    try:
        start(arguments)
    finally:
        if first:
            del os.environ[TYPED]


def typed(arguments: list[str]) -> str:
    """The command line of this process, for a shell."""
    script = Path(sys.argv[0]).name == "train.py"
    return shlex.join([*(("python", sys.argv[0]) if script else ("dalle", "train")), *arguments])


def start(arguments: list[str]) -> None:
    launcher = [a for a in arguments if a.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))]
    jobs = compose("train", [a for a in arguments if a not in launcher])  # all of them here: see `sweep`
    if not jobs:
        return
    several = jobs[0].multirun
    special = {"sweep", "search"} & jobs[0].config.keys() if jobs[0].config["preflight"] is False else set()
    if launcher and special != {"sweep"}:
        raise UserError("hydra/launcher is for -m hydra=sweep: other jobs build upon one another")
    if several:
        give_places(jobs)
    if "search" in special:
        sys.exit(max(search(job) for job in jobs))
    if "sweep" in special and several:
        sys.exit(sweep(jobs, launcher))
    if several:
        from dalle.training.checks import check_config

        for job in jobs:
            check_config(job.config)
        check(jobs)
    for number, job in enumerate(jobs, 1):
        if several:
            print(f"[{number}/{len(jobs)}] {job.config['stage']}: {job.config['paths']['run']}", flush=True)
            run_job(job.words)
        else:
            train(job)


def give_places(jobs: list[Job]) -> None:
    """A directory for each job, named by its command line; jobs of one are told apart by their settings.

    Raises:
        UserError: the settings are the same, too; or only hydra=sweep may make directories.
    """
    for run in {str(job.config["paths"]["run"]) for job in jobs}:
        same = [job for job in jobs if str(job.config["paths"]["run"]) == run]
        for job in same:
            config = job.config
            own = [word for word in job.words if not all(word in other.words for other in same)]
            if len(same) > 1 and not config.get("preflight") and (not own or "sweep" not in config):
                raise UserError(
                    f"{len(same)} jobs would train in {run}; hydra=sweep gives every job its own directory, "
                    "by the settings in which they differ"
                )
            usual = run.rstrip("/") == str(Path(config["paths"]["logs"], config["name"], config["stage"]))
            words = ",".join(word.replace("/", "_") for word in own)
            place = f"{run.rstrip('/')}{'/' if usual else ','}{words}" if own else run
            config["paths"]["run"] = str(safe_path(place))
            job.words.append(f"paths.run={quote(config['paths']['run'])}")


def train(job: Job) -> None:
    from dalle.training import fit  # torch and lightning: only once there is something to train

    if not fit.may_start(job.config):
        return
    if job.missing and is_main_process():
        print(
            f"note: there is no experiment/stage/{job.missing}: the experiment says nothing of this stage, "
            "which has the model's own length and batch",
            flush=True,
        )
    missing = fit.missing_runs(job.config) if is_main_process() or started_by_others() else {}
    if missing and started_by_others():
        raise UserError(
            f"{', '.join(map(str, missing.values()))} must be trained first, by a command of its own: all "
            "processes that torchrun or srun has started are for this run"
        )
    if missing:
        check([job])
    for stage, run in missing.items():
        with only_one(run.path) as lock:  # several jobs of a sweep may miss the same
            if run.finished:
                continue
            print(f"{run} holds no finished {stage}: training it first", flush=True)
            run_job(upstream(job.words, stage, run), lock)
    job.config["command"] = os.environ[TYPED]
    try:
        fit.train(job.config)
    except SystemExit as left:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from left


def upstream(words: list[str], stage: str, run: Any) -> list[str]:
    """The command line that trains what a job needs first."""
    shared = [w for w in words if w.startswith(SEARCHPATH) or not w.lstrip("+~").startswith(OWN)]
    place, resume = quote(str(run)), str(run.occupied).lower()
    return [*shared, f"model={model_for(stage, words)}", f"paths.run={place}", f"resume={resume}"]


def model_for(stage: str, words: list[str]) -> str:
    """The model to train for a stage that is missing: of a paper's size where it is for a paper's."""
    asked = [word.partition("=")[2] for word in words if word.startswith("model=")]
    paper = conf_dir() / "model" / f"{stage}_paper.yaml"
    return paper.stem if asked and asked[-1].endswith(("_paper", "_1b")) and paper.exists() else stage


def check(jobs: list[Job]) -> None:
    """Refuses, before any of the jobs starts, what would stop one of them or of those they need first."""
    from dalle.training import fit, ladder

    configs: list[dict] = []
    for job in jobs:
        if job.config["preflight"]:  # trains nothing that others could need
            continue
        coming = [Path(config["paths"]["run"]) for config in configs]
        for stage, run in fit.missing_runs(job.config, coming).items():
            configs += [first.config for first in compose("train", upstream(job.words, stage, run))]
        configs.append(job.config)
    built = ladder.check(configs)
    if len(configs) > 1 and is_main_process() and (line := ladder.how_long(built)):
        print(line, flush=True)


def run_job(words: list[str], lock: int | None = None) -> None:
    if code := call([*child_command("train"), *words], lock):
        sys.exit(code)


def sweep(jobs: list[Job], launcher: list[str]) -> int:
    """Has the jobs done, here or by one of Hydra's launchers.

    Hydra itself would have them put together over there, too: nobody would know which are finished already,
    or what came of them.
    """
    from dalle.launch import sweeps

    about = jobs[0].config["sweep"]
    check_value(about, dict, "sweep")
    for key in sorted(Sweep.__required_keys__ - about.keys()):
        raise UserError(f"sweep.{key} is needed: do not take it away")
    check_values(about, Sweep, "sweep.")
    check_writable(Path(about["folder"]), "sweep.folder")

    def elsewhere(waiting: list[sweeps.Job]) -> list[str]:
        words = [job.words for job in waiting]
        return launch("train", words, launcher, lambda number: sweeps.perform(waiting[number]))

    made = [
        sweeps.Job(
            safe_path(job.config["paths"]["run"]),
            child_command("train"),
            job.words,
            again=job.config["resume"],
            overwrite=job.config["overwrite"],
        )
        for job in jobs
    ]
    return sweeps.sweep(made, Path(about["folder"]), about["metric"], elsewhere if launcher else None)


def search(job: Job) -> int:
    from dalle.instantiate import instantiate

    if job.config["search"] is None:
        raise UserError("search=null: give what is to be searched, or leave out hparams_search")
    made = instantiate(job.config["search"], "search")
    return made.run(
        Path(job.config["paths"]["run"]), child_command("train"), job.words, job.config["overwrite"]
    )
