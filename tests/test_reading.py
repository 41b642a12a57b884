"""Files that are not what they should be: one line with the file's name, whoever reads it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dalle import schemas
from dalle.data.caption_tables import Columns, NotATable, read_table
from dalle.data.embedding_cache import read_meta
from dalle.data.encoded import Rows
from dalle.data.frozen import tensors_hash
from dalle.data.guess import guesses
from dalle.data.hf import files_of
from dalle.data.text import read_text as read_words
from dalle.data.tokenizers import load_tokenizer
from dalle.errors import UserError
from dalle.evaluation.results import Result
from dalle.launch.sweeps import read as read_job
from dalle.metrics.perceptual import LPIPS
from dalle.pipelines.load import load_unclip
from dalle.pipelines.recipe import SampleRecipe
from dalle.reading import LARGEST, LARGEST_YAML, migrated, read_json, read_yaml, shaped
from dalle.run_dir import Run, load_clip, load_stage
from dalle.training.checks import build_stage

DEEP = 100_000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 10)}]}}\n" for i in range(20)
)
DAMAGE: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "blank": b" \n\n",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "binary": bytes(range(256)) * 4,
    "not UTF-8": b'{"schema": 1, "stage": "\xe9"}',
    "half": b'{"schema": 1, "model": {"_target_": "da',
    "deep": b"[" * DEEP + b"]" * DEEP,
    "deep mappings": b'{"a":' * 300 + b"1" + b"}" * 300,
    "no text": b'{"schema": 1, "model": {"_target_": "\\ud800"}}',
    "a tag": b"!!python/object/apply:os.system [touch RAN]",
    "a bomb": BOMB.encode(),
    "a bomb of merges": MERGES.encode(),
    "itself": b"&a [*a]",
    "itself in a mapping": b"model: &a {_target_: x, more: *a}\nschema: 1\n",
    "a date": b"{schema: 2020-01-01, model: 2020-01-01}",
    "names that are none": b"1: 2\nmodel: {_target_: x, 3: 4}\n",
    "keys that are lists": b"? [a]\n: b\n",
    "long number": b"9" * 5000,
    "archive": b"PK\x03\x04" + b"\0" * 100,
}


def result(path: Path) -> Any:
    return Result.read(path.parent)


READERS: dict[str, Callable[[Path], Any]] = {
    "manifest.json": lambda path: Run(path.parent).manifest("stage"),
    "config.yaml": lambda path: Run(path.parent).config("stage"),
    "tokenizer.json": load_tokenizer,
    "result.json": result,
    "recipe.yaml": SampleRecipe.read,
    "gate.json": lambda path: read_json(path, schemas.Gate, "record it anew"),
    "job.json": lambda path: read_json(path, schemas.Job, "delete it"),
}


def one_line(attempt: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as error:
        attempt()
    said = str(error.value)
    assert all(word in said for word in words), said
    assert "\n" not in said
    assert len(said) < 700


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", READERS)
def test_damage_is_one_line(tmp_path, monkeypatch, name, damage):
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "some" / name, DAMAGE[damage]
    path.parent.mkdir()
    (path.parent / "model.safetensors").touch()
    if content is not None:
        path.write_bytes(content)
    one_line(lambda: READERS[name](path), name)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_one_line(tmp_path, name):
    """A folder, a pipe (reading it would never end), a device without an end, a file of gigabytes."""
    path = tmp_path / name
    (tmp_path / "model.safetensors").touch()
    path.mkdir()
    one_line(lambda: READERS[name](path))
    path.rmdir()
    os.mkfifo(path)
    one_line(lambda: READERS[name](path))
    path.unlink()
    path.symlink_to("/dev/zero")
    one_line(lambda: READERS[name](path))
    path.unlink()
    path.symlink_to(path)
    one_line(lambda: READERS[name](path))
    path.unlink()
    path.touch()
    os.truncate(path, (LARGEST_YAML if path.suffix == ".yaml" else LARGEST) + 1)
    one_line(lambda: READERS[name](path), name, "MB are more than any such file has")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip", 5), ("clip", {}), ("clip", {"weights": "a", "embed_dim": 0}), ("tokenizer", []),
        ("tokenizer", {"hash": 3}), ("image_embed_norm", {"kind": "odd"}), ("image_embed_norm", "unit"),
        ("image_size", "16"), ("image_size", -1), ("image_size", 10**30), ("image_size", True),
        ("steps", 1.5), ("steps", -1), ("parameters", None), ("seconds_training", "long"), ("data", 3),
        ("data", {"source": "Shapes", "fingerprint": 3, "items": {}}), ("metrics", [1]),
        ("metrics", {"a": "b"}), ("stage", ["decoder"]), ("weights", 0), ("schema", "1"),
        ("versions", {"torch": 2}), ("image_tokenizer", {"weights": "a"}),
    ],
)  # fmt: skip
def test_facts_of_a_wrong_type(untrained_stages, tmp_path, key, value):
    shutil.copytree(untrained_stages / "default" / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    one_line(lambda: load_stage(path.parent), "manifest.json" if key != "schema" else "layout")


@pytest.mark.parametrize("key", ["image_embed_norm", "clip"])
def test_facts_that_are_missing(untrained_stages, tmp_path, key):
    shutil.copytree(untrained_stages / "default", tmp_path / "default")
    path = tmp_path / "default" / "decoder" / "manifest.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    one_line(lambda: load_unclip(path.parent), f"manifest.json is damaged ({key} is missing); restore it")


def test_a_norm_of_another_width(untrained_stages, tmp_path):
    shutil.copytree(untrained_stages / "default" / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "manifest.json"
    for norm in ({"mean": [0.0] * 3, "std": [1.0] * 3}, {"mean": [0.0] * 8}, {}):
        content = json.loads(path.read_text()) | {"image_embed_norm": {"kind": "standardized", **norm}}
        path.write_text(json.dumps(content))
        one_line(lambda: load_stage(path.parent), "manifest.json is damaged (image_embed_norm)")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": 5}, "config.yaml is damaged (model must be a mapping, got 5)"),
        ({"model": {"net": {}}}, "config.yaml is damaged (model._target_ is missing)"),
        ({"model": {"_target_": "dalle.nets.prior.Prior"}}, "config.yaml: model"),
        ({"model": {"_target_": "torch.nn.Identity"}}, "config.yaml: model is no stage but a Identity"),
        ({"clip": 5}, "config.yaml is damaged (clip must be a mapping, got 5)"),
        ({"clip": None}, "config.yaml: clip does not say where the clip is"),
        ({"clip": {"_target_": "dalle.run_dir.load_clip"}},
         "config.yaml: clip does not say where the clip is"),
        ({"clip": {"_target_": "torch.nn.Identity"}}, "config.yaml: clip is no CLIP"),
    ],
)  # fmt: skip
def test_a_config_that_describes_something_else(untrained_stages, tmp_path, change, line):
    shutil.copytree(untrained_stages / "default", tmp_path / "default")
    path = tmp_path / "default" / "decoder" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    one_line(lambda: load_unclip(path.parent), line)


def test_a_stage_without_a_network(untrained_stages, tmp_path):
    """A denoiser may be anything that can be called; what is none has no network to load."""
    shutil.copytree(untrained_stages / "default" / "decoder", tmp_path / "decoder")
    path = tmp_path / "decoder" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["denoiser"] = {"_target_": "torch.nn.Identity"}
    path.write_text(yaml.safe_dump(config))
    one_line(lambda: load_stage(path.parent), "config.yaml: model describes a stage without a network")
    with pytest.raises(UserError, match="model describes a stage without a network"):
        build_stage(config["model"])


def test_a_manifest_of_another_stage(untrained_stages, tmp_path):
    shutil.copytree(untrained_stages / "default" / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stage": "clip"}))
    one_line(lambda: load_clip(path.parent), "config.yaml describes a prior, manifest.json a clip")


def test_a_network_that_cannot_be_is_one_line(untrained_stages, tmp_path):
    shutil.copytree(untrained_stages / "default" / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["net"]["width"] = 0
    path.write_text(yaml.safe_dump(config))
    one_line(lambda: load_stage(path.parent), "config.yaml: model")


def test_other_weights_and_weights_that_are_no_numbers(untrained_stages, tmp_path):
    shutil.copytree(untrained_stages / "default" / "prior", tmp_path / "prior")
    path, manifest = tmp_path / "prior" / "model.safetensors", tmp_path / "prior" / "manifest.json"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, path)
    one_line(lambda: load_stage(path.parent), "model.safetensors holds other weights", "manifest.json")
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, path)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"weights": tensors_hash(weights)}))
    one_line(lambda: load_stage(path.parent), f"model.safetensors holds weights that are no numbers ({name})")


@pytest.mark.parametrize(
    "state",
    [
        {"kind": "captions", "context_length": 16}, {"kind": "captions", "context_length": 16, "bpe": "x"},
        {"kind": "captions", "context_length": 16, "bpe": "{}"}, {"kind": "captions", "bpe": "{}"},
        {"kind": "captions", "context_length": "16", "bpe": "{}"}, {"kind": "other"}, {},
        {"kind": "captions", "context_length": 0, "bpe": "{}"}, {"kind": ["captions"]},
    ],
)  # fmt: skip
def test_tokenizers(tmp_path, state):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state))
    one_line(lambda: load_tokenizer(path), "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "line 0"), (b"a,b\n1,2\n", "there is no column step"), (b"step,a\n1,abc\n", "line 2"),
        (b"step,a\nx,1\n", "line 2"), (b"step,a\n1,2\n2\n", "line 3"), (b"step,a\n1,2,3\n", "line 2"),
        (b"step,a\n,2\n", "line 2"), (b"step,a\n1,\xe9\n", "cannot be read"), (b"\x00\x01\x02", "damaged"),
        (b"step,a\n1," + b"x" * 200_000 + b"\n", "line 2"), (b"step,a\n1e3,2\n", "line 2"),
    ],
)  # fmt: skip
def test_metrics(tmp_path, content, line):
    (tmp_path / "metrics.csv").write_bytes(content)
    one_line(lambda: Run(tmp_path).metrics(), "metrics.csv", line)


def test_metrics_that_are_well(tmp_path):
    assert Run(tmp_path).metrics() == {}
    (tmp_path / "metrics.csv").write_text("step,a,b\n1,2,\n3,nan,4e-1\n")
    found = Run(tmp_path).metrics()
    assert (found["a"][1], found["b"]) == (2.0, {3: 0.4})
    assert found["a"][3] != found["a"][3]


def test_a_job_whose_notes_are_damaged_is_done_again(tmp_path):
    (tmp_path / "job.json").write_text('{"state": "odd"}')
    assert read_job(tmp_path / "job.json") == {}


def test_what_is_well_comes_as_it_is(tmp_path):
    (tmp_path / "a.json").write_text('{"schema": 1, "more": [1.5, null], "metrics": {"a": NaN, "b": 1e999}}')
    found = read_json(tmp_path / "a.json", schemas.Manifest, "")
    assert found == {"schema": 1, "more": [1.5, None], "metrics": {"a": None, "b": None}}
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfmodel: {_target_: x, lr: 1.0e-3}\nstage: dvae\n")
    assert read_yaml(tmp_path / "a.yaml", schemas.RunConfig, "")["stage"] == "dvae"
    with pytest.raises(UserError, match=r"^f is damaged \(schema is missing\); do that$"):
        shaped({}, schemas.Manifest, "f", "do that")


def test_a_file_of_an_earlier_schema_is_brought_up_to_date():
    steps = [lambda facts: {**facts, "b": 2}, lambda facts: {**facts, "c": facts["b"] + 1}]
    assert migrated({"schema": 1}, steps) == {"schema": 3, "b": 2, "c": 3}
    assert migrated({"schema": 2, "b": 5}, steps) == {"schema": 3, "b": 5, "c": 6}
    assert migrated({"schema": 3}, steps) == {"schema": 3}
    assert [migrated({"schema": odd}, steps) for odd in (0, 4, "1", True, None)] == [None] * 5


def test_a_manifest_of_a_later_schema_is_refused(tmp_path):
    for name, content in (("manifest.json", '{"schema": 99}'), ("model.safetensors", "")):
        (tmp_path / name).write_text(content)
    one_line(Run(tmp_path).manifest, "written with layout 99, this version reads 1")


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_json(path, dict, "delete it"),
        read_words,
        lambda path: guesses(str(path)),
        lambda path: Rows([path], np.array([0, 1]), (1,), "f"),
        lambda path: read_meta(path.parent, verify=True),
        lambda path: read_table(path, Columns(None, ()), lambda _: True),
        lambda path: files_of([str(path)], (".json",)),
        lambda path: files_of([str(path.parent)], (".json",)),
        LPIPS,
    ],
    ids=["json", "text", "guess", "encoded", "cache", "table", "hf", "hf folder", "lpips"],
)
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"]
)
def test_what_may_never_end_is_not_opened(tmp_path, make, read):
    make(tmp_path / "meta.json")
    with pytest.raises((UserError, OSError, NotATable), match=r"no file|cannot be read"):
        read(tmp_path / "meta.json")
