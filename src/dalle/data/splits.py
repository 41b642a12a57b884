"""Which split a picture is in: as folders or tables say, else by a hash of its name."""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from dalle.data.text import encoded

Split = Literal["train", "val", "test"]

FEWEST = 3  # different pictures that can be divided into three splits
DEEPEST = 3  # levels below the root at which folders of splits are looked for
NAMES: dict[str, str] = {
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
EITHER = ("eval", "evaluation")  # val, or test where another is val


def split_names(words: Iterable[str]) -> dict[str, str]:
    """What those of some words that name splits (`Train`, `val2017`, `dev`) stand for."""
    plain = {word: re.sub(r"[-_ ]?\d*$", "", word.casefold()) for word in words}
    found = {word: NAMES[name] for word, name in plain.items() if name in NAMES}
    either = "test" if "val" in found.values() else "val"
    return found | {word: either for word, name in plain.items() if name in EITHER}


def folder_splits(names: Iterable[str]) -> dict[str, str]:
    """The splits of names by their folders: `train/a.png`, `images/val/b.png`; empty where none are meant.

    Folders are splits where there are `train` and another of them, or `train` alone at the top; else `train`
    may be a class.
    """
    parts = {name: PurePosixPath(name).parts[:-1] for name in names}
    for depth in range(DEEPEST):
        folders = {path[depth] for path in parts.values() if len(path) > depth}
        found = split_names(folders)
        kinds = set(found.values())
        if "train" in kinds and (len(kinds) > 1 or (len(folders) == 1 and not depth)):
            return {
                name: found[path[depth]]
                for name, path in parts.items()
                if len(path) > depth and path[depth] in found
            }
    return {}


def split_folder(name: str) -> str | None:
    """The first folder of a name that can be one of a split."""
    return next((part for part in PurePosixPath(name).parts[:-1] if split_names([part])), None)


def divide(
    names: Sequence[str],
    val_fraction: float,
    test_fraction: float,
    seed: int = 0,
    given: Mapping[str, str] | None = None,
    same: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Names -> {train, val, test}, each in the order of `names`.

    Given splits stay; one that is not given is drawn from `train`. A split that the hash leaves empty takes
    the name that came closest; with fewer than three different pictures, every split has them all.

    Args:
        given: splits of names; None: as their folders say.
        same: what tells pictures apart. Equal ones go where the first of them goes.
    """
    given = folder_splits(names) if given is None else given
    out: dict[str, list[str]] = {
        split: [name for name in names if given.get(name) == split] for split in ("train", "val", "test")
    }
    pool = out["train"] or list(names)
    fractions: dict[str, float] = {"val": val_fraction, "test": test_fraction}
    wanted = {split: fraction for split, fraction in fractions.items() if fraction > 0 and not out[split]}
    firsts: dict[str, str] = {}
    first = {name: firsts.setdefault(same[name] if same else name, name) for name in pool}
    if len(firsts) < FEWEST:
        return out | dict.fromkeys(("train", *wanted), pool)
    order = sorted((_place(name, seed), name) for name in firsts.values())
    splits: dict[str, str] = {}
    start, edge = 0, 0.0
    for k, (split, fraction) in enumerate(wanted.items()):
        edge += fraction
        end = max(bisect_left(order, (edge, "")), start + 1)
        end = max(
            start, min(end, len(order) - len(wanted) + k)
        )  # leaves one for each split to come, and train
        splits |= {name: split for _, name in order[start:end]}
        start = end
    return out | {
        split: [name for name in pool if splits.get(first[name], "train") == split]
        for split in ("train", *wanted)
    }


def _place(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the name and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/".encode() + encoded(name)).digest()[:6]) / 2**48


def owners(places: np.ndarray, asked: Mapping[Any, float]) -> np.ndarray:
    """For each thing 0, to train on, or the number of a split: those of the lowest places, at least one."""
    owner, start = np.zeros(len(places), np.int64), 0
    for k, share in enumerate(asked.values(), 1):
        end = start + max(1, round(share * len(places)))
        owner[np.argsort(places, kind="stable")[start:end]] = k
        start = end
    return owner
