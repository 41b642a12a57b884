"""Damaged and hostile files: whatever is in a run directory or a recipe, a command ends well or in one line,
and never runs what a file says.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from torture.kills import command
from torture.trial import run

SENTINEL = "was_run"
TINY = ("steps=2", "pipeline.prior_sampler.steps=2", "precision=fp32", "device=cpu", "prompt=a red ring")
DALLE = ("pipeline=dalle", "precision=fp32", "device=cpu", "prompt=a red ring")
UNCLIP = ("clip", "prior", "decoder")
COMMANDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {  # script, arguments, runs it reads
    "sample": ("sample.py", (*TINY, "out=made"), UNCLIP),
    "sample dalle": ("sample.py", (*DALLE, "out=made"), ("dvae", "dalle")),
    "evaluate": (
        "evaluate.py",
        (*TINY[:2], "trainer=cpu", "precision=fp32", "n=8", "metrics=[judge]"),
        UNCLIP,
    ),
    "dashboard": ("dalle.evaluation.dashboard", ("logs/default",), (*UNCLIP, "dvae", "dalle")),
    "prior": ("train.py", (), ("clip",)),
    "resume": ("train.py", (), ("clip", "decoder", "dvae")),
    "recipe": ("sample.py", ("recipe=recipe/recipe.yaml", "out=made"), ("recipe",)),
}
ATTACKS = (
    "torch.os.system", "os.system", "dalle.run_dir.os.system", "dalle.training.fit.shutil.rmtree",
    "dalle.launch.processes.call", "torch.hub.load", "torch.load", "torch.save",
    "torch.utils.collect_env.run", "lightning.pytorch.utilities.os.system", "torch.utils.cpp_extension.load",
    "subprocess.call", "builtins.exec", "torch.utils.data.datapipes.utils.common.os.system",
    "lightning.fabric.utilities.os.system", "torch.distributed.run.main", "torch.jit.load",
    "dalle..os.system", "dalle.files.os.unlink", "torch.package.PackageImporter",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, 5, -1, 1e999, float("nan"), "words", "", [], {}, [1], {"a": 1}, True, "../../..",
    "$x^$", "\x1b[31m", 10**30,
)  # fmt: skip


def damaged(folder: Path, seed: int, stages: Path) -> str:
    """One random damage to one file of a finished run; a command that reads it.

    Returns: what went wrong; empty where the command worked or said in one line why not.
    """
    draw = random.Random(f"damage {seed}")
    logs = folder / "logs"
    shutil.copytree(stages / "default", logs / "default")
    shutil.copytree(stages / "recipe", folder / "recipe")
    name = draw.choice(list(COMMANDS))
    script, arguments, victims = COMMANDS[name]
    victim = draw.choice(victims)
    place = folder / "recipe" if victim == "recipe" else logs / "default" / victim
    files = sorted(p for p in place.iterdir() if p.is_file() and p.stat().st_size and p.suffix != ".png")
    file = draw.choices(files, [4 if p.suffix in PARSERS else 1 for p in files])[0]
    how = draw.choice(
        (mutate, mutate, mutate, mutate, attack, attack, cut, flip, empty, not_utf8, replaced_by_folder)
    )
    how(file, draw)
    if name == "prior":
        arguments = command("prior", logs, logs, "trainer.max_steps=1", "name=other")
    if name == "resume":
        (logs / "default" / victim / "manifest.json").unlink(missing_ok=True)
        arguments = command(victim, logs, logs, "trainer.max_steps=4", "resume=true")
    sentinel = folder / SENTINEL
    ended = run(folder, script, *arguments)
    what = f"{name}, {victim}/{file.name} {how.__name__}"
    if sentinel.exists():
        return f"{what}: code in the file was run"
    if ended.code and (fault := ended.fault()):
        return f"{what}: {fault}"
    if "Traceback" in ended.err + ended.out:
        return f"{what}: a traceback: {ended.tail}"
    return ""


def mutate(file: Path, draw: random.Random) -> None:
    """Takes a value of a JSON or YAML file away, or puts another in its place."""
    read, write = PARSERS.get(file.suffix, (None, None))
    if read is None or write is None:
        return flip(file, draw)
    content = read(file.read_text())
    node, key = draw.choice(places(content))
    if draw.random() < 0.4:
        del node[key]
    else:
        node[key] = draw.choice(VALUES)
    file.write_text(write(content))


def attack(file: Path, draw: random.Random) -> None:
    """Names something that runs code, wherever the file names a class."""
    if file.suffix != ".yaml":
        return mutate(file, draw)
    content = yaml.safe_load(file.read_text())
    named = [(node, key) for node, key in places(content) if key == "_target_"]
    spots = named + [(node, key) for node, key in places(content) if isinstance(node, dict)]
    node, key = draw.choice(spots)
    command = {
        "_target_": draw.choice(ATTACKS),
        "command": f"touch {SENTINEL}",
        "_args_": [f"touch {SENTINEL}"],
    }
    if key == "_target_":
        node[key] = command["_target_"]
        node["command"] = command["command"]
    else:
        node[key] = command
    file.write_text(yaml.safe_dump(content))


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in ((node, key), *places(value))]


def cut(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randint(0, max(0, len(content) - 1))])


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 20))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def empty(file: Path, draw: random.Random) -> None:
    file.write_bytes(b"")


def not_utf8(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    at = draw.randint(0, len(content))
    file.write_bytes(content[:at] + b"\xff\xfe\x80" + content[at:])


def replaced_by_folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


PARSERS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    ".json": (json.loads, json.dumps), ".yaml": (yaml.safe_load, yaml.safe_dump),
}  # fmt: skip
