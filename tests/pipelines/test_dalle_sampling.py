"""sample.py pipeline=dalle on tiny stages with random weights: recipes, completion, candidates, mistakes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import files_below, untrained
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from tiny import ROOT

from dalle.cli import entry
from dalle.errors import UserError
from dalle.pipelines.dalle import DallePipeline
from dalle.pipelines.load import load_dalle
from dalle.pipelines.sampling import sample

PROMPT = "prompt=a small red circle, above a blue square"


@pytest.fixture
def make(untrained_stages, tmp_path):
    """`make("out", "n=2")`: what sample.py pipeline=dalle does with these settings, into this folder."""

    def run(out: str, *overrides: str, pipeline: str = "dalle") -> Path:
        settings = [
            f"pipeline={pipeline}",
            f"paths.logs='{untrained_stages}'",
            f"out='{tmp_path / out}'",
            "precision=fp32",
            *overrides,
        ]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose("sample", [entry.quoted(setting) for setting in settings])
        config = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(config, dict)
        return sample(config)

    return run


def pngs(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_below(folder).items() if name.endswith(".png")}


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_pictures_a_grid_and_a_recipe(make, capsys):
    out = make("one", PROMPT, "n=2", "guidance=1.5", "top_k=9", "seed=7")
    assert sorted(files_below(out)) == ["000-00.png", "000-01.png", "grid.png", "recipe.yaml"]
    assert Image.open(out / "000-00.png").size == (16, 16)
    assert (out / "000-00.png").read_bytes() != (out / "000-01.png").read_bytes()
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["pipeline"], recipe["n"], recipe["seed"]) == ("dalle", 2, 7)
    assert recipe["options"]["dalle"] == {"temperature": None, "top_k": 9, "top_p": None, "guidance": 1.5}
    assert set(recipe["stages"]) == {"image_tokenizer", "dalle"}
    assert f"dalle sample recipe={out / 'recipe.yaml'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        ["n=2", "precision=bf16", "guidance=3"],
        ["n=3", "batch_size=2", "temperature=0.7", "top_p=0.9"],
        ["candidates=4", "n=2", "progress_strip=true", "batch_size=3"],
        ["init_image=PICTURE", "init_rows=2", "progress_strip=true"],
    ],
    ids=" ".join,
)
def test_a_recipe_makes_its_pictures_again_byte_for_byte(make, picture, settings):
    first = make("first", PROMPT, *(s.replace("PICTURE", f"'{picture}'") for s in settings))
    picture.unlink()  # the recipe holds what it needs of it
    # all but `out` is the recipe's, even the pipeline: these settings are not heeded
    again = make("again", f"recipe='{first / 'recipe.yaml'}'", "seed=99", "guidance=9", pipeline="unclip")
    assert pngs(again) == pngs(first)
    recipes = [yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (first, again)]
    assert recipes[0] == recipes[1]


def test_every_setting_changes_the_pictures(make, picture):
    settings = {
        "plain": [],
        "seed": ["seed=1"],
        "temperature": ["temperature=0.3"],
        "top_k": ["top_k=2"],
        "top_p": ["top_p=0.2"],
        "guidance": ["guidance=9"],
        "candidates": ["candidates=8"],
        "init_image": [f"init_image='{picture}'"],
        "rows": [f"init_image='{picture}'", "init_rows=3"],
        "prompt": ["prompt=a yellow ring in the corner"],
    }
    made = {name: pngs(make(name, PROMPT, "n=4", *more))["grid.png"] for name, more in settings.items()}
    assert not {a for a in made for b in made if a != b and made[a] == made[b]}


def test_weights_are_cast_before_they_go_to_the_device(make, monkeypatch):
    """Which then needs room for half as much."""
    moved, to = [], DallePipeline.to

    def watched(self, device):
        moved.append({p.dtype for p in self.dalle.net.layers.parameters() if p.ndim == 2})
        return to(self, device)

    monkeypatch.setattr(DallePipeline, "to", watched)
    make("out", PROMPT, "precision=bf16")
    assert moved == [{torch.bfloat16}]


def test_previews_are_a_strip_of_each_picture(make):
    out = make("strips", PROMPT, "n=2", "progress_strip=true")
    strip, sheet = (Image.open(out / name).size for name in ("progress_strip.png", "grid.png"))
    assert strip[0] > 1.5 * sheet[0]  # four times in a row, not twice
    assert (out / "000-00.png").read_bytes() == (make("plain", PROMPT, "n=2") / "000-00.png").read_bytes()


def test_completed_pictures_begin_as_the_picture_does(make, untrained_stages, picture):
    out = make("done", PROMPT, "n=2", f"init_image='{picture}'", "init_rows=2")
    prefix = yaml.safe_load((out / "recipe.yaml").read_text())["options"]["image_tokenizer"]["prefix"]
    assert len(prefix) == 2 * 4
    assert set(prefix) <= set(range(32))
    assert len(set(prefix)) > 1


def test_a_long_prompt_is_cut_with_a_warning(make, caplog):
    assert make("cut", "prompt=" + "a red circle and " * 60).exists()
    assert (
        "1 of 1 prompts are longer than the 24 tokens that the transformer reads and were cut" in caplog.text
    )


def test_without_a_clip_only_candidates_are_refused(make, untrained_stages, tmp_path):
    for stage in ("dvae", "dalle"):
        shutil.copytree(untrained_stages / "default" / stage, tmp_path / "logs" / "default" / stage)
    logs = f"paths.logs='{tmp_path / 'logs'}'"
    assert make("one", PROMPT, logs).exists()
    with pytest.raises(
        UserError, match=r"candidates=4 need a CLIP .*clip holds none; train one with model=clip"
    ):
        make("four", PROMPT, logs, "candidates=4")
    with pytest.raises(UserError, match=r"candidates=4 need a CLIP"):
        make("four", PROMPT, logs, "candidates=4", "pipeline.clip=null")
    with pytest.raises(
        UserError, match=r"open_clip/ViT-B-32 names no weights; give open_clip/NAME/PRETRAINED"
    ):
        make("four", PROMPT, logs, "candidates=4", "pipeline.clip=open_clip/ViT-B-32")
    assert not (tmp_path / "four").exists()


def test_a_run_that_was_moved_finds_the_tokenizer_beside_it(untrained_stages, tmp_path):
    for stage in ("dvae", "dalle"):
        shutil.copytree(untrained_stages / "default" / stage, tmp_path / "moved" / stage)
    loaded = load_dalle(tmp_path / "moved" / "dalle")
    assert loaded.paths == {
        "image_tokenizer": str(tmp_path / "moved" / "dvae"),
        "dalle": str(tmp_path / "moved" / "dalle"),
    }
    assert set(loaded.weights) == set(loaded.parameters) == {"image_tokenizer", "dalle"}


def test_another_image_tokenizer_is_refused(make, untrained_stages, tmp_path):
    untrained("dvae", tmp_path / "other", seed=5)
    other = f"pipeline.image_tokenizer='{tmp_path / 'other' / 'default' / 'dvae'}'"
    with pytest.raises(
        UserError,
        match=r"dvae and dalle do not fit together: the image tokenizer \(hash of its weights\) is ",
    ):
        make("out", PROMPT, other)
    untrained("dvae", tmp_path / "more", "model.net.vocab_size=48")
    with pytest.raises(UserError, match=r"the image tokenizer's vocabulary is 48 in dvae, but 32 in dalle"):
        make("out", PROMPT, other.replace("other/", "more/"))
    decoder = f"pipeline.image_tokenizer='{untrained_stages / 'default' / 'prior'}'"
    with pytest.raises(UserError, match=r"prior holds a prior, but a dvae or vqgan is needed here"):
        make("out", PROMPT, decoder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([PROMPT, "top_k=99"], r"top_k.*32.*99"),
        ([PROMPT, "top_k=few"], "top_k must be a whole number of at least 1 or null, got 'few'"),
        ([PROMPT, "top_p=2"], r"top_p.*2"),
        ([PROMPT, "temperature=-1"], r"temperature.*-1"),
        ([PROMPT, "candidates=0"], "candidates must be a whole number of at least 1, got 0"),
        ([PROMPT, "candidates=many"], "candidates must be a whole number of at least 1, got 'many'"),
        ([PROMPT, "progress_strip=4"], "progress_strip must be true or false, got 4"),
        ([PROMPT, "init_image=nowhere.png"], "there is no picture init_image=nowhere.png"),
        (
            [PROMPT, "init_image=PICTURE", "init_rows=4"],
            "init_rows=4: a picture has 4 rows of codes; give 1 to 3",
        ),
        ([PROMPT, "init_image=TEXT"], r"init_image=.*text.png is broken; give a picture"),
        ([PROMPT, "name=nobody"], "nobody.dalle holds no finished run"),
        (["prompt=[]"], "the prompt is empty"),
    ],
)
def test_mistakes_write_nothing(make, tmp_path, picture, settings, message):
    (tmp_path / "text.png").write_text("no picture")
    given = [s.replace("PICTURE", f"'{picture}'").replace("TEXT", f"'{tmp_path}/text.png'") for s in settings]
    with pytest.raises(UserError, match=message):
        make("out", *given)
    assert not (tmp_path / "out").exists()


def test_settings_of_another_pipeline_are_named(command, untrained_stages):
    ended = command("sample.py", "pipeline=dalle", f"paths.logs='{untrained_stages}'", PROMPT, "steps=9")
    assert "there is no setting steps" in ended.error
    ended = command("sample.py", f"paths.logs='{untrained_stages}'", PROMPT, "top_k=9")
    assert "there is no setting top_k" in ended.error
