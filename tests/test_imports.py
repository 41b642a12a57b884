"""Who may import whom. Networks know tensors, diffusion knows callables, dalle.cli alone knows Hydra."""

import ast
import sys
from pathlib import Path

import pytest
from tiny import ROOT

SOURCE = ROOT / "src"
# Rooms, lowest first: the libraries each may import beside Python's own, and the rooms of ours. None: any.
FREE = {
    "dalle.compiler", "dalle.errors", "dalle.files", "dalle.finite", "dalle.graphs", "dalle.locks",
    "dalle.machine", "dalle.ranges", "dalle.reading", "dalle.schemas", "dalle.sharded", "dalle.weight_names",
}  # fmt: skip
RUNS = {
    "dalle.run_dir",
    "dalle.run_lock",
    "dalle.instantiate",
    "dalle.trust",
    "dalle.images",
}
PURE = {"torch", "jaxtyping", "annotated_types"}
CORE = {"dalle.nets", "dalle.diffusion", "dalle.autoregressive", "dalle.optim", "dalle.data", "dalle.metrics"}
LIBRARIES = {
    "nets": PURE | {"einops", "vector_quantize_pytorch"},
    "diffusion": PURE,
    "autoregressive": PURE,
    "optim": PURE,
    "data": PURE
    | {"lightning", "torchvision", "PIL", "numpy", "tokenizers", "tqdm", "open_clip", "safetensors"}
    | {"aiohttp", "datasets", "emoji", "fsspec", "huggingface_hub", "pyarrow"},
    "metrics": PURE | {"torchmetrics", "lightning", "torch_fidelity", "open_clip", "timm"},
    "stages": PURE | {"torchmetrics", "lightning"},
    "pipelines": PURE | {"yaml", "tqdm"},
    "weights": PURE | {"huggingface_hub", "safetensors", "yaml"},
}
ROOMS = {
    "nets": set(),
    "diffusion": set(),
    "autoregressive": set(),
    "optim": set(),
    "data": {"dalle.nets", "dalle.trust", "dalle.instantiate", "dalle.images"},
    "metrics": {"dalle.data", "dalle.images"},
    "stages": {
        "dalle.diffusion",
        "dalle.autoregressive",
        "dalle.optim",
        "dalle.data.batch",
        "dalle.data.embed_norm",
        "dalle.nets.interfaces",
    },
    "training": CORE | RUNS | {"dalle.stages"},
    "pipelines": CORE | RUNS | {"dalle.stages"},
    "weights": CORE | RUNS | {"dalle.stages"},
    "launch": RUNS,
    "evaluation": CORE | RUNS | {"dalle.stages", "dalle.training", "dalle.pipelines", "dalle.launch"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Full names of everything a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_import_rule(path):
    found = imports(path)
    room = path.relative_to(SOURCE / "dalle").parts[0]
    assert room == "cli" or not [name for name in found if within(name, {"hydra", "omegaconf"})]
    if room in ROOMS:
        shared = {"dalle.stages.base", "dalle.stages.embedding_stage", "dalle.stages.nan_guard"}
        own = {f"dalle.{room}"} if room != "stages" else shared
        upward = [n for n in found if n.startswith("dalle.") and not within(n, ROOMS[room] | FREE | own)]
        assert not upward  # of stages, none imports another
    if room in LIBRARIES:
        known = {"dalle", *LIBRARIES[room], *sys.stdlib_module_names}
        assert not [name for name in found if not within(name, known)]


def test_every_room_has_its_rule():
    rooms = {path.parent.name for path in (SOURCE / "dalle").glob("*/__init__.py")}
    assert rooms - {"cli"} == ROOMS.keys()


def test_hydras_private_parts_are_used_in_one_place():
    private = {"hydra._internal"}
    assert [path.name for path in FILES if any(within(n, private) for n in imports(path))] == ["compose.py"]


def test_scripts_are_doors():
    for path in ROOT.glob("*.py"):
        assert set(imports(path)) == {"sys", "dalle.cli.command.run"}, path


def test_networks_do_not_import_each_other():
    for path in (SOURCE / "dalle" / "nets").glob("*.py"):
        shared = {"dalle.nets.blocks", "dalle.nets.recompute", "dalle.nets.sizes"}
        assert not [n for n in imports(path) if within(n, {"dalle.nets"}) and not within(n, shared)], path
