"""What a file says is data from anybody: no class but those we list is ever reached through it.

Every attack would leave `RAN` in its folder, or take `victim` away, had it run.
"""

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import untrained
from tiny import ROOT

from dalle.errors import UserError
from dalle.evaluation.plan import source_of
from dalle.evaluation.targets import Target
from dalle.instantiate import instantiate
from dalle.pipelines.load import load_dalle, load_unclip
from dalle.pipelines.sampling import arguments
from dalle.run_dir import load_clip, load_stage
from dalle.trust import LISTED, composed, listed

Node = dict[str, Any]
SHELL = (
    "torch.os.system", "dalle.run_dir.os.system", "dalle.launch.processes.os.system", "os.system",
    "posix.system",
    "lightning.pytorch.trainer.trainer.os.system", "torch.nn.parallel.distributed.os.system",
    "torch.optim.lr_scheduler.math.os.system", "torch.utils.cpp_extension.os.system",
)  # fmt: skip


class Bomb:
    """A pickle that runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def attacks(folder: Path) -> dict[str, Node]:
    """Each kind of them, ready to leave its trace in `folder`."""
    ran = str(folder / "RAN")
    touch = ["touch", ran]
    (folder / "victim").mkdir(parents=True)
    (folder / "bomb.pt").write_bytes(pickle.dumps(Bomb(folder / "RAN")))
    (folder / "hubconf.py").write_text(f"open({ran!r}, 'w').close()\ndef go(): pass\n")
    write = {"_target_": "dalle.run_dir.write_aside", "path": ran, "text": "x"}
    linear = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2}
    found: dict[str, Node] = {target: {"_target_": target, "command": f"touch {ran}"} for target in SHELL}
    nodes: list[Node] = [
        {"_target_": "dalle.launch.processes.call", "command": touch},
        {"_target_": "dalle.launch.processes.subprocess.run", "args": touch},
        {"_target_": "subprocess.run", "args": touch},
        {"_target_": "torch.distributed.run.main", "args": ["--no-python", *touch]},
        {"_target_": "builtins.exec", "object": f"open({ran!r}, 'w')"},
        {"_target_": "dalle.training.fit.shutil.rmtree", "path": str(folder / "victim")},
        {"_target_": "shutil.rmtree", "path": str(folder / "victim")},
        {"_target_": "torch.save", "obj": 1, "f": ran},
        {"_target_": "torch.load", "f": str(folder / "bomb.pt"), "weights_only": False},
        {"_target_": "torch.serialization.load", "f": str(folder / "bomb.pt"), "weights_only": False},
        {"_target_": "torch.serialization.pickle.load", "file": str(folder / "bomb.pt")},
        {"_target_": "torch.hub.load", "repo_or_dir": str(folder), "model": "go", "source": "local"},
        {"_target_": "torch.utils.cpp_extension.load_inline", "name": "x", "build_directory": ran},
        {"_target_": "torch.nn.modules.module.torch.save", "obj": 1, "f": ran},
        {"_target_": "torch.nn.functional.torch.save", "obj": 1, "f": ran},
        {"_target_": "torch.nn.init.warnings.sys.exit"},
        write,
        {"_target_": "dalle.instantiate.build", "node": write},
        {"_target_": "dalle.instantiate.partial", "func": write},
        {"_target_": "dalle.training.loggers.MetricsCsv", "directory": ran},
        {"_target_": "dalle.training.loggers.wandb", "directory": ran},
        {"_target_": "dalle.launch.hparam_search.Search", "folder": ran, "metric": "a",
         "direction": "minimize", "trials": 1, "seed": 0, "space": {"a": [1]}},
        {"_target_": "dalle.data.datamodules.ImageDataModule", "source": write},
        {"_target_": "lightning.Trainer", "default_root_dir": ran},
        {"_target_": "torch.nn.Linear.__init__.__globals__.get", "key": "os"},
        {"_target_": "torch.nn.Module.__subclasses__"},
        {"_target_": "torch.nn..Linear", "in_features": 2, "out_features": 2},
        {"_target_": "torch.nn.os.system", "command": f"touch {ran}"},
        {"_target_": ["torch.os.system"], "command": f"touch {ran}"},
        {"_target_": {"_target_": "torch.os.system", "command": f"touch {ran}"}},
        {"_target_": "torch.nn.Sequential", "_args_": [write]},
        {"_target_": "torch.nn.Sequential", "_partial_": write},
        {**linear, "bias": write},
        {**linear, "wrong": write},
        {**linear, "device": {"_target_": "torch.os.system", "command": f"touch {ran}", "_partial_": True}},
        {"_target_": "nowhere.Net", "inner": [{"deep": write}]},
        {**linear, "_recursive_": False, "_convert_": "all"},
    ]  # fmt: skip
    return found | {f"{i}: {str(node['_target_'])[:40]}": node for i, node in enumerate(nodes)}


ATTACKS = (*SHELL, *range(37))


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("stages") / "logs"
    for model in ("clip", "decoder", "dvae", "dalle"):
        untrained(model, logs)
    return logs / "default"


def of(number: str | int, folder: Path) -> Node:
    found = attacks(folder)
    assert len(found) == len(ATTACKS)
    return (
        found[number]
        if isinstance(number, str)
        else next(v for k, v in found.items() if k.startswith(f"{number}: "))
    )


def refused(folder: Path, attempt: Callable[[], Any], message: str = ".") -> None:
    with pytest.raises(UserError, match=message) as error:
        attempt()
    assert "\n" not in str(error.value)
    assert not (folder / "RAN").exists()
    assert (folder / "victim").is_dir()


@pytest.fixture
def planted(stages, tmp_path, request):
    """`planted("decoder", "model.net", node)`: a copy of the stages with a node put into a config.yaml."""

    def plant(stage: str, place: str, node: Any) -> Path:
        shutil.copytree(stages, tmp_path / "logs")
        path = tmp_path / "logs" / stage / "config.yaml"
        config = yaml.safe_load(path.read_text())
        *way, last = place.split(".")
        inner = config
        for key in way:
            inner = inner[key]
        inner[last] = node
        path.write_text(yaml.safe_dump(config))
        return tmp_path / "logs" / stage

    return plant


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_names_listed_classes_only(tmp_path, attack):
    node = of(attack, tmp_path / "a")
    refused(tmp_path / "a", lambda: instantiate(node, "model", listed))
    refused(tmp_path / "a", lambda: instantiate({"inner": [node]}, "model", listed))
    sampler = {"sampler": {"method": "ddim", "steps": 2, **node}}
    refused(tmp_path / "a", lambda: arguments(sampler, "decoder"))
    refused(tmp_path / "a", lambda: arguments({"sampler": {"method": "ddim", "steps": node}}, "decoder"))


@pytest.mark.parametrize("attack", ["torch.os.system", 0, 5, 8, 16, 26])
@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("clip", "model"), ("clip", "model.net"), ("clip", "model.retrieval"), ("decoder", "model.denoiser"),
        ("decoder", "model.sampler"), ("decoder", "model.net.patch"), ("decoder", "model.denoiser.schedule"),
    ],
)  # fmt: skip
def test_a_run_that_names_more_is_refused(planted, tmp_path, stage, place, attack):
    run = planted(stage, place, of(attack, tmp_path / "a"))
    refused(tmp_path / "a", lambda: load_stage(run), re.escape(f"{run / 'config.yaml'}: model"))


@pytest.mark.parametrize("attack", ["torch.os.system", 0, 7, 11, 16])
def test_what_a_run_was_trained_with_is_no_way_in(planted, tmp_path, attack):
    run, node = planted("decoder", "clip", of(attack, tmp_path / "a")), of(attack, tmp_path / "b")
    refused(tmp_path / "a", lambda: load_unclip(run), "config.yaml: clip")
    path = run.parent / "dalle" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"image_tokenizer": node}))
    refused(tmp_path / "b", lambda: load_dalle(path.parent))


@pytest.mark.parametrize("attack", ["torch.os.system", 1, 6, 16, 33])
def test_the_data_of_a_run_are_no_way_in(tmp_path, attack):
    target = Target()
    target.data, target.image_size = of(attack, tmp_path / "a"), 16
    refused(tmp_path / "a", lambda: source_of({"data": None, "split": "test"}, target))


def test_the_clip_of_a_stranger(planted, tmp_path):
    """`train.py model=prior` on it: the same reading of a run."""
    run = planted("clip", "model.net.checkpoint", of("dalle.run_dir.os.system", tmp_path / "a"))
    refused(tmp_path / "a", lambda: load_clip(run), "not among the classes that a file may name")


@pytest.mark.parametrize(
    "target",
    ["torch.os.system", "dalle.run_dir.os.system", "dalle.training.fit.shutil.rmtree",
     "dalle.instantiate.partial", "dalle.instantiate.UserError.__init__", "torch.nn", "dalle.run_dir",
     "dalle.instantiate.LISTS", "torch.float32",
     "lightning.pytorch.trainer.trainer.os.system", "dalle.launch.processes.subprocess.Popen",
     "torch.nn.Linear.__dict__", "dalle", "dalle.", ".dalle", "dalle..runs", "torch nn", "", 5, None,
     ["dalle.run_dir.load_clip"], "x" * 10**6],
)  # fmt: skip
def test_a_users_own_configuration_is_not_led_through_modules(target):
    with pytest.raises(UserError, match=r"^model(\._target_)?: _target_") as error:
        instantiate({"_target_": target}, "model")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("target", ["torch.nn.Linear", "torch.nn.modules.linear.Linear", "torch.optim.AdamW"])
def test_classes_of_torch_are_found(target):
    assert listed(target) is composed(target)


def test_everything_that_is_listed_is_there():
    for target in (name for names in LISTED.values() for name in names):
        assert listed(target) is composed(target)


def test_everything_that_runs_and_recipes_are_made_of_is_listed():
    """Add what a model, a source or a sampler may be made of to `LISTED`, or its runs cannot be used."""
    folders = ("model", "clip", "image_tokenizer", "data", "sampler", "optimizer", "experiment")
    files = [path for folder in folders for path in (ROOT / "conf" / folder).rglob("*.yaml")]
    found = {t for path in files for t in re.findall(r"_target_: *([\w.]+)", path.read_text())}
    used = {
        target
        for target in found
        if not target.startswith(("dalle.data.datamodules.", "dalle.data.upsampling.", "dalle.training."))
    }
    assert len(used) > 20
    for target in used:
        listed(target)


def test_names_of_earlier_versions_are_understood(monkeypatch):
    monkeypatch.setattr("dalle.trust.MOVED", {"dalle.old.Net": "dalle.nets.clip.CLIP"})
    assert listed("dalle.old.Net") is listed("dalle.nets.clip.CLIP")
