"""Files that one process at a time holds: a lock that ends with its holder, however that ends."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle.errors import UserError
from dalle.files import explained


@contextmanager
def locked(path: Path, wait: str | bool = False) -> Iterator[int | None]:
    """Locks a file, which is made where it is missing, and gives its descriptor; None where another process
    has locked it, unless `wait`, which is printed then where it is a text.

    The lock is the open file: it ends with the process that holds it, however that ends. Where a system or a
    file system knows no locks (Windows, some network disks), everybody is given one.
    """
    try:
        import fcntl
    except ImportError:
        yield 0
        return
    with explained(path):
        file = open(path, "ab", opener=_opened)  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield None
                return
            if isinstance(wait, str):
                print(wait, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks here
        _held.add(file.fileno())
        try:
            yield file.fileno()
        finally:
            _held.discard(file.fileno())


def _opened(path: str, flags: int) -> int:
    """A file that is none would keep whoever opens it waiting (a pipe), or know no locks."""
    number = os.open(path, flags & ~os.O_WRONLY | os.O_RDWR | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UserError(f"{path} is no regular file, as it must be to be locked; move it away")
    return number


_held: set[int] = set()  # locks of this process


def _forget() -> None:
    """Workers that load data are copies of this process: they must not hold its locks when it is killed."""
    for number in _held:
        os.close(number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
