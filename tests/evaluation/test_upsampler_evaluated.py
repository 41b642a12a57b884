"""evaluate.py run=RUN of an upsampler, beside bicubic, and upsamplers=[RUN] after a pipeline."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import untrained

from dalle.data.degradations import shrunk
from dalle.data.shapes import Shapes
from dalle.images import from_uint8, to_uint8
from dalle.metrics.judge import Judge


@pytest.fixture(scope="module")
def logs(untrained_stages, tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("evaluated") / "logs"
    shutil.copytree(untrained_stages, logs)
    untrained("upsampler", logs, "data.image_size=32")
    return logs


def figures(out: Path) -> dict[str, float]:
    found = json.loads((out / "result.json").read_text())["figures"]
    return {name: figure["value"] for name, figure in found.items()}


def test_an_upsampler_alone_stands_beside_bicubic(logs, command, tmp_path):
    words = ("trainer=cpu", "precision=fp32", "n=8", "upsampling.steps=2", f"out='{tmp_path / 'out'}'")
    run = logs / "default" / "upsampler"
    ended = command("evaluate.py", f"run='{run}'", f"paths.logs='{logs}'", *words, "perceptual=random")
    assert ended.code == 0, ended
    (out,) = (path.parent for path in (tmp_path / "out").rglob("result.json"))
    found = figures(out)
    assert found["psnr"] < found["bicubic_psnr"]  # its weights are random
    assert found["consistency"] > found["bicubic_consistency"]
    assert {"ssim", "perceptual_random", "judge/all", "judge_small", "judge_bicubic"} < found.keys()
    source = Shapes("test", image_size=32, size=32)
    low = from_uint8(to_uint8(shrunk(source.images(range(8)), 2)))
    said = Judge()(low, source.captions_of(range(8)))["all"]
    assert found["judge_small"] == pytest.approx(said.mean().item())


def test_a_cascade_is_measured_at_its_last_size(logs, command, tmp_path):
    words = ("trainer=cpu", "precision=fp32", "n=4", "steps=2", "upsampling.steps=2", "metrics=[judge]")
    more = (f"paths.logs='{logs}'", "upsamplers=[upsampler]", "pipeline.prior_sampler.steps=2")
    ended = command("evaluate.py", *words, *more, "save_pictures=true", f"out='{tmp_path / 'out'}'")
    assert ended.code == 0, ended
    (path,) = (tmp_path / "out").rglob("result.json")
    result = json.loads(path.read_text())
    assert result["protocol"]["image_size"] == 32
    assert "upsampler_1" in result["target"]["weights"]


def test_alone_it_is_no_pipeline(logs, command):
    error = command("evaluate.py", "pipeline=upsampler", f"paths.logs='{logs}'", "trainer=cpu").error
    assert "an upsampler alone is measured by run=RUN" in error
