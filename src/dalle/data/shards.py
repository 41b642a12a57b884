"""A list of tar files, here or at any address that fsspec knows, as one long row of samples.

Each shard is indexed once (`tar_index`), and the index kept in the user's cache under the shard's address
and stamp, so that a set is opened in no time again. Shards from elsewhere are copied beside it, whole, when
one of their samples is asked for; the copies that were used longest ago make room for new ones.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import stat
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from glob import glob, has_magic
from io import FileIO
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from tqdm import tqdm

from dalle.data.image_files import BadPicture
from dalle.data.tar_index import NAMED, ROW, BadShard, TarIndex, index_tar
from dalle.data.text import shown
from dalle.errors import UserError
from dalle.files import atomic_path, clean
from dalle.locks import locked

FORMAT = 3  # raise it when the kept files or `index_tar` change
MOST = 1_000_000  # shards that a pattern may stand for
READERS = 8  # shards that are indexed at a time
LONG = 20  # shards from which a progress bar is shown
TRIES, PAUSE = 5, 2.0  # of a network that fails, and seconds before the second try; then twice as long each
SILENCE = 60.0  # seconds without a byte after which a server has failed, however long it sends
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
Result = TypeVar("Result")
log = logging.getLogger(__name__)
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)


def cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle" / "shards"


def addresses(
    given: str | Path | Sequence[str], setting: str, suffixes: tuple[str, ...] = (".tar",)
) -> list[str]:
    """The tar files (or others, by suffix) that a pattern (`PATH/{00000..00099}.tar`, `PATH/*.tar`), a
    folder, or a list of such stands for, in order. Several in one text are separated by `::`.

    Raises:
        UserError: nothing is there, or a command is meant.
    """
    wanted = [str(given)] if isinstance(given, str | Path) else [str(one) for one in given]
    found: list[str] = []
    for part in (part for one in wanted for part in re.split(r"(?<=\.tar)::", one)):
        if part.startswith("pipe:"):
            raise UserError(f"{setting}={shown(part)} would run a program; give files or addresses")
        for place in expanded(part, setting):
            found += _matching(place, setting, suffixes)
    if double := [address for address, count in Counter(found).items() if count > 1]:
        raise UserError(
            f"{setting} names {shown(double[0])} more than once; data.resample=true repeats shards"
        )
    return found


def expanded(pattern: str, setting: str) -> list[str]:
    """`a{0..2}{x,y}` -> a0x, a0y, a1x, ...; numbers keep their leading zeros."""
    pieces = BRACES.split(pattern)
    choices: list[list[str]] = []
    for k, piece in enumerate(pieces):
        if k % 2 == 0:
            choices.append([piece])
        elif numbers := NUMBERS.fullmatch(piece):
            first, last = int(numbers[1]), int(numbers[2])
            if abs(last - first) >= MOST:
                raise UserError(f"{setting}={shown(pattern)} stands for more than {MOST:,} shards")
            width = max(len(n) for n in numbers.groups()) if numbers[1].startswith("0") else 0
            step = 1 if last >= first else -1
            choices.append([f"{n:0{width}d}" for n in range(first, last + step, step)])
        else:
            choices.append(piece.split(","))
    if np.prod([len(some) for some in choices], dtype=float) > MOST:
        raise UserError(f"{setting}={shown(pattern)} stands for more than {MOST:,} shards")
    return ["".join(parts) for parts in product(*choices)]


def _matching(place: str, setting: str, suffixes: tuple[str, ...]) -> list[str]:
    place = place.removeprefix("file://")
    if REMOTE.match(place):
        if not has_magic(place.partition("?")[0]) and place.endswith(suffixes):
            return [place]
        files, path = file_system(place)
        try:
            found = tried(place, lambda: files.glob(path if has_magic(path) else f"{path.rstrip('/')}/**"))
        except FileNotFoundError:
            found = []
        found = [files.unstrip_protocol(one) for one in sorted(found) if one.endswith(suffixes)]
    else:
        place = os.path.abspath(os.path.expanduser(place))
        if os.path.isdir(place):
            found = sorted(glob(f"{glob_escape(place)}/**", recursive=True))
            found = [one for one in found if one.endswith(suffixes)]
        elif has_magic(place) and not os.path.exists(place):
            found = sorted(glob(place, recursive=True))
        else:
            return [place]
    if not found:
        kind = suffixes[0].removeprefix(".")
        raise UserError(f"{setting}={shown(place)}: there are no {kind} files")
    return found


def glob_escape(place: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", place)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it. Raises UserError where it is not known."""
    import fsspec

    options: dict[str, Any] = {}
    try:
        if address.lower().startswith(("http://", "https://")):
            from aiohttp import ClientTimeout  # its own would break off whatever takes five minutes

            patience = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": patience}
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        raise UserError(f"{shown(address)} needs a package: {' '.join(str(error).split())}") from None
    except Exception as error:  # some reach out for their place at once, each in its own way
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{shown(address)} cannot be read ({why})") from None


