"""A run directory: what a trained stage leaves behind, and how the next one finds it.

    logs/<name>/<stage>/
        config.yaml         the resolved configuration
        last.ckpt           everything needed to go on training
        model.safetensors   weights of the trained network (their moving average where there is one)
        manifest.json       what a user of the weights must know: sizes, normalisation, hashes, final metrics
        tokenizer.json      of a CLIP or a DALL-E transformer: how its captions become ids
        metrics.csv, samples/

A run is finished when its manifest is there: it is written last. Every file is written beside its place and
renamed (dalle.files).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dalle.build import build
from dalle.data.frozen import FrozenCLIP, FrozenTokenizer, weights_hash
from dalle.data.norm import EmbedNorm
from dalle.data.tokenizers import CaptionTokenizer, ClipBPE, load_tokenizer
from dalle.errors import UserError
from dalle.files import beside, write_json
from dalle.ranges import Place
from dalle.stages.base import Stage
from dalle.trust import listed

SCHEMA = 1
IMAGE_TOKENIZERS = ("dvae", "vqgan")  # the stages that turn pictures into codes


@dataclass(frozen=True)
class Run:
    """A run directory, whether anything is in it yet or not."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def checkpoint(self) -> Path:
        return self.path / "last.ckpt"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def finished(self) -> bool:
        return (self.path / "manifest.json").is_file() and (self.path / "model.safetensors").is_file()

    @property
    def occupied(self) -> bool:
        begun = ("last.ckpt", "config.yaml", "metrics.csv")
        return self.finished or any((self.path / name).exists() for name in begun)

    def manifest(self) -> dict[str, Any]:
        """Raises UserError when this is no finished run, or one of another layout."""
        if not self.finished:
            raise UserError(
                f"{self.path} holds no finished run (no manifest.json); train it, or give another path"
            )
        manifest = self._read("manifest.json", json.loads, needs=("schema",))
        if manifest.get("schema") != SCHEMA:
            raise UserError(
                f"{self.path} was written with layout {manifest.get('schema')}, this version reads {SCHEMA}; "
                "train it again"
            )
        return manifest

    def config(self) -> dict[str, Any]:
        """The resolved configuration it was trained with. Raises UserError when it cannot be read."""
        return self._read("config.yaml", yaml.safe_load, needs=("model",))

    def _read(self, name: str, parse: Callable[[str], Any], needs: Sequence[str]) -> dict[str, Any]:
        try:
            content = parse((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{self.path / name} cannot be read ({error}); restore it or train the stage again"
            ) from None
        if not isinstance(content, dict) or any(key not in content for key in needs):
            raise UserError(f"{self.path / name} is damaged; restore it or train the stage again")
        return content

    def save(self, net: nn.Module, manifest: Mapping[str, Any]) -> None:
        """Writes the weights and then the manifest, which makes the run a finished one."""
        weights = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
        with beside(self.path / "model.safetensors") as hidden:
            save_file(weights, hidden)
        facts = {"schema": SCHEMA, "weights": weights_hash(net), **manifest}
        write_json(self.path / "manifest.json", facts)

    def load_tokenizer(self) -> CaptionTokenizer | ClipBPE:
        """The run's text tokenizer. Raises UserError when it cannot be read."""
        try:
            return load_tokenizer(self.tokenizer)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.tokenizer} cannot be read ({error}); restore it or train the stage again"
            ) from None

    def weights(self) -> dict[str, torch.Tensor]:
        path = self.path / "model.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); restore it or train the stage again") from None


def load_stage(path: str | Path, *expected: str) -> tuple[Stage, dict[str, Any]]:
    """A finished run's stage with its weights, in eval mode on the CPU, and its manifest.

    Raises:
        UserError: no finished run there, none of the `expected` kinds of stage (if any are named), or weights
            that do not fit.
    """
    run = Run(Path(path))
    manifest = run.manifest()
    if expected and (found := manifest.get("stage")) not in expected:
        raise UserError(f"{path} holds a {found}, but a {' or '.join(expected)} is needed here")
    stage = build_stage(run)
    try:
        stage.net.load_state_dict(run.weights(), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{run.path}: model.safetensors does not fit config.yaml: {reason}") from None
    if "image_embed_norm" in manifest:
        stage.norm = EmbedNorm.from_dict(manifest["image_embed_norm"])
    return stage.eval().requires_grad_(False), manifest


def build_stage(run: Run) -> Any:
    """The stage that a run's config.yaml describes; it may be anybody's and name listed classes only."""
    node, where = run.config()["model"], f"{run.path / 'config.yaml'}: model"
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{where} describes no stage; restore it or train the stage again")
    try:
        stage = build({**node, "optimizer": None}, where, listed)
    except UserError:
        raise
    except Exception as error:  # whatever networks raise for sizes that nobody has trained
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{where} cannot be built ({reason}); restore it or train the stage again") from error
    if not isinstance(stage, Stage):
        raise UserError(f"{where} is no stage but a {type(stage).__name__}; restore it")
    return stage


def load_clip(path: Place) -> FrozenCLIP:
    """The CLIP of a finished `model=clip` run, frozen, with its tokenizer."""
    stage, _ = load_stage(path, "clip")
    return FrozenCLIP(stage.net, Run(Path(path)).load_tokenizer())


def load_image_tokenizer(path: Place) -> FrozenTokenizer:
    """The network of a finished `model=dvae` or `model=vqgan` run, frozen."""
    stage, _ = load_stage(path, *IMAGE_TOKENIZERS)
    return FrozenTokenizer(stage.net)
