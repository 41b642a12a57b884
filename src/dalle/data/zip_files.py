"""A zip file as a folder that is never unpacked: members are read one at a time, into memory.

So no member's name can lead out of a folder. What is packed far more tightly than pictures and text are (a
bomb), is locked by a password, or is no plain file, is left out and named. Archives in it are not opened.
"""

import os
import stat
import zipfile
import zlib
from functools import cached_property
from pathlib import Path, PurePosixPath

from dalle.data.file_listing import Listing
from dalle.data.image_files import BadPicture
from dalle.data.text import shown
from dalle.errors import UserError

RATIO = 200  # times larger than packed: pictures hardly shrink, text to a tenth
SMALL = 2**20  # bytes below which no ratio is odd
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip file does, or is called so."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) in (b"PK\3\4", b"PK\5\6") or path.suffix.lower() == ".zip"
    except OSError:
        return False


class Archive:
    """The members of a zip file.

    Raises:
        UserError: it is no whole zip file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[int, zipfile.ZipFile] = {}  # a process has its own: the place in a file is shared

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)

    def __truediv__(self, name: str) -> "Member":
        return Member(self, name)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def file(self) -> zipfile.ZipFile:
        if (found := self._files.get(os.getpid())) is None:
            found = self._files[os.getpid()] = zipfile.ZipFile(self.path)
        return found

    def listing(self) -> Listing:
        """Its plain files, as of a folder; a checksum is the stamp of each."""
        files: dict[str, tuple[str, int, int]] = {}
        odd: list[tuple[str, str]] = []
        try:
            members = self.file.infolist()
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError) as error:
            raise UserError(f"{shown(str(self.path))} is not a whole zip file ({error})") from None
        for member in members:
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if member.is_dir() or any(p.startswith(".") and p != ".." for p in path.parts):
                continue
            if "__MACOSX" in path.parts:  # what macOS packs beside every file
                continue
            if why := _odd(member, path):
                odd.append((member.filename, why))
            elif member.filename in files:
                odd.append((member.filename, "there twice, of which the last is read"))
                files[member.filename] = (member.filename, member.file_size, member.CRC)
            else:
                files[member.filename] = (member.filename, member.file_size, member.CRC)
        return Listing(tuple(sorted(files.values())), tuple(sorted(odd)))

    def read(self, name: str) -> bytes:
        """Raises OSError, also for what is damaged."""
        try:
            return self.file.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError) as error:
            raise OSError(0, f"damaged in the archive: {error}") from None
        except (RuntimeError, NotImplementedError) as error:
            raise OSError(0, str(error)) from None

    def picture(self, name: str) -> bytes:
        try:
            return self.read(name)
        except OSError as error:
            raise BadPicture(f"not readable ({(error.strerror or '').partition(':')[0]})") from None


class Member:
    """A file in an archive, as far as a path that is read."""

    def __init__(self, archive: Archive, name: str) -> None:
        self.archive, self.path = archive, PurePosixPath(name)

    def __str__(self) -> str:
        return f"{self.archive}/{self.path}"

    @cached_property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def suffix(self) -> str:
        return self.path.suffix

    def read_bytes(self) -> bytes:
        return self.archive.read(str(self.path))


def _odd(member: zipfile.ZipInfo, path: PurePosixPath) -> str | None:
    """Why a member is not read."""
    kind = member.external_attr >> 16
    if path.is_absolute() or ".." in path.parts or "\0" in member.orig_filename:
        return "named as if outside of the archive"
    if kind and stat.S_IFMT(kind) not in (0, stat.S_IFREG):
        return "no regular files"
    if member.flag_bits & 1:
        return "locked by a password"
    if member.compress_type not in METHODS:
        return "packed in a way that is not known here"
    if member.file_size > max(SMALL, RATIO * member.compress_size):
        return f"packed more than {RATIO} times smaller than they are, as no picture is"
    return None