def tried(address: str, read: Callable[[], Result]) -> Result:
    """What reading from elsewhere gives; tried anew, after a pause, where a network fails.

    Raises:
        FileNotFoundError: nothing is there, as the other side says.
        UserError: it fails again and again.
    """
    for attempt in range(TRIES):
        try:
            return read()
        except UserError:  # of the disk here
            raise
        except Exception as error:  # every file system of fsspec has its own
            if _is_absence(error):
                raise FileNotFoundError(address) from None
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
            why = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
            if attempt + 1 == TRIES:
                raise UserError(
                    f"{shown(address)} cannot be read, {TRIES} times in a row ({why}); a run goes on with "
                    "resume=true"
                ) from None
            level = logging.WARNING if attempt else logging.INFO  # nobody is to wait in silence
            log.log(level, "%s: %s; trying again in %g s", shown(address), why, PAUSE * 2**attempt)
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError


def _is_absence(error: BaseException | None) -> bool:
    """fsspec also calls absent what a failing server does not say anything of."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    if getattr(cause, "status", None) in (404, 410):
        return True
    failed = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return not failed or _is_absence(cause)


@dataclass(frozen=True)
class Shard:
    """One tar file. `copies` bytes of those from elsewhere are kept."""

    address: str
    copies: int

    @property
    def remote(self) -> bool:
        return bool(REMOTE.match(self.address))

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    def stamp(self) -> str:
        """What tells versions apart. Raises OSError where it is not there."""
        if not self.remote:
            status = os.stat(self.address)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
                raise OSError(errno.EINVAL, "no regular file")
            return f"{status.st_size} {status.st_mtime_ns}"
        return remote_stamp(self.address)

    def local(self) -> Path:
        """The file itself, or a copy of it, made where it is missing.

        Raises:
            UserError: it cannot be had.
        """
        if not self.remote:
            return Path(self.address)
        place = cache_home() / "copies" / f"{_key(f'{self.address} {self.stamp()}')}.tar"
        if not _touched(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            with locked(place.with_suffix(".lock"), wait=True):
                if not _touched(place):
                    self._fetch(place)
                    _make_room(place, self.copies)
        return place

    def _fetch(self, place: Path) -> None:
        def copy() -> None:
            files, path = file_system(self.address)
            with atomic_path(place, sync=False) as hidden:
                files.get_file(path, str(hidden))

        tried(self.address, copy)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of a member. Raises BadPicture where they cannot be had any more."""
        try:
            content = _opened(os.getpid(), str(self.local())).read(offset, size)
        except FileNotFoundError:  # one that stays out would change what a run sees
            raise UserError(
                f"{shown(self.address)} is no longer there; with it, resume=true goes on"
            ) from None
        except OSError as error:
            raise BadPicture(f"not readable ({error.strerror})") from None
        if len(content) < size:
            raise BadPicture("cut short since it was indexed")
        return content


@lru_cache(maxsize=MOST)
def remote_stamp(address: str) -> str:
    """As of `Shard.stamp`, asked for once in a process, until shards are indexed anew."""
    facts = tried(address, lambda: _facts(address))
    names = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated", "created")
    marks = [str(facts[key]) for key in names if facts.get(key)]
    return " ".join([str(facts.get("size")), *marks])


def _facts(address: str) -> dict[str, Any]:
    files, path = file_system(address)
    files.invalidate_cache()
    return files.info(path)


class Reader:
    """An open file, closed when it is used no more; several threads may read it."""

    def __init__(self, path: str) -> None:
        self.file, self.lock = FileIO(path), Lock()

    def read(self, offset: int, size: int) -> bytes:
        with self.lock:
            self.file.seek(offset)
            return self.file.read(size)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


@lru_cache(maxsize=64)
def _opened(process: int, path: str) -> Reader:
    """A process has its own: the place in a file is shared with those that were forked."""
    return Reader(path)


def _touched(place: Path) -> bool:
    try:
        os.utime(place)
    except OSError:
        return False
    return True


