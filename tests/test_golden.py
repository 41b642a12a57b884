"""The first training losses of every stage. A change that only tidies up may not move them; one that is
meant to says so:

``GOLDEN=write pytest tests/test_golden.py`` writes them anew.
"""

import os
from pathlib import Path

import pytest
from tiny import column, train

GOLDEN = Path(__file__).parent / "golden"
STEPS = 5


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """Stages come after one another: the prior's and the decoder's losses depend on the CLIP before them."""
    return tmp_path_factory.mktemp("logs")


@pytest.mark.parametrize("model", ["clip", "prior", "decoder", "dit"])
def test_first_losses(model, logs):
    losses = list(column(train(model, logs, "overwrite=true", steps=STEPS), "train/loss").values())
    path = GOLDEN / f"{model}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{loss:.7g}\n" for loss in losses))
    golden = [float(line) for line in path.read_text().split()]
    assert len(golden) == STEPS
    assert losses == pytest.approx(golden, rel=1e-4)  # other processors add in another order
