"""What a run leaves behind is either whole or not there, and is refused in words when it is neither."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dalle import run_dir
from dalle.data.frozen import weights_hash
from dalle.errors import UserError
from dalle.files import hidden_name, write_text
from dalle.pipelines.load import load_dalle
from dalle.run_dir import Run, load_clip, load_stage


@pytest.fixture
def run(untrained_stages, tmp_path) -> Run:
    """A finished prior of its own."""
    shutil.copytree(untrained_stages / "default" / "prior", tmp_path / "prior")
    return Run(tmp_path / "prior")


def test_nothing_is_no_run(tmp_path):
    run = Run(tmp_path / "nowhere")
    assert not run.finished
    assert not run.occupied
    with pytest.raises(
        UserError, match=r"nowhere holds no finished run \(no manifest.json\); train it, or give"
    ):
        run.manifest()


@pytest.mark.parametrize("name", ["last.ckpt", "config.yaml", "metrics.csv"])
def test_what_has_begun_is_occupied_but_not_finished(tmp_path, name):
    (tmp_path / name).touch()
    assert Run(tmp_path).occupied
    assert not Run(tmp_path).finished


def test_samples_and_tokenizers_alone_do_not_occupy(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "tokenizer.json").touch()
    assert not Run(tmp_path).occupied


def test_save_and_read_back(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4))
    run = Run(tmp_path)
    run.save(net.state_dict(), {"stage": "decoder", "text": "grün"})
    assert run.finished
    weights = run.weights()
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in net.state_dict().items())
    assert run.manifest() == {"schema": 1, "weights": weights_hash(net), "stage": "decoder", "text": "grün"}
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "model.safetensors"]


def fail(*args, **kwargs):
    raise OSError("No space left on device")


@pytest.mark.parametrize("where", ["save_file", "tensors_hash", "write_json"])
def test_a_save_that_fails_leaves_no_finished_run(tmp_path, monkeypatch, where):
    monkeypatch.setattr(run_dir, where, fail)
    with pytest.raises(OSError, match="No space"):
        Run(tmp_path).save(nn.Linear(2, 2).state_dict(), {"stage": "prior"})
    assert not Run(tmp_path).finished
    assert not (tmp_path / "manifest.json").exists()


def test_tied_weights_are_saved(tmp_path):
    """A network of one's own may have them: it must not end without its weights after days of training."""
    net = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    net["head"].weight = net["embed"].weight
    run = Run(tmp_path)
    run.save({**net.state_dict(), "part": net["embed"].weight[:2]}, {"stage": "prior"})
    saved = run.weights()
    assert torch.equal(saved["head.weight"], saved["embed.weight"])
    assert torch.equal(saved["part"], saved["embed.weight"][:2])


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "manifest.json"
    write_text(path, "old")
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, text, **kw: [write(self, text[:2], **kw), fail()])
    with pytest.raises(OSError, match="No space"):
        write_text(path, "a longer new text")
    assert path.read_text() == "old"


def test_weights_half_written_beside_do_not_count(run):
    (run.path / "manifest.json").unlink()
    hidden_name(run.path / "model.safetensors").write_bytes(b"half")
    assert not run.finished
    with pytest.raises(UserError, match="no finished run"):
        load_stage(run.path)


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder"])
def test_stages_come_back_with_their_weights(untrained_stages, stage):
    path = untrained_stages / "default" / stage
    loaded, manifest = load_stage(path, stage)
    saved = load_file(path / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in loaded.net.state_dict().items())
    assert weights_hash(loaded.net) == manifest["weights"]
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    if stage == "prior":
        assert loaded.norm.to_dict() == manifest["image_embed_norm"]


def test_clip_comes_back_with_its_tokenizer(untrained_stages):
    path = untrained_stages / "default" / "clip"
    clip = load_clip(path)
    assert clip.tokenizer.to_dict() == json.loads((path / "tokenizer.json").read_text())
    assert clip.weights_hash == Run(path).manifest()["weights"]


