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

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dalle.data.embed_norm import EmbedNorm
from dalle.data.frozen import FrozenCLIP, FrozenTokenizer, tensors_hash
from dalle.data.tokenizers import TextTokenizer, load_tokenizer, state_hash
from dalle.errors import UserError
from dalle.files import atomic_path, write_json
from dalle.finite import check_finite
from dalle.instantiate import instantiate
from dalle.ranges import Place, shown
from dalle.reading import Facts, migrated, read_json, read_text, read_yaml, shaped
from dalle.schemas import Manifest, RunConfig
from dalle.stages.base import Stage
from dalle.trust import listed, renamed
from dalle.weight_names import as_today

MIGRATIONS: tuple[Callable[[Facts], Facts], ...] = ()  # of a manifest: from schema 1 to 2, from 2 to 3 ...
SCHEMA = len(MIGRATIONS) + 1
ADVICE = "restore it or train the stage again"
IMAGE_TOKENIZERS = ("dvae", "vqgan")  # the stages that turn pictures into codes
LONGEST = 2**30  # bytes of metrics.csv, which grows with the training
NEEDS = {  # what a manifest must say for a stage to be of use
    "ar_prior": ("clip", "image_embed_norm"),
    "prior": ("clip", "image_embed_norm"),
    "decoder": ("clip", "image_embed_norm"),
    "gan": ("clip", "image_embed_norm"),
    "dalle": ("image_tokenizer", "tokenizer"),
}


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

    def manifest(self, *needs: str) -> dict[str, Any]:
        """What is known of a finished run; `needs` are keys that the caller cannot do without.

        Raises:
            UserError: this is no finished run, one of another layout, or manifest.json is damaged.
        """
        if not self.finished:
            raise UserError(
                f"{self.path} holds no finished run (no manifest.json); train it, or give another path"
            )
        path = self.path / "manifest.json"
        content = read_json(path, dict, ADVICE)
        found = migrated(content, MIGRATIONS) if "schema" in content else content
        if found is None:
            layout = shown(content["schema"])
            raise UserError(
                f"{self.path} was written with layout {layout}, this version reads {SCHEMA}; train it again"
            )
        manifest: dict[str, Any] = dict(shaped(found, Manifest, path, ADVICE))
        for key in needs:
            if key not in manifest:
                raise UserError(f"{path} is damaged ({key} is missing); {ADVICE}")
        return manifest

    def config(self, *needs: str) -> dict[str, Any]:
        """The resolved configuration it was trained with; `needs` as in `manifest`.

        Raises:
            UserError: config.yaml is missing or damaged.
        """
        config: dict[str, Any] = renamed(dict(read_yaml(self.path / "config.yaml", RunConfig, ADVICE)))
        for need in needs:
            inner: Any = config
            for key in need.split("."):
                inner = inner.get(key) if isinstance(inner, dict) else None
            if inner is None:
                raise UserError(f"{self.path / 'config.yaml'} is damaged ({need} is missing); {ADVICE}")
        return config

    def source(self) -> dict[str, Any] | None:
        """The source of pictures that it was trained on, as its configuration describes it; None of weights
        that were imported (`dalle.weights`).
        """
        if "origin" in self.config():
            return None
        return self.config("datamodule.source")["datamodule"]["source"]

    def metric_rows(self) -> list[dict[str, str]]:
        """The rows of metrics.csv as they were written, without empty cells; none where it is missing.

        Raises:
            UserError: a row is no row of numbers.
        """
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        advice, rows = "restore the file, or take out that line", list[dict[str, str]]()
        reader = csv.DictReader(io.StringIO(read_text(path, advice, LONGEST), newline=""), strict=True)
        try:
            if reader.fieldnames is None or "step" not in reader.fieldnames:
                raise ValueError("there is no column step")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError("it has more or fewer cells than the first line")
                if int(row["step"]) < 0:
                    raise ValueError("its step is below 0")
                rows.append({name: value for name, value in row.items() if value})
                for value in rows[-1].values():
                    float(value)
        except (ValueError, TypeError, csv.Error) as error:
            line = reader.line_num + isinstance(error, csv.Error)
            raise UserError(f"{path} is damaged in line {line} ({str(error)[:200]}); {advice}") from None
        return rows

    def metrics(self) -> dict[str, dict[int, float]]:
        """The columns of metrics.csv: for each metric its values by step. Raises as `metric_rows`."""
        columns: dict[str, dict[int, float]] = {}
        for row in self.metric_rows():
            step = int(row.pop("step"))
            for name, value in row.items():
                columns.setdefault(name, {})[step] = float(value)
        return columns

    def save(self, state: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]) -> None:
        """Writes a network's weights and then the manifest, which makes the run a finished one.

        Raises:
            UserError: the weights are no numbers; nothing is written.
        """
        weights = apart({k: v.detach().cpu().contiguous() for k, v in state.items()})
        check_finite(weights, self.path / "model.safetensors", "they are not saved")
        with atomic_path(self.path / "model.safetensors") as hidden:
            save_file(weights, hidden)
        facts = {"schema": SCHEMA, "weights": tensors_hash(weights), **manifest}
        write_json(self.path / "manifest.json", facts)

    def load_tokenizer(self) -> TextTokenizer:
        """The run's text tokenizer. Raises UserError when it cannot be read."""
        return load_tokenizer(self.tokenizer)

    def load_tokenizer_of(self, network: str, length: int, vocab_size: int) -> TextTokenizer:
        """The text tokenizer of the run's network, which reads `length` ids of `vocab_size`."""
        tokenizer = self.load_tokenizer()
        if tokenizer.context_length != length or tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{self.tokenizer} does not fit the {network} beside it, which reads {length} tokens of "
                f"{vocab_size}; {ADVICE}"
            )
        known = (self.manifest().get("tokenizer") or {}).get("hash")
        if known and state_hash(read_json(self.tokenizer, dict, ADVICE)) != known:
            raise UserError(f"{self.tokenizer} is another one than the {network} was trained with; {ADVICE}")
        return tokenizer

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained network's weights.

        Raises:
            UserError: they cannot be read, are no numbers, or are others than the manifest says.
        """
        path, expected = self.path / "model.safetensors", self.manifest().get("weights")
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); {ADVICE}") from None
        check_finite(weights, path, "train the stage again")
        if expected is not None and (found := tensors_hash(weights)) != expected:
            raise UserError(
                f"{path} holds other weights ({found}) than its manifest.json says ({expected}); {ADVICE}"
            )
        return weights


def apart(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights; those that lie in the memory of others (tied ones) in memory of their own, as
    safetensors wants them.
    """
    found, taken = dict[str, torch.Tensor](), set[int]()
    for name, value in weights.items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in taken else value
        taken.add(place)
    return found


