import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.errors import UserError
from dalle.pipelines.recipe import SampleRecipe

RECIPE = SampleRecipe(
    prompts=["a red circle", "yes", "naïve: 一只猫 😀", ""],
    n=2,
    seed=7,
    stages={
        "clip": {"path": "logs/demo/clip", "weights": "c1"},
        "decoder": {"path": "logs/d", "weights": "d1"},
    },
    options={
        "prior": {},
        "decoder": {
            "sampler": {"method": "ddim", "steps": 25, "spacing": None, "eta": 0.0},
            "guidance": 2.0,
        },
    },
    batch_size=16,
    precision="bf16",
    device="cpu",
)


def test_round_trip(tmp_path):
    path = RECIPE.write(tmp_path / "new" / "recipe.yaml")
    assert SampleRecipe.read(path) == RECIPE
    assert os.listdir(path.parent) == ["recipe.yaml"]
    assert "一只猫 😀" in path.read_text(encoding="utf-8")  # for people to read


yaml_text = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\x85\u2028\ufeff: #"), max_size=20
)


@settings(deadline=None)
@given(st.lists(yaml_text, min_size=1, max_size=3), st.integers(-(2**63), 2**63), st.floats(allow_nan=False))
def test_any_prompt_seed_and_scale_survive(prompts, seed, guidance):
    recipe = replace(RECIPE, prompts=prompts, seed=seed, options={"decoder": {"guidance": guidance}})
    assert SampleRecipe(**yaml.safe_load(recipe.to_yaml())) == recipe


def changed(tmp_path, **keys) -> Path:
    content = yaml.safe_load(RECIPE.to_yaml()) | keys
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v != "DROP"}))
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"promts": ["a"]}, "promts is not known"),
        ({"seed": "DROP"}, "seed is missing"),
        ({"seed": "seven"}, "seed must be a whole number, got 'seven'"),
        ({"n": True}, "n must be a whole number, got True"),
        ({"prompts": "a red circle"}, "prompts must be a list, got 'a red circle'"),
        ({"prompts": ["a", 3]}, "prompts.1 must be text, got 3"),
        ({"stages": {"clip": "logs/clip"}}, "stages.clip must be a mapping"),
        ({"schema": 99}, "schema 99"),
        ({"schema": "DROP"}, "no recipe"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_by_name(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        SampleRecipe.read(changed(tmp_path, **keys))


def test_recipes_of_the_first_schema_are_still_read(tmp_path):
    """They were of unclip alone, with the options of its stages as keys."""
    old = {"schema": 1, **RECIPE.options, "options": "DROP", "progress_strip": "DROP"}
    assert SampleRecipe.read(changed(tmp_path, **old)) == RECIPE


def test_recipes_of_the_second_schema_are_still_read(tmp_path):
    old = {"schema": 2, "previews": True, "progress_strip": "DROP"}
    assert SampleRecipe.read(changed(tmp_path, **old)) == replace(RECIPE, progress_strip=True)


def test_optional_keys_may_be_missing(tmp_path):
    assert SampleRecipe.read(changed(tmp_path, truncate="DROP")) == RECIPE


@pytest.mark.parametrize(
    "content", [b"{unclosed", b"- a\n- b\n", b"", b"\xff\xfe\x00", b"!!python/object:os.x {}"]
)
def test_files_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.yaml") as error:
        SampleRecipe.read(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        SampleRecipe.read(tmp_path / "none.yaml")


def test_other_weights_are_refused_by_name():
    RECIPE.check_stages({"decoder": "d1", "clip": "c1"})
    with pytest.raises(UserError, match="decoder weights d1 from logs/d, but found are d2"):
        RECIPE.check_stages({"clip": "c1", "decoder": "d2"})
    with pytest.raises(UserError, match="clip weights c1 from logs/demo/clip, but found are none"):
        RECIPE.check_stages({"decoder": "d1"})
    with pytest.raises(UserError, match=r"prior weights \(none\)"):
        RECIPE.check_stages({"clip": "c1", "decoder": "d1", "prior": "p1"})


def test_another_environment_is_seen():
    assert RECIPE.differences() == {}
    older = replace(RECIPE, made_with={**RECIPE.made_with, "torch": "0.4"})
    assert list(older.differences()) == ["torch"]
    assert older.differences()["torch"][0] == "0.4"


def test_a_failed_write_leaves_the_old_recipe(tmp_path, monkeypatch):
    path = RECIPE.write(tmp_path / "recipe.yaml")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace(RECIPE, seed=8).write(path)
    monkeypatch.undo()
    assert SampleRecipe.read(path).seed == 7
    assert os.listdir(tmp_path) == ["recipe.yaml"]
