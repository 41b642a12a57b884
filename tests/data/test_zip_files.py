"""A zip file is read as a folder is, and nothing in it can harm."""

import pickle
import stat
import zipfile

import pytest
import torch
from formats import WHOLE, captions, picture, zipped
from torch.utils.data import DataLoader

from dalle.data.folder import Folder
from dalle.data.imagefolder import ImageFolder
from dalle.data.sources import SourceDataset, identity_collate
from dalle.errors import UserError


def read(path, **options):
    return Folder("train", path, 8, **WHOLE | options)


def test_it_is_what_the_unpacked_folder_is(tmp_path):
    path = zipped(tmp_path / "a.zip")
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "unpacked")
    source, unpacked = read(path), read(tmp_path / "unpacked")
    assert captions(source) == captions(unpacked) == {f"set/{k}.png": [f"thing {k}"] for k in range(8)}
    assert source.fingerprint() == unpacked.fingerprint()
    assert source.images(range(8)).equal(unpacked.images(range(8)))
    assert pickle.loads(pickle.dumps(source)).images([1]).equal(unpacked.images([1]))  # a spawned worker


def test_tables_and_class_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for k in range(2):
            file.write(picture(tmp_path / f"{k}.png", k), f"pictures/cats/{k}.png")
        file.writestr("pictures/metadata.csv", "file_name,text\ncats/0.png,one\ncats/1.png,two\n")
        file.writestr("other.tsv", "image\tcaption\npictures/cats/0.png\tanother\n")
        file.writestr("__MACOSX/pictures/cats/._0.png", b"x")
    assert list(captions(read(tmp_path / "a.zip")).values()) == [["one"], ["two"]]
    with pytest.warns(UserWarning, match="1 without a readable caption"):
        assert list(captions(read(tmp_path / "a.zip", captions="other.tsv")).values()) == [["another"]]
    assert ImageFolder("train", tmp_path / "a.zip", 8).captions(0) == ["a photo of a cats"]


def test_what_could_harm_is_left_out_and_named(tmp_path):
    path = zipped(tmp_path / "a.zip")
    link = zipfile.ZipInfo("set/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../outside.png", b"x")
        file.writestr("/etc/outside.png", b"x")
        file.writestr("set/bomb.png", bytes(20_000_000))
        file.writestr(link, "/etc/passwd")
    with pytest.warns(UserWarning, match="Left out") as said:
        assert len(read(path)) == 8
    line = str(said[0].message)
    assert "2 named as if outside of the archive (../outside.png, /etc/outside.png)" in line
    assert "1 packed more than 200 times smaller" in line
    assert "1 no regular files (set/link.png)" in line
    assert not (tmp_path.parent / "outside.png").exists()


def test_damaged_members_are_named(tmp_path):
    path = zipped(tmp_path / "a.zip")
    with zipfile.ZipFile(path) as file:
        place = file.getinfo("set/3.png").header_offset + 200
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"1 not readable \(damaged in the archive\) \(set/3.png\)"):
        assert len(read(path)) == 7


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\3\4 cut short"])
def test_a_file_that_is_none_is_one_line(tmp_path, content):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a whole zip file"):
        read(path)


def test_workers_see_the_same_pictures(tmp_path):
    """Each has the file opened by itself: the place in a shared one would move under them."""
    source = read(zipped(tmp_path / "a.zip", 12))
    loader = DataLoader(
        SourceDataset(source), batch_sampler=[[3 * k, 3 * k + 1, 3 * k + 2] for k in range(4)], num_workers=2,
        collate_fn=identity_collate, multiprocessing_context="fork",
    )  # fmt: skip
    assert torch.cat([batch["image"] for batch in loader]).equal(source.pixels(range(12)))
