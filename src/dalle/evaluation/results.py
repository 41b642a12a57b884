"""A result: figures with intervals, what they are of, and the protocol by which they were measured.

    logs/<name>/evaluations/<number>/
        result.json     written as a whole, with everything else, or not at all
        grid.png        the first pictures
        pictures/       where asked for: every picture, and metadata.jsonl with their captions

Figures compare only within one protocol: `marks` finds what does not, and says what is different.
"""

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dalle
from dalle import schemas
from dalle.errors import UserError
from dalle.files import explained, to_json
from dalle.metrics.intervals import Figure
from dalle.pipelines.sampling import new_folder
from dalle.reading import read_json, shaped

SCHEMA = 1
FILE = "result.json"
OWN = ("grid.png", "pictures")  # what besides an evaluation leaves
SIGNS = "*†‡§"  # of protocols other than the first; then numbers


@dataclass
class Result:
    """One evaluation.

    Attributes:
        target: what was measured: its kind, weights and settings.
        protocol: how; equal protocols give figures that compare.
        metrics: which were asked for.
        figures: by name. `notes`: what a reader of the figures must know.
        environment: versions, which should not matter.
        parameters: of each network.
    """

    target: dict[str, Any]
    protocol: dict[str, Any]
    metrics: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: environment())
    path: Path | None = None

    @property
    def protocol_id(self) -> str:
        return identity(self.protocol)

    @property
    def id(self) -> str:
        """Equal for equal weights and settings under equal protocols."""
        settings = {key: value for key, value in self.target.items() if key != "paths"}
        return identity([settings, self.protocol, self.metrics])

    def to_json(self) -> str:
        facts = {"schema": SCHEMA, "id": self.id, "protocol_id": self.protocol_id, **asdict(self)}
        del facts["path"]
        facts["figures"] = {name: figure._asdict() for name, figure in self.figures.items()}
        return to_json(facts)

    @classmethod
    def read(cls, folder: str | Path) -> "Result":
        """Raises UserError where there is none, or one of another layout."""
        path = Path(folder, FILE)
        advice = "evaluate again with overwrite=true"
        content = read_json(path, dict, advice)
        if "subject" in content:  # as it was called at first
            content["target"] = content.pop("subject")
        if content.get("schema", SCHEMA) != SCHEMA:
            raise UserError(f"{path} was written by another version; evaluate again")
        facts = shaped(content, schemas.Result, path, advice)
        known: Any = {f.name: facts[f.name] for f in fields(cls) if f.name in facts}
        known["figures"] = {name: figure_of(ends) for name, ends in facts["figures"].items()}
        return cls(**known, path=Path(folder))


def figure_of(ends: Mapping[str, Any]) -> Figure:
    """A figure as a file has it: what JSON has no number for is null there."""
    return Figure(**{key: math.nan if value is None else value for key, value in ends.items()})


def identity(facts: Any) -> str:
    """Short hash of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def find(home: Path, result: Result) -> Path | None:
    """The folder of an earlier evaluation of the same by the same protocol."""
    for path in sorted(home.glob(f"*/{FILE}")):
        try:
            if read_json(path, schemas.Result, "evaluate again")["id"] == result.id:
                return path.parent
        except UserError:
            continue  # damaged: whoever reads it is told so
    return None


def workplace(home: Path, result: Result) -> Path:
    """Where an evaluation puts its files until it is done; the same for all its processes."""
    return home / f".{result.id}.partial"


def publish(work: Path, home: Path, taken: Path | None) -> Path:
    """Gives a finished evaluation its number, or that of the one it replaces."""
    final = new_folder(home) if taken is None else taken
    with explained(final):
        for name in (FILE, *OWN):  # only what is of an evaluation; the result is gone first, and comes last
            path = final / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for name in sorted(os.listdir(work), key=lambda name: name == FILE):
            (work / name).replace(final / name)
        work.rmdir()
    return final


def environment() -> dict[str, str]:
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "torch-fidelity", "pillow")
    versions = {name: version(name) for name in packages}
    return {"dalle": dalle.__version__, "python": platform.python_version(), **versions}


def machine() -> str:
    """The kind of device that figures of speed are of."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} threads"


def marks(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """A sign for each result ("" for those that share the first one's protocol), and a line that explains
    each sign by what is different.
    """
    signs, lines = {results[0].protocol_id: ""} if results else {}, []
    for result in results:
        if result.protocol_id in signs:
            continue
        k = len(signs) - 1
        sign = signs[result.protocol_id] = SIGNS[k] if k < len(SIGNS) else f"[{k + 1}]"
        lines.append(
            f"{sign} measured by another protocol, not to be compared: {_differences(results[0], result)}"
        )
    return [signs[result.protocol_id] for result in results], lines


def _differences(first: Result, other: Result) -> str:
    a, b = flat(first.protocol), flat(other.protocol)
    keys = [key for key in a | b if a.get(key) != b.get(key)]
    return "; ".join(f"{key} is {b.get(key)} instead of {a.get(key)}" for key in keys)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves
