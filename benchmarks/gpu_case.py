"""What the parts of `gpu_check.py` are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, dict[str, Any]]]  # by part and case: status, text, seconds, and what was found


@dataclass(frozen=True)
class Job:
    """What a case is told.

    Args:
        device: cuda or cpu.
        tiny: everything as small as can be.
        folder: for its files; that of all cases of a part.
        note: records what there is of a result, for when the rest is not reached.
    """

    part: str
    case: str
    device: str
    tiny: bool
    folder: Path
    note: Callable[..., None]


@dataclass(frozen=True)
class Case:
    """One thing that is tried.

    Args:
        run: gives what is to be recorded; `text` of it is shown.
        needs: seconds that have to be left for it to be begun.
        limit: seconds after which it is given up.
    """

    run: Callable[[Job], dict[str, Any]]
    needs: float = 5
    limit: float = 60


class Refused(Exception):
    """The project says in one line that it cannot do this, as it should."""


class Failed(Exception):
    """Something came out otherwise than it has to; `found` is recorded."""

    def __init__(self, text: str, **found: Any) -> None:
        super().__init__(text)
        self.found = found
