"""Who may import whom. Networks know tensors, diffusion knows callables, nothing in src/ knows Hydra."""

import ast
import sys
from pathlib import Path

import pytest
from tiny import ROOT

SOURCE = ROOT / "src"
MAY = {
    "nets": {"torch", "einops", "jaxtyping", "vector_quantize_pytorch"},
    "diffusion": {"torch", "jaxtyping"},
    "decoding.py": {"torch", "jaxtyping"},
    "data": {
        "torch", "lightning", "jaxtyping", "torchvision", "PIL", "numpy", "tokenizers", "tqdm", "open_clip",
        "safetensors", "dalle.nets",
    },
    "stages": {
        "torch", "torchmetrics", "lightning", "jaxtyping", "dalle.diffusion", "dalle.decoding",
        "dalle.data.batch", "dalle.data.norm",
    },
    "metrics": {
        "torch", "torchmetrics", "lightning", "torch_fidelity", "jaxtyping", "open_clip", "dalle.data",
        "dalle.pictures",
    },
    "pipelines": {
        "torch", "jaxtyping", "yaml", "tqdm", "dalle.data", "dalle.diffusion", "dalle.stages", "dalle.nets",
        "dalle.metrics", "dalle.runs", "dalle.build", "dalle.trust",
    },
}  # fmt: skip
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
    assert not [name for name in found if within(name, {"hydra", "omegaconf"})]
    package = path.relative_to(SOURCE / "dalle").parts[0]
    if package in MAY:
        free = {
            f"dalle.{package}",
            "dalle.errors",
            "dalle.files",
            "dalle.finite",
            "dalle.ranges",
            "dalle.reading",
            "dalle.records",
            "annotated_types",
            *sys.stdlib_module_names,
        }
        if package == "stages":  # its own base and optimizer recipe, never another stage
            free -= {"dalle.stages"}
            free |= {"dalle.stages.base", "dalle.stages.guard", "dalle.stages.optim"}
        assert not [name for name in found if name != "dalle" and not within(name, MAY[package] | free)]


def test_only_entry_points_know_hydra():
    knowing = {path.name for path in ROOT.glob("*.py") if any(within(n, {"hydra"}) for n in imports(path))}
    assert knowing == {path.name for path in ROOT.glob("*.py")}
    assert {"train.py", "sample.py"} <= knowing


def test_networks_do_not_import_each_other():
    for path in (SOURCE / "dalle" / "nets").glob("*.py"):
        shared = {"dalle.nets.blocks", "dalle.nets.sizes"}
        assert not [n for n in imports(path) if within(n, {"dalle.nets"}) and not within(n, shared)], path