def load_stage(path: str | Path, *expected: str) -> tuple[Stage, dict[str, Any]]:
    """A finished run's stage with its weights, in eval mode on the CPU, and its manifest.

    Raises:
        UserError: no finished run there, none of the `expected` kinds of stage (if any are named), or weights
            that do not fit.
    """
    run = Run(Path(path))
    manifest = run.manifest()
    if expected and (found := manifest.get("stage")) not in expected:
        article = "an" if expected[0][0] in "aeiou" else "a"
        raise UserError(f"{path} holds a {found}, but {article} {' or '.join(expected)} is needed here")
    run.manifest(*NEEDS.get(manifest.get("stage", ""), ()))
    stage = build_stage(run)
    home, _, own = type(stage).__module__.rpartition(".")
    if home == "dalle.stages" and own != manifest.get("stage", own):
        raise UserError(
            f"{run.path}: config.yaml describes a {own}, manifest.json a {manifest['stage']}; {ADVICE}"
        )
    try:
        stage.net.load_state_dict(as_today(run.weights(), stage.net), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{run.path}: model.safetensors does not fit config.yaml: {reason}") from None
    if "image_embed_norm" in manifest:
        stage.norm = EmbedNorm.from_dict(manifest["image_embed_norm"])
        if not stage.norm.fits(stage.net.embed_dim):
            raise UserError(f"{run.path / 'manifest.json'} is damaged (image_embed_norm); {ADVICE}")
    return stage.eval().requires_grad_(False), manifest


def build_stage(run: Run) -> Any:
    """The stage that a run's config.yaml describes; it may be anybody's and name listed classes only."""
    node, where = run.config()["model"], f"{run.path / 'config.yaml'}: model"
    try:
        stage = instantiate({**node, "optimizer": None}, where, listed)
    except UserError:
        raise
    except Exception as error:  # whatever networks raise for sizes that nobody has trained
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{where} cannot be built ({reason}); {ADVICE}") from error
    if not isinstance(stage, Stage):
        raise UserError(f"{where} is no stage but a {type(stage).__name__}; {ADVICE}")
    if not isinstance(getattr(stage, "net", None), torch.nn.Module):  # of a denoiser that is none, as one
        raise UserError(f"{where} describes a stage without a network; {ADVICE}")
    return stage


def check_usable(path: str | Path) -> None:
    """Raises UserError for a run that could not be used: everything of it is built and loaded once."""
    stage, manifest = load_stage(path)
    net, kind = stage.net, manifest.get("stage")
    if kind == "clip":
        Run(Path(path)).load_tokenizer_of("CLIP", net.context_length, net.vocab_size)
    elif kind == "dalle":
        Run(Path(path)).load_tokenizer_of("DALL-E", net.text_length, net.text_vocab)


def load_clip(path: Place, bf16: bool = False) -> FrozenCLIP:
    """The CLIP of a finished `model=clip` run, frozen, with its tokenizer."""
    stage, _ = load_stage(path, "clip")
    run = Run(Path(path))
    net = stage.net
    return FrozenCLIP(net, run.load_tokenizer_of("CLIP", net.context_length, net.vocab_size), bf16)


def load_image_tokenizer(path: Place, bf16: bool = False) -> FrozenTokenizer:
    """The network of a finished `model=dvae` or `model=vqgan` run, frozen."""
    stage, _ = load_stage(path, *IMAGE_TOKENIZERS)
    return FrozenTokenizer(stage.net, bf16)
