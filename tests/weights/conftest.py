"""What tests of imports share: a command that imports, and the one line that it ends in."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dalle.cli.import_weights import main
from dalle.errors import UserError
from dalle.run_dir import Run

Import = Callable[..., Run]


@pytest.fixture
def imported(tmp_path: Path) -> Import:
    """``imported("clip", PATH, "activation=gelu")`` -> the run."""

    def run(kind: str, place: Path, *settings: str, name: str = "mine") -> Run:
        main([kind, str(place), f"name={name}", f"paths.logs={tmp_path / 'logs'}", *settings])
        return Run(tmp_path / "logs" / name / kind)

    return run


@pytest.fixture
def refused(imported: Import) -> Callable[..., str]:
    """The line in which an import that cannot be done ends; nothing is left of it."""

    def run(kind: str, place: Path, *settings: str, name: str = "mine") -> str:
        with pytest.raises(UserError) as refusal:
            imported(kind, place, *settings, name=name)
        line = str(refusal.value)
        assert "\n" not in line
        return line

    return run
