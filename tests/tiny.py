"""Stages small enough to train in a test: what the real configuration needs on top to become tiny."""

import csv
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from dalle.run_dir import Run
from dalle.training import fit

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SECONDS = 300  # far more than it takes: a hang shows as a failure

COMMON = (
    "trainer=cpu", "precision=fp32", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1",
    "data.size=32", "data.image_size=16", "batch_size=8", "datamodule.val_items=8", "datamodule.test_items=8",
    "sampler.steps=2", "optimizer.warmup=2",
)  # fmt: skip
NETS = {
    "clip": (
        "model.net.vision_width=16", "model.net.vision_layers=2",
        "model.net.embed_dim=8",
        "model.net.text_width=16", "model.net.text_layers=1", "model.net.text_heads=2",
    ),
    "prior": ("model.net.width=16", "model.net.depth=1", "model.net.heads=2"),
    "ar_prior": (
        "model.net.width=16", "model.net.depth=1", "model.net.heads=2", "datamodule.buckets=32",
        "model.net.waves=4",
    ),
    "decoder": (
        "model.net.width=16", "model.net.multipliers=[1,1]", "model.net.blocks=[1,1]",
        "model.net.attention=[4]", "model.net.head_dim=8", "model.net.condition_width=16",
        "callbacks.generation.items=4",
    ),
    "gan": (
        "model.net.width=16", "model.net.multipliers=[1,1]", "model.net.attention=[4]",
        "model.net.head_dim=8", "model.net.condition_width=16", "model.net.latent_dim=8",
        "model.discriminator.width=16", "model.discriminator.multipliers=[1,1]",
        "model.discriminator.features=16", "callbacks.generation.items=4",
    ),
    "vqgan": (
        "model.net.width=8", "model.net.code_dim=8", "model.net.vocab_size=32", "model.discriminator.width=8",
        "model.disc_start=1",
    ),
    "vae": ("model.net.width=8", "model.net.latent_dim=8", "callbacks.generation.items=4"),
    "upsampler": (
        "model.net.width=16", "model.net.multipliers=[1,1]", "callbacks.generation.items=4",
        "callbacks.upsampled.items=4",
    ),
    "dvae": ("model.net.width=16", "model.net.code_dim=16", "model.net.vocab_size=32"),
    "dalle": (
        "model.net.width=16", "model.net.depth=2", "model.net.heads=2", "callbacks.generation.items=4",
    ),
    "dit": (
        "model/net=dit", "model.net.width=16", "model.net.depth=1", "model.net.heads=2",
        "callbacks.generation.items=4",
    ),
}  # fmt: skip
PRESETS = {"vqvae": ("model.net.width=8", "model.net.code_dim=8")}  # of a stage that another preset has, too


def overrides(model: str, logs: Path, *more: str, net: bool = True) -> list[str]:
    """The command line of a tiny stage; `model` is a key of NETS or PRESETS; without `net` the preset's own
    network.
    """
    name = {"dit": "decoder"}.get(model, model)
    own = {**NETS, **PRESETS}[model] if net else ()
    return [f"model={name}", *COMMON, f"paths.logs='{logs}'", *own, *more]


def configure(model: str, logs: Path, *more: str, net: bool = True) -> dict[str, Any]:
    """The resolved configuration that `dalle train` would hand to `fit.train`."""
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(
            compose("train", overrides(model, logs, *more, net=net)), resolve=True
        )
    assert isinstance(config, dict)
    return config


def train(model: str, logs: Path, *more: str, steps: int = 2) -> Run:
    """Trains a tiny stage and gives its run directory."""
    config = configure(model, logs, f"trainer.max_steps={steps}", *more)
    fit.train(config)
    return Run(Path(config["paths"]["run"]))


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.path / "model.safetensors")


def column(run: Run, name: str) -> dict[int, float]:
    """A column of metrics.csv by step."""
    with (run.path / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def without_account(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """A machine on which nobody has ever logged in to W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home / "home" / name.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")


def wandb_records(run: Path, seconds: float = 60) -> list[Any]:
    """What an offline W&B run has on disk, as its protocol buffers; its own process writes that some time
    after the run has ended.

    A log of LevelDB's kind behind a head of 7 bytes: blocks of 32 KiB of pieces, each with a checksum (4
    bytes), its length (2) and its kind (1): 1 is a whole record, 2 its beginning, 3 its middle, 4 its end.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("run-*.wandb")
    for _ in range(10 * int(seconds)):
        log, found, at, begun = path.read_bytes(), [], 7, b""
        while at + 7 <= len(log):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            length, kind = struct.unpack("<4xHB", log[at : at + 7])
            begun += log[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                found.append(Record.FromString(begun))
                begun = b""
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(path)


def wandb_config(records: list[Any]) -> dict[str, Any]:
    """The configuration an offline W&B run ends with."""
    parts = [r.config if r.HasField("config") else r.run.config for r in records]
    return {item.key: json.loads(item.value_json) for part in parts for item in part.update}


def wandb_history(records: list[Any]) -> dict[str, Any]:
    """Everything an offline W&B run has logged under a name, the last value of each."""
    items = [item for record in records for item in record.history.item]
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def mistake(*overrides: str, primary: str = "train") -> Exception:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        try:
            OmegaConf.to_container(compose(primary, list(overrides)), resolve=True, throw_on_missing=True)
        except Exception as error:
            return error
    raise AssertionError(f"{overrides} is no mistake")
