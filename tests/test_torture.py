"""The short form of `make torture`: trials of each kind that hangs on no race of clocks; none may fail."""

import os
import subprocess
import sys

import pytest
from tiny import ROOT

pytestmark = pytest.mark.slow

SHORT = {"kills": 18, "disks": 9, "signals": 0, "nan": 9, "ranks": 0, "inputs": 90, "files": 60}


def test_nothing_is_lost_and_every_mistake_is_one_line():
    counts = [word for kind, count in SHORT.items() for word in (f"--{kind}", str(count))]
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    ended = subprocess.run(
        [sys.executable, "-m", "torture", *counts, "--processes", "1"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