def damage(run: Run, name: str, content: bytes | None = None) -> None:
    path = run.path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "model.safetensors",
            None,
            r"model.safetensors cannot be read .*; restore it or train the stage again",
        ),
        ("model.safetensors", b"", "model.safetensors cannot be read"),
        ("manifest.json", None, r"manifest.json cannot be read .*; restore it"),
        ("manifest.json", b"[]", "manifest.json is damaged"),
        (
            "manifest.json",
            b'{"schema": 99, "stage": "prior"}',
            "written with layout 99, this version reads 1",
        ),
        ("manifest.json", b'{"schema": 1}', "holds a None, but a prior is needed here"),
        ("config.yaml", b"a: [", "config.yaml cannot be read"),
        ("config.yaml", b"", "config.yaml is damaged"),
    ],
)
def test_damage_is_named(run, name, content, message):
    damage(run, name, content)
    with pytest.raises(UserError, match=message):
        load_stage(run.path, "prior")


def test_a_missing_config_is_named(run):
    (run.path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config.yaml cannot be read .*No such file"):
        load_stage(run.path)


@pytest.mark.parametrize("content", [None, b"{}", b'{"kind": "captions"}', b'{"kind": "other"}'])
def test_a_damaged_tokenizer_is_named(untrained_stages, tmp_path, content):
    shutil.copytree(untrained_stages / "default" / "clip", tmp_path / "clip")
    damage(Run(tmp_path / "clip"), "tokenizer.json", content)
    with pytest.raises(UserError, match="tokenizer"):
        load_clip(tmp_path / "clip")


def test_another_stage_than_expected(run):
    with pytest.raises(UserError, match=r"prior holds a prior, but a clip is needed here"):
        load_clip(run.path)


def test_weights_of_another_size(run):
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("depth: 1", "depth: 2"))
    with pytest.raises(UserError, match=r"model.safetensors does not fit config.yaml: \S+"):
        load_stage(run.path)


def test_a_config_that_names_foreign_code_is_refused(run):
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("dalle.stages.prior.PriorStage", "os.system"))
    with pytest.raises(UserError, match=r"'os.system' .* refusing to use it"):
        load_stage(run.path)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (5, r"tokenizer\.json does not fit the \S+ beside it"),
        (10**30, r"tokenizer\.json is damaged \(context_length"),
        (2**40, r"tokenizer\.json is damaged \(context_length"),
    ],
)
@pytest.mark.parametrize(("stage", "load"), [("clip", load_clip), ("dalle", load_dalle)])
def test_a_tokenizer_of_another_network_is_refused(untrained_stages, tmp_path, stage, load, length, message):
    logs = Path(shutil.copytree(untrained_stages / "default", tmp_path / "default"))
    tokenizer = logs / stage / "tokenizer.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "context_length": length}))
    with pytest.raises(UserError, match=message):
        load(logs / stage)


@pytest.mark.parametrize(("stage", "load"), [("clip", load_clip), ("dalle", load_dalle)])
def test_another_tokenizer_of_the_same_sizes_is_refused(untrained_stages, tmp_path, stage, load):
    logs = Path(shutil.copytree(untrained_stages / "default", tmp_path / "default"))
    tokenizer = logs / stage / "tokenizer.json"
    facts = json.loads(tokenizer.read_text())
    bpe = json.loads(facts["bpe"])
    words = bpe["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    tokenizer.write_text(json.dumps({**facts, "bpe": json.dumps(bpe)}))
    with pytest.raises(UserError, match=r"\A\S+tokenizer\.json is another one than the \S+ was trained with"):
        load(logs / stage)


def test_a_tokenizer_whose_ids_are_not_its_own_is_refused(untrained_stages, tmp_path):
    run = Run(shutil.copytree(untrained_stages / "default" / "clip", tmp_path / "clip"))
    facts = json.loads(run.tokenizer.read_text())
    bpe = json.loads(facts["bpe"])
    bpe["model"]["vocab"]["a"] = 2**31
    run.tokenizer.write_text(json.dumps({**facts, "bpe": json.dumps(bpe)}))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        load_clip(run.path)


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("prior", ("clip", "embed_dim")),
        ("dalle", ("image_tokenizer", "vocab_size")),
        ("dalle", ("image_tokenizer", "grid")),
        ("dalle", ("tokenizer", "context_length")),
        ("dalle", ("tokenizer", "vocab_size")),
    ],
)
def test_sizes_that_nothing_has_are_damage(untrained_stages, tmp_path, stage, place):
    run = Run(shutil.copytree(untrained_stages / "default" / stage, tmp_path / stage))
    facts = json.loads((run.path / "manifest.json").read_text())
    facts[place[0]][place[1]] = 10**30
    (run.path / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=rf"manifest\.json is damaged \({'.'.join(place)}"):
        load_stage(run.path)
