"""Files of weights: what is in them is read, and nothing in them is run."""

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalle.errors import UserError
from dalle.weights.reading import read_weights


class Bomb:
    """A pickle that runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Own(nn.Module):
    """A network of a class that no reader knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(OrderedDict(first=nn.Linear(3, 2), norm=nn.BatchNorm1d(2)))
        self.scale = nn.Parameter(torch.rand(4)[::2])  # a view of its storage


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickled_network(tmp_path, new, wrapped):
    net, place = Own(), tmp_path / "net.pkl"
    content = {"model": net, "epoch": 3, "callbacks": {Own: Bomb(tmp_path / "RAN")}} if wrapped else net
    torch.save(content, place, _use_new_zipfile_serialization=new)
    found = read_weights(place).tensors
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())
    assert not (tmp_path / "RAN").exists()


def test_a_bomb_is_no_weights(tmp_path):
    torch.save(Bomb(tmp_path / "RAN"), tmp_path / "a.pt")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "RAN")))
    for name in ("a.pt", "b.pkl"):
        with pytest.raises(UserError, match="holds no weights"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(2, 2).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
        torch.empty(2, device="meta"),
        torch.zeros(1).expand(4),
    ],
    ids=["sparse", "quantized", "meta", "expanded"],
)
def test_a_tensor_that_is_no_plain_one(tmp_path, odd):
    torch.save({"a": odd}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt holds no weights that can be read \("):
        read_weights(tmp_path / "a.pt")


def test_an_archive_that_stands_for_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2**25)}, tmp_path / "plain.pt")
    with ZipFile(tmp_path / "plain.pt") as plain, ZipFile(tmp_path / "a.pt", "w", ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    assert read_weights(tmp_path / "plain.pt").tensors.keys() == {"a"}
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it is being unpacked"))
    with pytest.raises(UserError, match=r"a\.pt holds no weights .*0\.1 GiB are packed in it"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system knows no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is not there, or no file"):
        read_weights(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds none of"):
        read_weights(tmp_path)


def test_a_folder_in_parts(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_weights(tmp_path)
    assert found.tensors.keys() == {"a", "b"}
    assert len(found.files) == 2
    index["weight_map"]["a"] = "../elsewhere"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="weight_map names no files beside it"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "old.pt"])
def test_damaged_files_end_in_one_line(tmp_path, name):
    weights, place = {"a": torch.rand(200), "b": torch.rand(3)}, tmp_path / name
    if name == "w.safetensors":
        save_file(weights, place)
    else:
        torch.save(weights, place, _use_new_zipfile_serialization=name == "w.pt")
    whole = place.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        place.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"\A[^\n]+\Z"):
            read_weights(place)


def test_a_bare_number_is_no_reason(tmp_path):
    """A pickle that asks for what was never stored: all that its error says is the number."""
    (tmp_path / "w.pt").write_bytes(b"\x80\x02h\x65.")
    with pytest.raises(UserError, match=r"can be read \(KeyError 101\)"):
        read_weights(tmp_path / "w.pt")


def test_a_bomb_of_references_ends_in_one_line(tmp_path):
    content: dict = {"a": torch.zeros(1)}
    for _ in range(40):  # a few hundred bytes that stand for 2^40 tensors
        content = {"a": content, "b": content}
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match="stands for more"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("path", ["nothing", "", "text.json"])
def test_what_holds_no_weights(tmp_path, path):
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(UserError, match=r"\A[^\n]+\Z"):
        read_weights(tmp_path / path)
