"""Runs of earlier versions, each in tests/old_runs/<month>: they load, sample, evaluate and go on today.

Their files were written by the code of that month and are never written again. They hold tiny runs of both
generations in logs/tiny, `last.ckpt` of the decoder, sampled pictures with their recipes, and an evaluation.
"""

import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COMMON, ROOT, column, weights

from dalle.data.frozen import weights_hash
from dalle.evaluation.report import write_report
from dalle.evaluation.results import Result
from dalle.pipelines.load import load_dalle, load_unclip
from dalle.run_dir import Run, load_stage
from dalle.training.checkpoints import DurableIO, read_checkpoint
from dalle.trust import LACKED, composed, renamed

MONTHS = sorted(path.name for path in (ROOT / "tests" / "old_runs").iterdir())
STAGES = ("clip", "prior", "decoder", "dvae", "dalle")
DECODER = (  # what the command line of the decoder's training ended with, and what the preset was then
    "optimizer=adamw", "~optimizer.muon_lr", "model.denoiser.frequency_weight=0.0",
    "datamodule.image_embed_norm=unit_times_sqrt_dim", "model.guidance=2.0",
    "model=decoder", "name=tiny", *COMMON, "callbacks.grid=null", "callbacks.reconstructions=null",
    "model.net.width=4", "model.net.multipliers=[1]", "model.net.blocks=[1]", "model.net.attention=[8]",
    "model.net.head_dim=4", "model.net.condition_width=8", "callbacks.generation.items=4",
)  # fmt: skip


@pytest.fixture(params=MONTHS)
def old(request, tmp_path, monkeypatch) -> Path:
    """The runs, copied into the current folder as they stood when they were made."""
    shutil.copytree(ROOT / "tests" / "old_runs" / request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("logs", "tiny")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_loads_and_is_known_by_its_weights(old, stage):
    loaded, manifest = load_stage(old / stage, stage)
    assert weights_hash(loaded.net) == manifest["weights"]
    assert Run(old / stage).metrics()["train/loss"].keys() == {0, 1, 2, 3}


def test_stages_fit_together(old):
    unclip, dalle = load_unclip(old / "decoder", old / "prior"), load_dalle(old / "dalle")
    assert unclip.paths["clip"] == str(old / "clip")
    assert dalle.paths["image_tokenizer"] == str(old / "dvae")


@pytest.mark.parametrize("number", ["001", "002"], ids=["unclip", "dalle"])
def test_a_recipe_makes_its_pictures_again(old, number, command):
    made = old / "samples" / number
    ended = command("sample.py", f"recipe={made / 'recipe.yaml'}", "out=again")
    assert ended.code == 0, ended.err
    names = {"previews.png": "progress_strip.png"}  # then and now
    for picture in made.glob("*.png"):
        again = Path("again", names.get(picture.name, picture.name))
        then, now = (np.asarray(Image.open(path), dtype=int) for path in (picture, again))
        assert np.abs(then - now).max() <= 2  # other processors add in another order
    assert {p.name for p in Path("again").iterdir()} == {names.get(p.name, p.name) for p in made.iterdir()}


def test_training_goes_on_from_a_checkpoint(old, command):
    run = Run(old / "decoder")
    (run.path / "manifest.json").unlink()
    before = read_checkpoint(run.checkpoint)["global_step"]
    ended = command("train.py", *DECODER, "trainer.max_steps=6", "resume=true")
    assert ended.code == 0, ended.err
    told = [line for line in ended.out.splitlines() if "goes on with" in line]
    assert told == [f"{run} goes on with trainer.max_steps=6 (was {before})"]
    assert list(column(run, "train/loss")) == [0, 1, 2, 3, 4, 5]
    assert run.manifest()["steps"] == 6
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_a_result_is_read_beside_todays(old, tmp_path):
    then = Result.read(old / "evaluations" / "001")
    assert then.target["kind"] == "unclip"
    assert then.figures["judge/all"].value == 0
    folder = write_report([then, then], tmp_path / "report", ["a comparison"])
    assert "unclip" in (folder / "table.md").read_text()


def test_the_average_in_an_old_checkpoint_is_found_under_todays_names(old):
    stage, _ = load_stage(old / "decoder")
    loaded = DurableIO(stage).load_checkpoint(old / "decoder" / "last.ckpt", weights_only=True)
    assert loaded["state_dict"].keys() == stage.state_dict().keys()
    average = loaded["callbacks"]["Ema"]["average"]
    assert average.keys() == stage.net.state_dict().keys()


def test_what_came_later_is_as_it_was_then():
    """An argument that a run does not name, as there was none, does not take today's default."""
    tower = {"_target_": "dalle.nets.clip.CLIP", "image_size": 16}
    assert renamed({"net": tower}) == {"net": tower | {"vision": "vit"}}
    assert renamed(tower | {"vision": "conv"}) == tower | {"vision": "conv"}
    for target, arguments in LACKED.items():
        assert arguments.keys() <= inspect.signature(composed(target)).parameters.keys()
