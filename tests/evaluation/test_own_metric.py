"""A metric from outside: one file and one line of config, in evaluation and in training."""

import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from tiny import ROOT, column, train

from dalle.errors import UserError
from dalle.evaluation.results import Result
from dalle.evaluation.run import evaluate
from dalle.trust import set_trusted

FILE = '''
from dalle.metrics.metric import EvaluationMetric


class Contrast(EvaluationMetric):
    """Standard deviation of the values of each picture, of 255."""

    columns = ("contrast",)

    def rows(self, image, captions):
        return {"contrast": image.float().std((1, 2, 3), correction=0)}
'''
LINE = "[{_target_: mylab.contrast.Contrast}]"


@pytest.fixture(autouse=True)
def mylab(tmp_path, monkeypatch):
    (tmp_path / "lab" / "mylab").mkdir(parents=True)
    (tmp_path / "lab" / "mylab" / "contrast.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path / "lab")
    yield
    set_trusted([])
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


def measure(tmp_path, *overrides: str) -> Result:
    folder = tmp_path / "pictures"
    folder.mkdir(exist_ok=True)
    for k, level in enumerate((100, 50, 0)):
        half = Image.new("RGB", (16, 16), (level,) * 3)
        half.paste((200 - level,) * 3, (0, 0, 16, 8))
        half.save(folder / f"{k}.png")
    places = [f"folder='{folder}'", f"paths.cache='{tmp_path}/cache'", f"out='{tmp_path}/out'"]
    usual = ["data=shapes", "data.size=8", "metrics=[kid]", "features=random", "trainer=cpu"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("evaluate", [*places, *usual, *overrides]), resolve=True)
    found = evaluate(config)
    assert found
    return Result.read(found)


def test_in_an_evaluation(tmp_path):
    result = measure(tmp_path, f"extra_metrics={LINE}", "trust=[mylab]")
    value, low, high = result.figures["contrast"]
    assert value == pytest.approx((0 + 50 + 100) / 3)
    assert low < value < high
    assert "kid_random" in result.figures
    assert result.protocol["extra_metrics"] == [{"_target_": "mylab.contrast.Contrast"}]


def test_in_training(tmp_path):
    run = train("vae", tmp_path, f"callbacks.generation.extra_metrics={LINE}", "trust=[mylab]")
    assert 0 < max(column(run, "test/contrast").values()) < 127.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"extra_metrics={LINE}", r"extra_metrics\[0\]: .*mylab.contrast.Contrast.*trust"),
        ("extra_metrics=[{_target_: torch.nn.Identity}]", r"extra_metrics\[0\] must be an EvaluationMetric"),
        ("extra_metrics=[{_target_: torch.nn.Linear}]", r"extra_metrics\[0\] needs in_features"),
        ("extra_metrics=[contrast]", r"extra_metrics\[0\] must be"),
    ],
)
def test_mistakes(tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        measure(tmp_path, setting)
    assert not (tmp_path / "out").exists()
