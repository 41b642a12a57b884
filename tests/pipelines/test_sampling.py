"""sample.py on tiny stages with random weights: what it writes, and that its recipe makes the same again."""

import shutil
from pathlib import Path

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
from dalle.pipelines import sampling
from dalle.pipelines.request import UnclipSamplingConfig
from dalle.pipelines.sampling import new_folder, next_folder, sample

FAST = ("steps=2", "pipeline.prior_sampler.steps=2", "precision=fp32")
PROMPT = "prompt=a small red circle, above a blue square"


@pytest.fixture
def make(untrained_stages, tmp_path):
    """`make("out", "n=2")`: sample.py's `sample` with these settings, into this folder."""

    def run(out: str, *overrides: str, fast: tuple[str, ...] = FAST) -> Path:
        settings = [f"paths.logs='{untrained_stages}'", f"out='{tmp_path / out}'", *fast, *overrides]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose("sample", [entry.quoted(setting) for setting in settings])
        config = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(config, dict)
        return sample(config)

    return run


def pngs(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_below(folder).items() if name.endswith(".png")}


def test_pictures_a_grid_and_a_recipe(make, capsys):
    out = make("one", PROMPT, "n=2", "guidance=1.5", "seed=7")
    assert sorted(files_below(out)) == ["000-00.png", "000-01.png", "grid.png", "recipe.yaml"]
    assert Image.open(out / "000-00.png").size == (16, 16)
    assert (out / "000-00.png").read_bytes() != (out / "000-01.png").read_bytes()
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["prompts"] == ["a small red circle, above a blue square"]
    assert (recipe["n"], recipe["seed"], recipe["precision"], recipe["device"]) == (2, 7, "fp32", "cpu")
    decoder = recipe["options"]["decoder"]
    assert decoder["guidance"] == 1.5
    assert decoder["sampler"] == {"method": "ddim", "steps": 2, "spacing": None, "eta": 0.0}
    assert set(recipe["stages"]) == {"clip", "prior", "decoder"}
    assert f"dalle sample recipe={out / 'recipe.yaml'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        ["n=2", "sampler=ddpm", "precision=bf16"],
        ["sampler=heun", "seed=3", "batch_size=1", "n=2", "sampler.churn=0.5"],
        ["pipeline.prior=null", "text_guidance=1.5", "size=24x12"],
        ["pipeline.prior_candidates=3", "pipeline.prior_guidance=2.0", "pipeline.prior_sampler.method=ddpm"],
    ],
    ids=" ".join,
)
def test_a_recipe_makes_its_pictures_again_byte_for_byte(make, settings):
    first = make("first", PROMPT, *settings)
    # everything but `out` is the recipe's: these settings are not heeded
    again = make("again", f"recipe='{first / 'recipe.yaml'}'", "seed=99", "guidance=9", "steps=1")
    assert pngs(again) == pngs(first)
    recipes = [yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (first, again)]
    assert recipes[0] == recipes[1]


def test_pictures_of_another_shape(make):
    out = make("oblong", PROMPT, "size=24x12", "n=2")
    assert Image.open(out / "000-01.png").size == (24, 12)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["options"]["decoder"]["size"] == [12, 24]


def test_pictures_that_are_no_numbers_are_not_written(make, tmp_path, monkeypatch):
    def draw(*args, **more):
        frames = drawn(*args, **more).clone()
        frames[1, ..., 3] = torch.nan
        return frames

    drawn = sampling.draw
    monkeypatch.setattr(sampling, "draw", draw)
    with pytest.raises(UserError, match=r"\A1 of 2 pictures are no numbers \(NaN\), so nothing is written: "):
        make("none", PROMPT, "n=2")
    assert not (tmp_path / "none").exists()


def test_every_setting_changes_the_pictures(make):
    settings = {
        "plain": [],
        "seed": ["seed=1"],
        "precision": ["precision=bf16"],
        "steps": ["steps=5"],
        "guidance": ["guidance=4"],
        "text": ["text_guidance=3"],
        "ddpm": ["sampler=ddpm"],
        "dpmpp": ["sampler=dpmpp"],
        "heun": ["sampler=heun"],
        "prior": ["pipeline.prior=null"],
        "candidates": ["pipeline.prior_candidates=8"],
        "prompt": ["prompt=a yellow ring"],
    }
    fast = ("steps=4", *FAST[1:], "n=4")
    made = {name: pngs(make(name, PROMPT, *more, fast=fast))["grid.png"] for name, more in settings.items()}
    same = {a for a in made for b in made if a != b and made[a] == made[b]}
    assert not same


def test_several_prompts_and_a_file_of_them(make, tmp_path):
    listed = make("listed", "prompt=[a red circle, 'a ring, blue']", "n=2")
    (tmp_path / "prompts.txt").write_text("\n  a red circle \n\na ring, blue\n", encoding="utf-8")
    filed = make("filed", f"prompts='{tmp_path / 'prompts.txt'}'", "n=2")
    assert sorted(pngs(listed)) == ["000-00.png", "000-01.png", "001-00.png", "001-01.png", "grid.png"]
    assert files_below(listed) == files_below(filed)


