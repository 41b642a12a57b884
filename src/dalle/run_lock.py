"""Whose a run directory is: nothing is written into, or deleted from, what is not a run of ours.

A directory is ours once it holds the marker `.dalle-run`, which is written when a run claims it and locked as
long as that run is at work; older runs are known by their manifest or configuration. `overwrite=true` deletes
the files of a run (`OWN`), never through links, and refuses a directory that holds anything else.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalle.errors import UserError
from dalle.files import LEFT, check_writable, clean, explained
from dalle.locks import locked
from dalle.reading import read_json, read_yaml
from dalle.run_dir import Run

MARKER = ".dalle-run"  # in every run directory; locked while a training is at work there
OWN = re.compile(
    r"config\.yaml|last\.ckpt|model\.safetensors|manifest\.json|tokenizer\.json|metrics\.csv|samples|wandb|"
    r"tensorboard|hpc_ckpt_\d+\.ckpt|step-\d+\.ckpt|best\.ckpt|\.dalle-run|\..+\.tmp"
)
PLAIN = re.compile(r"(?!\.)[^/\\\0]+")  # of `name` and `stage`, which become names of directories


def check_place(config: dict[str, Any]) -> None:
    """Refuses names that are no plain names, and places where nothing can be written, before any work.

    Raises:
        UserError: naming the setting.
    """
    for key in ("name", "stage"):
        if isinstance(config[key], bool) or not isinstance(config[key], str | int | float):
            raise UserError(f"{key}={config[key]}: give one plain name")
        check_name(str(config[key]), key)
    place = Path(config["paths"]["run"])
    if place.is_symlink() and not place.exists():
        raise UserError(f"{place} is a link to nowhere; make the folder it leads to, or delete the link")
    check_writable(place, "name, paths.logs or paths.run")
    check_writable(Path(config["paths"]["cache"]), "paths.cache")
    for key, node in (config.get("callbacks") or {}).items():
        folder = node.get("directory") if isinstance(node, dict) else None
        if folder is None or Path(folder).is_relative_to(place):
            continue
        if key == "checkpoint":
            raise UserError(
                f"callbacks.checkpoint.directory={folder}: checkpoints are in the run's own, {place}"
            )
        check_writable(Path(folder), f"callbacks.{key}.directory")


def check_name(name: str, setting: str) -> None:
    """Raises UserError where a name would lead to another folder."""
    if not PLAIN.fullmatch(name):
        raise UserError(
            f"{setting}={name!r} is no plain name (no slashes, no dot in front, not empty)"
            + ("; another folder for all runs is paths.logs=" if setting == "name" else "")
        )


def is_ours(folder: Path) -> bool:
    """Whether a run of ours has been here."""
    return (folder / MARKER).is_file() or _is_manifest(folder) or _is_config(folder)


def _is_manifest(folder: Path) -> bool:
    try:
        facts = read_json(folder / "manifest.json", dict, "")
    except UserError:
        return False
    return {"schema", "stage", "weights"} <= facts.keys()


def _is_config(folder: Path) -> bool:
    try:
        facts = read_yaml(folder / "config.yaml", dict, "")
    except UserError:
        return False
    return {"stage", "model", "datamodule", "paths"} <= facts.keys()


def check_ours(folder: Path, overwrite: bool) -> None:
    """Refuses a directory that holds what no run of ours has left there.

    Raises:
        UserError: naming it.
    """
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    names = [name for name in names if not LEFT.fullmatch(name)]
    foreign = [name for name in names if not OWN.fullmatch(name)] if is_ours(folder) else names
    if not overwrite:  # beside the jobs of a sweep there is room
        foreign = [n for n in foreign if n != ".jobs" and not is_ours(folder / n)]
    if foreign and (overwrite or not is_ours(folder)):
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise UserError(
            f"{folder} holds what is not of a run ({shown}): nothing is deleted or written there; "
            "move that away, or give another folder"
        )


def sidecar(run: Path, suffix: str) -> Path:
    """A file about a run that stays when the run itself is deleted."""
    return run.parent / ".jobs" / (run.name + suffix)


@contextmanager
def only_one(run: Path) -> Iterator[int | None]:
    """Waits until no other process works on `run`, and keeps others waiting.

    A process that is given the lock's descriptor holds it as long as it lives, also when whoever started it
    was killed.
    """
    path, wait = sidecar(run, ".lock"), f"{run}: another process is at work there; waiting for it"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, wait) as lock:
        if (run / MARKER).exists():  # a training that nobody has started from here
            with locked(run / MARKER, wait):
                pass
        yield lock


@contextmanager
def claimed(run: Run, overwrite: bool) -> Iterator[None]:
    """Makes the run directory ours alone, and empties it where that was asked for.

    Raises:
        UserError: another process is at work there, something is there that is not ours, or cannot be
            deleted.
    """
    check_ours(run.path, overwrite)
    with explained(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    with locked(run.path / MARKER) as free:
        if free is None:
            raise UserError(f"{run} is in use: another process trains there; wait for it, or give name=other")
        if overwrite:
            empty(run.path)
        for folder in (run.path, run.path / "samples"):
            clean(folder)
        yield


def empty(folder: Path) -> None:
    """Deletes the files of a run. Of links only the links; a directory that is a link itself stays.

    Raises:
        UserError: something cannot be deleted.
    """
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name != MARKER and OWN.fullmatch(name):
            with explained(path, "it cannot be deleted, so overwrite=true cannot start again"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if left := [name for name in os.listdir(folder) if name != MARKER]:
        raise UserError(f"{folder} could not be emptied ({', '.join(left[:3])} is still there); delete it")
