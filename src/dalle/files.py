"""Writing files durably: a file is there whole, as it was before, or not at all, on any disk.

Everything is written into a hidden file beside its place (the same folder, so the same file system), synced,
and renamed. The hidden file's name carries machine and process: what a killed process has left is known as
such and can be removed (`clean`). A disk that is full, gone or read-only is one line that says what is kept.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalle.errors import UserError

LEFT = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what only writing can fail with
DAY = 86_400  # seconds after which a hidden file of another machine is taken for one of a dead process
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the disk takes no file so large",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "it may not be written",
    errno.EPERM: "it may not be written",
    errno.ENOENT: "its folder is gone",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "a file is in the way",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ELOOP: "a link on the way leads to itself",
    errno.ESTALE: "the disk is gone",
    errno.ENODEV: "the disk is gone",
    errno.ENXIO: "the disk is gone",
    errno.ENOTCONN: "the disk is gone",
    errno.EHOSTDOWN: "the disk is gone",
    errno.EIO: "the disk fails",
}


@contextmanager
def explained(
    path: str | Path, kept: str | Callable[[], str] = "", kinds: Collection[int] = REASONS
) -> Iterator[None]:
    """Turns what a disk says while something is written at `path` into one line for the user.

    Args:
        kept: what the user still has, as the end of a sentence, or what finds that out.
        kinds: error numbers of the system; `FULL` where other files are read meanwhile.

    Raises:
        UserError: instead of an OSError of a kind that users can do something about.
    """
    try:
        yield
    except Exception as error:
        if (number := _number(error)) not in kinds:
            raise
        kept = kept() if callable(kept) else kept
        kept = kept or ("what was there before is kept" if _exists(path) else "nothing is left of it")
        raise UserError(f"{path} cannot be written: {REASONS[number]}; {kept}") from error


def _number(error: BaseException | None) -> int:
    """What the system has said, also through a library that says something else then; else 0."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # of Rust
            return int(found[1])
        error = error.__cause__ or error.__context__
    return 0


@contextmanager
def atomic_path(path: str | Path, sync: bool = True, kept: str | Callable[[], str] = "") -> Iterator[Path]:
    """Gives a hidden path to write a file to, which takes the place of `path` once that went well.

    Folders are made as needed. Whatever goes wrong, the file before stays as it was.

    Args:
        sync: wait until the disk has it: for what cannot be made again.
        kept: see `explained`.

    Raises:
        UserError: the disk is full, gone, read-only ...
    """
    path = Path(path)
    hidden = hidden_name(path)
    with explained(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            hidden.unlink(missing_ok=True)  # of an earlier process of the same number
            yield hidden
            if sync:
                _sync(hidden)
            hidden.replace(path)
            if sync:
                _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                hidden.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives a hidden folder to fill, which takes the name `path` once that went well; an exception leaves
    nothing behind. Where another process was faster, its folder stays.

    Raises:
        UserError: the folder cannot be made, or the disk is full.
    """
    path = Path(path)
    hidden = hidden_name(path)
    made = [folder for folder in path.parents if not folder.exists()]
    clean(path.parent)  # what was being filled may be large
    with explained(path):
        shutil.rmtree(hidden, ignore_errors=True)  # of an earlier process of the same number
        hidden.mkdir(parents=True)
    try:
        with explained(path, kinds=FULL):
            yield hidden
        with explained(path):
            try:
                hidden.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in made:  # those that something is in by now stay
            with contextlib.suppress(OSError):
                folder.rmdir()


def hidden_name(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{_short(path.name)}.{_host()}-{os.getpid()}.tmp")


def write_text(path: str | Path, text: str, sync: bool = True) -> None:
    """Writes a text file in UTF-8; see `atomic_path`."""
    with atomic_path(path, sync) as hidden:
        hidden.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, content: bytes, sync: bool = True) -> None:
    """See `atomic_path`."""
    with atomic_path(path, sync) as hidden:
        hidden.write_bytes(content)


def write_json(path: str | Path, facts: Any, indent: int | None = 2) -> None:
    """Writes strict JSON (see `to_json`) as a file; see `atomic_path`."""
    write_text(path, to_json(facts, indent))


def to_json(facts: Any, indent: int | None = 2) -> str:
    """Strict JSON (RFC 8259), which has no NaN and no infinities: such numbers become null."""
    return json.dumps(finite(facts), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def as_cell(value: Any) -> Any:
    """A value for a CSV that people open as a spreadsheet: text that would be taken for a formula there gets
    an apostrophe (OWASP, "CSV injection"). Numbers, also written ones, stay.
    """
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def finite(facts: Any) -> Any:
    """The same plain data with None for every number that is not finite."""
    if isinstance(facts, dict):
        return {key: finite(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


def reserve(path: Path) -> None:
    """Takes a file's place on the disk, all of its size: a full disk would end a process that writes into
    memory-mapped files.

    Raises:
        UserError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        with explained(path, "free some space"), path.open("rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))
            except OSError as error:  # not on every file system
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise


def clean(folder: str | Path) -> None:
    """Removes the hidden files and folders that dead processes have left directly in a folder; nothing else.

    Whether a process of another machine lives is not known: what it has not touched for a day is removed.
    """
    try:
        with os.scandir(folder) as entries:
            hidden = [entry for entry in entries if LEFT.fullmatch(entry.name) and not entry.is_symlink()]
    except OSError:
        return
    for entry in hidden:
        with contextlib.suppress(OSError):
            if _is_left(entry):
                shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


def _is_left(entry: os.DirEntry[str]) -> bool:
    found = LEFT.fullmatch(entry.name)
    if found and found["host"] == _host():
        return int(found["pid"]) != os.getpid() and not alive(int(found["pid"]))
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > DAY


def alive(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    if os.name == "nt":  # signal 0 would end it there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


@functools.cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _short(name: str) -> str:
    """A name that leaves room for what is added to it (255 bytes in all)."""
    return name if len(name.encode()) <= 200 else name.encode()[:200].decode(errors="ignore")


def _exists(path: str | Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Not every system can: what was renamed is then durable a little later."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def check_writable(folder: Path, setting: str) -> None:
    """Refuses a folder in which nothing can be written, before any work; leaves nothing behind.

    Args:
        setting: what names the folder, for the message.

    Raises:
        UserError: it is a file, or the first part of it that exists may not be written.
    """
    missing = []
    with explained(folder, f"give another {setting}"):
        for part in [folder, *folder.parents]:
            if part.is_dir():
                break
            if _exists(part):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(part))
            missing.append(part)
        made = []
        try:
            for part in reversed(missing):
                part.mkdir()
                made.append(part)
            probe = folder / f".probe.{_host()}-{os.getpid()}.tmp"
            probe.write_bytes(b"\0")
            probe.unlink()
        finally:
            for part in reversed(made):
                with contextlib.suppress(OSError):
                    part.rmdir()