def test_folders_are_numbered(make, untrained_stages, tmp_path):
    for name in ("001", "007", "8²", "grid"):  # ² is a digit, but no number
        (tmp_path / name).mkdir()
    assert next_folder(tmp_path) == tmp_path / "008"
    assert next_folder(tmp_path / "nowhere") == tmp_path / "nowhere" / "001"
    decoder = f"pipeline.decoder='{untrained_stages}/default/decoder'"
    place = (f"paths.logs='{tmp_path}'", "name=mine")
    out = make("unused", PROMPT, "out=null", *place, decoder, "pipeline.prior=null")
    assert out == tmp_path / "mine" / "samples" / "001"


def test_processes_that_choose_a_folder_at_once_get_one_each(tmp_path, monkeypatch):
    """Two have seen the same last number."""
    seen, home = sampling.next_folder, tmp_path / "samples"
    stale = iter([home / "001", home / "001"])
    monkeypatch.setattr(sampling, "next_folder", lambda parent: next(stale, None) or seen(parent))
    assert [new_folder(home).name for _ in range(3)] == ["001", "002", "003"]


def test_pictures_that_were_overtaken_get_another_folder(make, untrained_stages, tmp_path, monkeypatch):
    samples, drawn = tmp_path / "mine" / "samples", UnclipSamplingConfig.draw

    def draw(*given, **more):
        (samples / "001").mkdir(parents=True)
        return drawn(*given, **more)

    monkeypatch.setattr(UnclipSamplingConfig, "draw", staticmethod(draw))
    decoder = f"pipeline.decoder='{untrained_stages}/default/decoder'"
    place = (f"paths.logs='{tmp_path}'", "name=mine", decoder, "pipeline.prior=null")
    assert make("unused", PROMPT, "out=null", *place) == samples / "002"
    assert list((samples / "001").iterdir()) == []


def test_two_processes_do_not_fill_one_folder(make, tmp_path, monkeypatch):
    place, asked = tmp_path / "new" / "here", []
    draw = sampling.draw

    def meanwhile(*given):
        asked.append(given)
        if len(asked) == 1:
            with pytest.raises(UserError, match=r"another process draws into .*here; give another folder"):
                make("new/here", "prompt=b")
        return draw(*given)

    monkeypatch.setattr(sampling, "draw", meanwhile)
    make("new/here", "prompt=a")
    assert len(asked) == 1
    assert yaml.safe_load((place / "recipe.yaml").read_text())["prompts"] == ["a"]
    assert not (place / sampling.LOCK).exists()


def test_a_lock_that_a_killed_process_left_is_nobodys(make, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / sampling.LOCK).touch()
    assert "grid.png" in pngs(make("new", PROMPT))
    assert not (tmp_path / "new" / sampling.LOCK).exists()


def test_an_occupied_folder_stays_as_it_is(make, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for out in ("full", "full/mine.txt"):
        with pytest.raises(UserError, match=r"is not empty; give another folder with out="):
            make(out, PROMPT)
    assert files_below(tmp_path) == {"full/mine.txt": b"keep"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "give a prompt: prompt="),
        ([PROMPT, "prompts=x.txt"], "give prompt= or prompts=, not both"),
        (["prompts=nowhere.txt"], r"nowhere.txt cannot be read .*No such file"),
        (["prompt=[]"], "the prompt is empty"),
        ([PROMPT, "steps=0"], "steps must be a whole number from 1 to 100000 or null, got 0"),
        ([PROMPT, "steps=few"], "steps must be a whole number from 1 to 100000 or null, got 'few'"),
        ([PROMPT, "sampler.steps=few", "steps=null"], "the decoder's sampler.steps must be a whole number"),
        ([PROMPT, "sampler.eta=much"], "sampler ddim: eta must be a number from 0 to 1, got 'much'"),
        ([PROMPT, "+sampler.churn=1"], "sampler ddim has no option 'churn'"),
        ([PROMPT, "pipeline.prior_sampler.method=euclid"], "unknown sampler 'euclid'"),
        ([PROMPT, "pipeline.prior_candidates=2.5"], "candidates of the prior must be a whole number"),
        (
            [PROMPT, "pipeline.prior_top_k=3"],
            "pipeline.prior_top_k=3 is for an autoregressive prior, which .*",
        ),
        ([PROMPT, "prior=ar_prior", "pipeline.prior_top_k=x"], "top_k of the prior must be a whole number"),
        (
            [PROMPT, "prior=ar_prior", "pipeline.prior_top_k=99"],
            "top_k is 1 to 32, the codes there are, not 99",
        ),
        ([PROMPT, "prior=arprior"], "default.arprior holds no finished run"),
        ([PROMPT, "prior=clip"], "clip holds a clip, but a prior or ar_prior is needed here"),
        ([PROMPT, "n=ten"], "n must be a whole number from 1 to 1048576, got 'ten'"),
        ([PROMPT, "n=99999999999"], "n must be a whole number from 1 to 1048576"),  # nor could it be read
        ([PROMPT, "n=0"], "n must be a whole number from 1 to 1048576, got 0"),
        ([PROMPT, "guidance=strong"], "guidance must be a number from 0 to 1000 or null"),
        ([PROMPT, "precision=fp16"], "precision must be one of auto, 32-true, bf16-mixed, got '16-mixed'"),
        ([PROMPT, "device=tpu"], "device must be one of auto, cpu, cuda"),
        ([PROMPT, "name=nobody"], "nobody.decoder holds no finished run"),
        (["prompt=" + "a red circle and " * 60], r"is too long: CLIP reads .* tokens"),
        ([PROMPT, "recipe=nowhere.yaml"], "nowhere.yaml cannot be read"),
        ([PROMPT, "size=24"], "size must be"),
        ([PROMPT, "size=24x"], "size=24x: give width x height of the pictures, as size=80x48"),
        ([PROMPT, "size=24x999"], "size=24x999 is not what this decoder of 16 px can draw"),
    ],
)
def test_mistakes_write_nothing(make, tmp_path, settings, message):
    fast = () if any("steps=" in s for s in settings) else FAST
    with pytest.raises(UserError, match=message):
        make("out", *settings, fast=fast)
    assert files_below(tmp_path) == {}
    assert not (tmp_path / "out").exists()