def _make_room(kept: Path, limit: int) -> None:
    """Removes copies, those used longest ago first, until the rest takes no more than `limit` bytes."""
    clean(kept.parent)
    found = []
    for file in kept.parent.glob("*.tar"):
        with contextlib.suppress(OSError):
            status = file.stat()
            found.append((status.st_mtime, status.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= limit:
            return
        if file != kept:  # whoever reads it has it open
            with contextlib.suppress(OSError):
                file.unlink()
                total -= size


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


@runtime_checkable
class Sieve(Protocol):
    """Leaves samples of an index out; `repr` says all that this depends on."""

    def __call__(self, shard: Shard, made: TarIndex) -> TarIndex: ...


def index(
    shards: Sequence[Shard], max_bytes: int, texts: bool = True, sieve: Sieve | None = None
) -> list[TarIndex | str]:
    """The index of each shard, or why it has none; arguments as of `index_tar`."""
    remote_stamp.cache_clear()
    with ThreadPoolExecutor(READERS) as pool:
        work = pool.map(lambda shard: _indexed(shard, max_bytes, texts, sieve), shards)
        return list(tqdm(work, "Indexing shards", len(shards), disable=len(shards) < LONG, unit=""))


def _indexed(shard: Shard, max_bytes: int, texts: bool, sieve: Sieve | None) -> TarIndex | str:
    try:
        stamp = shard.stamp()
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        return f"not readable ({error.strerror})"
    facts = f"{FORMAT} {shard.address} {stamp} {max_bytes} {texts}" + (f" {sieve}" if sieve else "")
    place = cache_home() / "index" / f"{_key(facts)}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return _load(place)
    try:
        made = (
            _indexed(shard, max_bytes, texts, None) if sieve else index_tar(shard.local(), max_bytes, texts)
        )
        if isinstance(made, str):
            return made
        made = sieve(shard, made) if sieve else made
    except BadShard as error:
        return str(error)
    except OSError as error:
        return f"not readable ({error.strerror})"
    with contextlib.suppress(OSError, UserError):
        _save(place, made)
    return made


def kept_sizes(
    shards: Sequence[Shard],
    parts: Sequence[np.ndarray],
    max_pixels: int,
    measure: Callable[[Shard, np.ndarray], np.ndarray],
) -> list[np.ndarray]:
    """What `measure` says of each shard's rows, (n, 2) whole numbers, kept beside the shards' indices."""

    def one(shard: Shard, rows: np.ndarray) -> np.ndarray:
        facts = f"sizes {FORMAT} {shard.address} {shard.stamp()} {max_pixels} "
        digest = hashlib.sha256(facts.encode("utf-8", "surrogateescape") + rows.tobytes()).hexdigest()[:24]
        place = cache_home() / "index" / f"{digest}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            sizes = np.load(place, allow_pickle=False)
            if sizes.shape == (len(rows), 2):
                return sizes
        sizes = measure(shard, rows)
        with (
            contextlib.suppress(OSError, UserError),
            atomic_path(place, sync=False) as hidden,
            hidden.open("wb") as file,
        ):
            np.save(file, sizes)
        return sizes

    with ThreadPoolExecutor(READERS) as pool:
        work = pool.map(one, shards, parts)
        bar = tqdm(work, "Measuring pictures", len(shards), disable=len(shards) < LONG, unit="")
        return list(bar)


def _save(place: Path, made: TarIndex) -> None:
    facts = json.dumps([made.digest, made.out, made.columns], ensure_ascii=True).encode()
    with atomic_path(place, sync=False) as hidden, hidden.open("wb") as file:
        np.savez(file, rows=made.rows, beside=made.beside, facts=np.frombuffer(facts, np.uint8))


def _load(place: Path) -> TarIndex:
    with np.load(place, allow_pickle=False) as held:
        rows, beside, (digest, out, columns) = (
            held["rows"], held["beside"], json.loads(held["facts"].tobytes())
        )  # fmt: skip
    if rows.dtype != ROW or beside.shape != (len(rows), 2):
        raise ValueError
    out = {why: (count, names) for why, (count, names) in out.items()}
    return TarIndex(rows, digest, out, beside, columns)


def told(shards: Sequence[Shard], indices: Iterable[TarIndex | str]) -> str:
    """What is left out and why, in one sentence; empty where nothing is."""
    counts: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for shard, made in zip(shards, indices, strict=True):
        some = {f"shards {made}": (1, [""])} if isinstance(made, str) else made.out
        for why, (count, members) in some.items():
            counts[why] += count
            names.setdefault(why, []).extend(f"{shard.name}/{m}".rstrip("/") for m in members)
    parts = [
        f"{count} {why} ({', '.join(map(shown, names[why][:NAMED]))}{', ...' if count > NAMED else ''})"
        for why, count in counts.items()
    ]
    return "; ".join(parts)
