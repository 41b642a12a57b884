"""Writes public weights as a finished run, which every command takes as if it had been trained here."""

import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import dalle
from dalle.data.tokenizers import TextTokenizer, save_tokenizer
from dalle.errors import UserError
from dalle.files import write_text
from dalle.instantiate import instantiate
from dalle.ranges import shown
from dalle.run_dir import Run
from dalle.run_lock import claimed
from dalle.trust import listed
from dalle.weights.reading import PublicWeights

NAMED = 3  # weights named in a message


@dataclass
class Imported:
    """A stage that was recognised in public weights.

    Attributes:
        stage: its name: clip, dvae ...
        layout: whose names the weights had.
        model: the settings of the stage, as in a run's config.yaml.
        tensors: of `model.net`, by its names.
        facts: what the manifest says beside what all manifests do.
        clip, image_tokenizer: the runs whose embeddings or codes it works with.
    """

    stage: str
    layout: str
    model: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    tokenizer: TextTokenizer | None = None
    clip: Path | None = None
    image_tokenizer: Path | None = None
    licence: str | None = None


def write_run(found: Imported, source: PublicWeights, run: Run, name: str, licence: str | None = None) -> Run:
    """The run directory of what was found in `source`; licence None: what is known of the layout's weights.

    Raises:
        UserError: the directory holds something already, or weights are missing, left over, of other shapes.
    """
    if run.occupied:
        raise UserError(f"{run} already holds a run; give another name=, or delete it")
    with torch.device("meta"):  # names and shapes, no memory
        net = instantiate(found.model["net"], f"{source.path}", listed)
    own = net.state_dict()
    check_same(found.tensors, own, source.path, found.stage)
    held = {name: value.to(own[name].dtype).contiguous() for name, value in found.tensors.items()}
    net.load_state_dict(held, assign=True)
    origin = {
        "layout": found.layout,
        "path": str(source.path),
        "files": source.files,
        "licence": licence or found.licence,
    }
    config: dict[str, Any] = {"name": name, "stage": found.stage, "origin": origin, "model": found.model}
    if found.clip is not None:
        config["clip"] = {"_target_": "dalle.run_dir.load_clip", "path": str(found.clip)}
    if found.image_tokenizer is not None:
        target = "dalle.run_dir.load_image_tokenizer"
        config["image_tokenizer"] = {"_target_": target, "path": str(found.image_tokenizer)}
    facts = {
        "stage": found.stage,
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": 0,
        "origin": origin,
        **found.facts,
        "versions": {
            "dalle": dalle.__version__, "torch": torch.__version__, "python": platform.python_version()
        },
    }  # fmt: skip
    with claimed(run, overwrite=False):
        if found.tokenizer is not None:
            save_tokenizer(found.tokenizer, run.tokenizer)
        write_text(run.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        run.save(net.state_dict(), facts)
    return run


def refuse_others(path: Path, **given: Any) -> None:
    """Refuses settings that are for weights of another kind: those that are not None.

    Raises:
        UserError: naming the first of them.
    """
    if names := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{path} holds weights of another kind than {names[0]}= is for; leave it out")


def check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Refuses weights that are not, each of them, one of the network's.

    Raises:
        UserError: naming those that are missing, left over or of another shape.
    """
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{path} is no whole {what}: it lacks {_some(missing)}")
    if left := [name for name in found if name not in wanted]:
        raise UserError(f"{path} is another {what} than this version knows: it also holds {_some(left)}")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(wanted[name].shape)}"
            raise UserError(f"{path} does not fit together: {name} is {shapes}")


def _some(names: Collection[str]) -> str:
    """A few of the names, and how many more there are."""
    first = ", ".join(shown(name).strip("'\"") for name in sorted(names)[:NAMED])
    return first if len(names) <= NAMED else f"{first} and {len(names) - NAMED} more"


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, path: Path, what: str) -> tuple[int, ...]:
    """The shape of a weight by which the sizes of the network are known.

    Raises:
        UserError: it is not there, has other than `dims` dimensions, or no numbers.
    """
    if name not in tensors or tensors[name].ndim != dims or not tensors[name].numel():
        raise UserError(f"{path} is no {what}: it lacks {name}")
    return tuple(tensors[name].shape)


def count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers there are, by names such as ``blocks.{}.weight``."""
    number = 0
    while pattern.format(number) in tensors:
        number += 1
    return number
