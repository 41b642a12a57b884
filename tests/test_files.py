"""Files are whole, as they were, or not there; what a disk says is one line; only our own leftovers go."""

import errno
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from dalle import files
from dalle.errors import UserError
from dalle.files import atomic_folder, atomic_path, clean, hidden_name, write_bytes, write_json, write_text


def test_a_file_is_written_in_a_new_folder(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "grün")
    write_bytes(tmp_path / "a" / "c", b"\0")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "grün"
    assert sorted(os.listdir(tmp_path / "a")) == ["b.txt", "c"]


def test_json_has_no_numbers_that_are_none(tmp_path):
    facts = {"loss": math.nan, "all": [1.5, -math.inf, (math.inf, True)], "text": "grün"}
    write_json(tmp_path / "facts.json", facts)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == {"loss": None, "all": [1.5, None, [None, True]], "text": "grün"}


@pytest.mark.parametrize("number", sorted(files.REASONS))
def test_what_a_disk_says_is_one_line(tmp_path, monkeypatch, number):
    path = tmp_path / "last.ckpt"
    write_text(path, "old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written: .*; what was there before is kept$"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_other_errors_are_not_the_disks(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a"):
        _ = 1 / 0
    with pytest.raises(OSError, match="odd"), atomic_path(tmp_path / "a"):
        raise OSError(errno.EBADF, "odd")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "b"):
        (tmp_path / "picture.png").read_bytes()  # of the data, not of the cache
    assert os.listdir(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if not mounted or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def save(path, state):
    with path.open("wb") as file:
        torch.save(state, file)


WRITERS = {
    "bytes": lambda path, big: path.write_bytes(bytes(big)),
    "checkpoint": lambda path, big: save(path, {"a": torch.zeros(big // 4), "b": torch.ones(3)}),
    "safetensors": lambda path, big: save_file({"a": torch.zeros(big // 4)}, path),
}


@pytest.mark.parametrize("size", [62_000, 66_000, 100_000])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_keeps_what_was_there(tiny_disk, writer, size):
    path = tiny_disk / "model"
    write_bytes(path, bytes(1000))
    line = r"model cannot be written: the disk is full; what was there before is kept"
    with pytest.raises(UserError, match=line), atomic_path(path) as hidden:
        WRITERS[writer](hidden, size)
    assert path.read_bytes() == bytes(1000)
    assert os.listdir(tiny_disk) == ["model"]


def test_a_full_disk_is_known_before_it_is_mapped(tiny_disk):
    path = tiny_disk / "array"
    with path.open("wb") as file:
        file.truncate(100_000)  # takes no place yet
    with pytest.raises(UserError, match="array cannot be written: the disk is full"):
        files.reserve(path)


def test_only_what_dead_processes_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "alive", lambda pid: pid == 7)
    host, other = files._host(), "0" * 8
    dead = [f".last.ckpt.{host}-8.tmp", f".key.{host}-9.tmp", f".old.{other}-7.tmp"]
    kept = ["last.ckpt", f".last.ckpt.{host}-7.tmp", f".new.{other}-8.tmp", ".mine.tmp", f"x.{host}-8.tmp"]
    for name in [*dead, *kept]:
        (tmp_path / name).touch()
    (tmp_path / dead[1]).unlink()
    (tmp_path / dead[1]).mkdir()
    (tmp_path / dead[1] / "array.npy").touch()
    yesterday = time.time() - 2 * files.DAY
    os.utime(tmp_path / dead[2], (yesterday, yesterday))
    link = tmp_path / f".link.{host}-8.tmp"
    link.symlink_to(tmp_path / "last.ckpt")
    clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, link.name])
    clean(tmp_path / "nowhere")


def test_a_killed_write_leaves_what_was_there_and_a_file_that_is_cleaned(tmp_path):
    path = tmp_path / "last.ckpt"
    write_text(path, "old")
    code = f"""
import os, signal
from dalle.files import atomic_path
with atomic_path({str(path)!r}) as hidden:
    hidden.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    clean(tmp_path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_names_stay_short_enough(tmp_path):
    long = tmp_path / ("ä" * 127)
    assert len(hidden_name(long).name.encode()) <= 255
    write_text(long, "text")
    assert long.read_text() == "text"


def test_folders_that_cannot_be_written_are_named_before_work(tmp_path):
    (tmp_path / "file").touch()
    files.check_writable(tmp_path / "new" / "run", "name")
    assert os.listdir(tmp_path) == ["file"]  # nothing is left of the trial
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be written: a part of the path is a file; give another"):
            files.check_writable(path, "name")
    if sys.platform == "linux":
        with pytest.raises(UserError, match=r"run cannot be written: .*; give another paths.logs"):
            files.check_writable(files.Path("/proc/nowhere/run"), "paths.logs")
