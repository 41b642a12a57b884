"""What is known of pictures is kept between processes, and never believed too long."""

import os

import pytest
from formats import WHOLE, picture, write

from dalle.data import picture_index, pictures
from dalle.data.folder import Folder
from dalle.data.image_files import inspect


@pytest.fixture
def looked(monkeypatch, tmp_path):
    """The pictures that are looked at; the index is kept for the smallest collections."""
    seen = []

    def look(where, max_pixels):
        seen.append(where.name)
        return inspect(where, max_pixels)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(picture_index, "WORTH", 1)
    monkeypatch.setattr(pictures, "inspect", look)
    return seen


def read(root, looked):
    pictures.scan.cache_clear()  # as another process
    looked.clear()
    source = Folder("train", root, 8, **WHOLE)
    return source, list(looked)


def make(root, n=4):
    for k in range(n):
        picture(root / f"{k}.png", k)
        write(root / f"{k}.txt", f"thing {k}")
    return root


def test_a_second_process_looks_at_what_is_new(tmp_path, looked):
    root = make(tmp_path / "set")
    first, seen = read(root, looked)
    assert len(seen) == 4
    again, seen = read(root, looked)
    assert seen == []
    assert again.fingerprint() == first.fingerprint()
    picture(root / "1.png", 77)
    os.utime(root / "1.png", ns=(1, 1))
    picture(root / "9.png", 9)
    write(root / "9.txt", "thing 9")
    changed, seen = read(root, looked)
    assert seen == ["1.png", "9.png"]
    assert changed.fingerprint() != first.fingerprint()
    assert read(root, looked)[1] == []


def test_a_broken_picture_is_looked_at_each_time(tmp_path, looked):
    root = make(tmp_path / "set")
    (root / "2.png").write_bytes(b"no picture")
    for expected in (["0.png", "1.png", "2.png", "3.png"], ["2.png"]):
        with pytest.warns(UserWarning, match="1 broken"):
            assert read(root, looked)[1] == expected


@pytest.mark.parametrize("damage", [b"", b"PK\3\4", b"\x93NUMPY"])
def test_a_damaged_index_is_as_none(tmp_path, looked, damage):
    root = make(tmp_path / "set")
    read(root, looked)
    (path,) = (tmp_path / "cache" / "dalle" / "pictures").iterdir()
    path.write_bytes(damage)
    assert len(read(root, looked)[1]) == 4
    assert read(root, looked)[1] == []


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path, looked, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    root = make(tmp_path / "set")
    for _ in range(2):
        assert len(read(root, looked)[1]) == 4


def test_small_collections_leave_nothing_behind(tmp_path, looked, monkeypatch):
    monkeypatch.setattr(picture_index, "WORTH", 5)
    read(make(tmp_path / "set"), looked)
    assert not (tmp_path / "cache").exists()
