"""Evaluations one after another, each in a process of its own, and what is made of them together.

A process of its own gives each its own peak memory, and nothing that DDP leaves behind. What is done stays
done: started again, finished evaluations are found and not repeated.
"""

import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dalle.errors import UserError
from dalle.evaluation.report import as_text, write_report
from dalle.evaluation.results import FILE, Result
from dalle.evaluation.run import evaluate
from dalle.evaluation.stability import stability
from dalle.evaluation.targets import MAIN
from dalle.launch.overrides import quote
from dalle.launch.processes import REASON, STOPPED, call, child_command
from dalle.pipelines.request import REQUESTS, SamplingConfig
from dalle.pipelines.sampling import new_folder
from dalle.run_dir import Run


def one(config: dict[str, Any]) -> None:
    """Evaluates and shows the figures."""
    if folder := evaluate(config):
        print(as_text(Result.read(folder)))
        print(f"\nprotocol and figures: {folder / FILE}")


def sweep(configs: Sequence[dict[str, Any]], overrides: Sequence[list[str]]) -> None:
    """All jobs of `-m`, then a table and a report of them."""
    if configs[0]["compare"]:
        raise UserError("compare= measures several pipelines by itself; leave out -m")
    results, failed = run_all(overrides)
    home = Path(configs[0]["paths"]["logs"], configs[0]["name"], "reports")
    conclude(results, failed, home, typed(overrides))


def compare(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """All pipelines in the folders of `compare`, measured alike, in one table with what their training was
    like.
    """
    families = [pair for entry in entries(config["compare"]) for pair in families_of(entry)]
    shared = [
        word for word in overrides if not word.startswith(("compare=", "pipeline=", "name=", "paths.logs="))
    ]
    if not config["scorer"]:  # one CLIP for all: the first there is
        clips = [folders[0] / "clip" for _, folders in families if Run(folders[0] / "clip").finished]
        shared += [f"scorer={quote(str(clips[0]))}"] if clips else []
    shared += [f"paths.cache={quote(config['paths']['cache'])}"]
    chosen = config["pipeline"]["kind"]
    jobs = [
        [
            *(word for word in shared if kind == chosen or not is_of(chosen, word)),
            f"pipeline={kind}",
            f"name={quote(folders[0].name)}",
            f"paths.logs={quote(str(folders[0].parent))}",
        ]
        for kind, folders in families
    ]
    results, failed = [], []
    for job, (kind, folders) in zip(jobs, families, strict=True):
        found, missing = run_all([job])
        for result in found:
            stages = [Path(path).name for path in result.target["paths"].values()]
            result.figures |= stability(folders, MAIN.get(kind, kind), stages)
        results, failed = results + found, failed + missing
    home = Path(config["paths"]["logs"], "comparisons")
    conclude(results, failed, home, [command_line(overrides)])


def is_of(kind: str, word: str) -> bool:
    """Whether a setting is one that this pipeline has and others need not know."""
    own = {field.name for field in fields(REQUESTS[kind])} - {field.name for field in fields(SamplingConfig)}
    return word.lstrip("+~").startswith("pipeline.") or word.lstrip("+~").partition("=")[0] in own


def typed(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The command of a sweep, where its jobs are all combinations of some settings; then that of each job."""
    each = [command_line(words) for words in jobs]
    if len({len(words) for words in jobs}) > 1:
        return each
    settings = [list(dict.fromkeys(words)) for words in zip(*jobs, strict=True)]
    keys = [{word.partition("=")[0] for word in words} for words in settings]
    if math.prod(map(len, settings)) != len(jobs) or any(len(same) > 1 for same in keys):
        return each
    joined = [",".join([words[0], *(word.partition("=")[2] for word in words[1:])]) for words in settings]
    return [command_line(["-m", *joined]), *each]


def command_line(words: Sequence[str]) -> str:
    return shlex.join(["dalle", "evaluate", *words])


def entries(given: Any) -> list[str]:
    return [str(entry) for entry in (given if isinstance(given, list) else str(given).split(","))]


def families_of(entry: str) -> list[tuple[str, list[Path]]]:
    """The pipelines whose stages are in a folder, with all folders that the entry stands for (its seeds)."""
    path = Path(entry)
    folders = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    if not folders or not folders[0].is_dir():
        raise UserError(f"compare: there is no folder {entry}")
    drawing = [kind for kind in REQUESTS if kind != "upsampler"]
    kinds = [kind for kind in drawing if Run(folders[0] / MAIN.get(kind, kind)).finished]
    if not kinds:
        stages = ", ".join(MAIN.get(kind, kind) for kind in drawing)
        raise UserError(
            f"compare: {folders[0]} holds no finished run of {stages}; train one, or leave it out"
        )
    return [(kind, folders) for kind in kinds]


def run_all(jobs: Sequence[Sequence[str]]) -> tuple[list[Result], list[str]]:
    """The results of the jobs that ended well, and a line for each that did not.

    Raises:
        KeyboardInterrupt: one was stopped by Ctrl-C.
    """
    results, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for k, overrides in enumerate(jobs):
            print(f"[{k + 1}/{len(jobs)}] {' '.join(overrides)}", flush=True)
            note, reason = Path(scratch, f"{k}.note"), Path(scratch, f"{k}.reason")
            code = call(
                [*child_command("evaluate"), *overrides, f"note={quote(str(note))}"],
                None,
                **{REASON: str(reason)},
            )
            why = reason.read_text(encoding="utf-8") if reason.exists() else f"ended with code {code}"
            if code and why == STOPPED:
                raise KeyboardInterrupt
            if code or not note.exists():
                failed.append(f"{' '.join(overrides)}: {why}")
            else:
                results.append(Result.read(note.read_text(encoding="utf-8").splitlines()[-1]))
    return results, failed


def conclude(results: list[Result], failed: list[str], home: Path, commands: Sequence[str]) -> None:
    """Leaves the report and shows its table."""
    if results:
        folder = write_report(results, new_folder(home), commands, failed)
        print((folder / "table.md").read_text(encoding="utf-8"))
        print(f"report: {folder / 'report.html'}, figures: {folder / 'figures.csv'}")
    if failed:
        jobs = len(results) + len(failed)
        raise UserError(f"{len(failed)} of {jobs} evaluations failed; the first: {failed[0]}")