def test_an_autoregressive_prior(make):
    options = ("pipeline.prior_temperature=0.5", "pipeline.prior_candidates=2", "pipeline.prior_guidance=2")
    out = make("one", PROMPT, "prior=ar_prior", "n=2", *options)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["stages"]["prior"]["path"].endswith("ar_prior")
    assert recipe["options"]["prior"] == {
        "temperature": 0.5, "top_k": None, "top_p": None, "dot_quantile": None, "guidance": 2, "candidates": 2
    }  # fmt: skip
    assert (out / "000-00.png").read_bytes() != (out / "000-01.png").read_bytes()
    assert pngs(make("again", f"recipe='{out / 'recipe.yaml'}'")) == pngs(out)
    assert pngs(make("other", PROMPT, "n=2")) != pngs(out)


def test_an_option_of_the_other_prior_in_a_recipe(make, tmp_path):
    recipe = make("one", PROMPT) / "recipe.yaml"
    content = yaml.safe_load(recipe.read_text())
    content["options"]["prior"]["temperature"] = 0.5
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="temperature is no option of this prior, which takes sampler, guid"):
        make("again", f"recipe='{recipe}'")


def test_long_prompts_may_be_cut(make):
    out = make("cut", "prompt=" + "a red circle and " * 60, "truncate=true")
    assert yaml.safe_load((out / "recipe.yaml").read_text())["truncate"] is True


def test_a_prompt_file_without_prompts(make, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"empty.txt holds no prompt; write one on each line"):
        make("out", f"prompts='{tmp_path / 'empty.txt'}'")
    with pytest.raises(UserError, match=r"picture.txt cannot be read .*utf-8"):
        make("out", f"prompts='{tmp_path / 'picture.txt'}'")


def test_a_recipe_of_other_weights_is_refused(make, untrained_stages, tmp_path):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    name = f"paths.logs='{tmp_path / 'logs'}'"
    first = make("first", PROMPT, name)
    shutil.rmtree(tmp_path / "logs" / "default" / "prior")
    untrained("prior", tmp_path / "logs", seed=1)
    with pytest.raises(UserError, match=r"was made with prior weights \w+ from .*; give that run back"):
        make("again", name, f"recipe='{first / 'recipe.yaml'}'")
    assert not (tmp_path / "again").exists()
    make("again", f"recipe='{first / 'recipe.yaml'}'")  # those it was made with are there


def test_stages_of_another_clip_do_not_fit(make, tmp_path):
    untrained("clip", tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"clip and \w+ do not fit together: the CLIP \(hash"):
        make("out", PROMPT, f"pipeline.clip='{tmp_path / 'other' / 'default' / 'clip'}'")
    for prior in ("prior", "ar_prior"):
        untrained(prior, tmp_path / "other")
        with pytest.raises(UserError, match=r"do not fit together"):
            make("out", PROMPT, f"pipeline.prior='{tmp_path / 'other' / 'default' / prior}'")
    with pytest.raises(UserError, match=r"prior holds a prior, but a decoder is needed here"):
        make("out", PROMPT, f"pipeline.decoder='{tmp_path / 'other' / 'default' / 'prior'}'")
    assert not (tmp_path / "out").exists()
