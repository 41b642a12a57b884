"""sample.py pipeline=gan and pipeline=vae on tiny stages with random weights."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import files_below, untrained

from dalle.pipelines.load import load_vae


@pytest.fixture(scope="module")
def logs(untrained_stages, tmp_path_factory) -> Path:
    """logs/ with a CLIP, a GAN and a VAE."""
    logs = tmp_path_factory.mktemp("others") / "logs"
    shutil.copytree(untrained_stages / "default" / "clip", logs / "default" / "clip")
    for model in ("gan", "vae"):
        untrained(model, logs)
    return logs


def pngs(folder: str) -> dict[str, bytes]:
    return {name: data for name, data in files_below(Path(folder)).items() if name.endswith(".png")}


@pytest.mark.parametrize("kind", ["gan", "vae"])
def test_pictures_and_a_recipe_that_makes_them_again(command, logs, kind):
    given = ["prompt=a red ring"] if kind == "gan" else []
    usual = (f"pipeline={kind}", f"paths.logs='{logs}'", "precision=fp32")
    assert command("sample.py", *usual, *given, "n=3", "batch_size=2", "out=one").code == 0
    assert sorted(pngs("one")) == ["000-00.png", "000-01.png", "000-02.png", "grid.png"]
    assert len(set(pngs("one").values())) == 4
    assert command("sample.py", "recipe=one/recipe.yaml", "out=two").code == 0
    assert pngs("one") == pngs("two")
    assert command("sample.py", *usual, *given, "n=3", "seed=1", "out=three").code == 0
    assert pngs("three")["grid.png"] != pngs("one")["grid.png"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["pipeline=gan", "prompt=x", "guidance=2"], "guidance=2: pipeline=gan knows none; leave it out"),
        (["pipeline=vae", "guidance=2"], "guidance=2: pipeline=vae knows none; leave it out"),
        (["pipeline=vae", "prompt=x"], "pipeline=vae reads no prompts; leave them out"),
        (["pipeline=gan"], "give a prompt: prompt="),
        (["pipeline=vae", "n=0"], "n must be a whole number from 1 to 1048576, got 0"),
        (["pipeline=vae", "name=nobody"], "nobody/vae holds no finished run"),
    ],
)
def test_mistakes(command, logs, settings, line):
    assert line in command("sample.py", f"paths.logs='{logs}'", "out=new", *settings).error
    assert not Path("new").exists()


def test_pictures_do_not_depend_on_the_batch(logs):
    pipeline = load_vae(logs / "default" / "vae").pipeline
    whole = pipeline.sample(["", ""], n=3, seed=2)
    torch.testing.assert_close(pipeline.sample(["", ""], n=3, seed=2, batch_size=2), whole)
    torch.testing.assert_close(pipeline.sample([""], n=3, seed=2, numbers=[1]), whole[3:])
