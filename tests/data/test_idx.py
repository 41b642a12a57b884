"""idx files of MNIST: what torchvision reads, packed or not; anything else is one line."""

import gzip
import struct

import pytest
import torch
from formats import captions, idx
from torchvision.datasets.mnist import read_image_file

from dalle.data.folder import Folder
from dalle.data.idx import Idx
from dalle.data.sources import Source
from dalle.errors import UserError

NONE = {"val_fraction": 0.0}


@pytest.mark.parametrize("pack", [False, True])
def test_pictures_labels_and_splits(tmp_path, pack):
    source, test = (
        Idx(split, idx(tmp_path / "MNIST" / "raw", pack), 28, **NONE) for split in ("train", "test")
    )
    assert isinstance(source, Source)
    assert captions(source) == {f"train/{k}": [f"a photo of a {k % 3}"] for k in range(12)}
    assert test.names == [f"test/{k}" for k in range(4)]
    assert source.has_classes
    unpacked = read_image_file(str(idx(tmp_path / "plain", pack=False) / "train-images-idx3-ubyte"))
    levels = ((source.images([3, 7]) + 1) * 127.5).round().to(torch.uint8)
    assert levels.equal(unpacked[[3, 7], None].expand(2, 3, 28, 28))


def test_classes_have_names(tmp_path):
    source = Idx("train", idx(tmp_path), 28, classes=["ankle boot", "shirt", "bag"], template="a {}", **NONE)
    assert [source.captions(i) for i in range(3)] == [["an ankle boot"], ["a shirt"], ["a bag"]]
    with pytest.raises(UserError, match=r"data.classes names 1 classes, but there are labels up to 2"):
        Idx("train", tmp_path, 28, classes=["shirt"])


def head(*shape, kind=8):
    return struct.pack(f">4B{len(shape)}I", 0, 0, kind, len(shape), *shape)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", head(12, 28, 28) + b"x", "cut short: 1 of 9408 bytes"),
        ("train-images-idx3-ubyte", head(12, 28, 28, kind=13), "no idx file of bytes"),
        ("train-images-idx3-ubyte", b"\x89PNG", "no idx file of bytes"),
        ("train-images-idx3-ubyte", head(12, 28, 28)[:9], "no idx file with anything in it"),
        ("train-images-idx3-ubyte", head(2**31, 2**31, 4), "no idx file with anything in it"),
        ("train-images-idx3-ubyte", head(4, 4, 4) + bytes(64), "12.* labels of 4 pictures"),
        ("train-images-idx3-ubyte", head(4, 4) + bytes(16), "holds no pictures"),
        ("train-labels-idx1-ubyte", gzip.compress(b"x", mtime=0), "no idx file of bytes"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    (idx(tmp_path, pack=False) / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Idx("train", tmp_path, 28)


def test_a_bomb_is_not_unpacked(tmp_path):
    """More than the head says is never read."""
    idx(tmp_path, pack=False)
    path = tmp_path / "train-images-idx3-ubyte"
    content = path.read_bytes()
    path.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content + bytes(10**7)))
    assert len(Idx("train", tmp_path, 28, **NONE)) == 12


def test_folders_without_them(tmp_path):
    for root, message in ((tmp_path, "holds no idx files"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=message):
            Idx("train", root, 28)
    (idx(tmp_path) / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="is there, but not the file of its labels"):
        Idx("train", tmp_path, 28)


def test_data_folder_points_here(tmp_path):
    with pytest.raises(UserError, match=r"4 idx files, which data=idx data.root=.* reads"):
        Folder("train", idx(tmp_path), 8)
