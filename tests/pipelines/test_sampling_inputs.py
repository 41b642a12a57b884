"""What sampling is told: whatever cannot be is one line before any stage is loaded; nothing is written."""

import math
from dataclasses import replace

import pytest
from conftest import files_below

from dalle.errors import UserError
from dalle.pipelines.recipe import SampleRecipe
from dalle.pipelines.request import kind_of, read_prompts
from dalle.pipelines.sampling import arguments, check_parts

DDIM = {"method": "ddim", "steps": 2}


@pytest.mark.parametrize(
    ("node", "line"),
    [
        ({"guidance": math.nan}, "guidance of the decoder must be a number from 0 to 1000, got nan"),
        ({"guidance": math.inf}, "guidance of the decoder must be"), ({"guidance": 1e30}, "from 0 to 1000"),
        ({"guidance": "2"}, "guidance"), ({"text_guidance": -1}, "text_guidance"), ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"), ({"temperature": math.nan}, "temperature"),
        ({"candidates": 0}, "candidates"), ({"prefix": 3}, "prefix"),
        ({"candidates": True}, "candidates"), ({"prefix": [1, -1]}, r"prefix\[1\]"),
        ({"sampler": 5}, "sampler of the decoder must be method, steps and options, got 5"),
        ({"sampler": {**DDIM, "eta": math.nan}}, "eta must be a number"),
        ({"sampler": {**DDIM, "steps": 0}}, "steps"), ({"sampler": {**DDIM, "steps": 10**9}}, "steps"),
        ({"sampler": {**DDIM, "foo": 1}}, "no option 'foo'"),
        ({"sampler": {**DDIM, "_args_": [1]}}, "_args_"),
        ({"sampler": {**DDIM, "method": ["ddim"]}}, "method"),
    ],
)  # fmt: skip
def test_options(node, line):
    with pytest.raises(UserError, match=line):
        arguments(node, "decoder")


@pytest.mark.parametrize("prompt", ["", "   ", "\t\n", [], [""], ["a", " "], "a \udce9", ["\ud800"]])
def test_prompts_that_say_nothing_or_are_no_text(prompt):
    with pytest.raises(UserError, match=r"the prompt is (empty|no text)"):
        read_prompts(prompt, None)


def test_a_file_of_prompts_as_editors_write_it(tmp_path):
    """A byte order mark, lines of Windows, and letters that only some take for the end of a line."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red\u2028ring\r\n\r\n a\x0cb \n".encode())
    assert read_prompts(None, str(path)) == ["a red\u2028ring", "a\x0cb"]
    path.write_bytes(b"\xff\xfea")
    with pytest.raises(UserError, match=r"prompts.txt cannot be read"):
        read_prompts(None, str(path))


@pytest.mark.parametrize("kind", ["unet", "", None, 5, ["unclip"], {"a": 1}])
def test_pipelines_that_there_are_not(kind):
    with pytest.raises(
        UserError, match=r"^pipeline.kind must be one of unclip, dalle, gan, vae, upsampler, got"
    ):
        kind_of(kind, "pipeline.kind")


RECIPE = SampleRecipe(
    ["a ring"],
    1,
    0,
    {"decoder": {"path": "d", "weights": "w"}},
    {"decoder": {}, "prior": {}},
    1,
    "fp32",
    "cpu",
)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"stages": {}}, "stages name no decoder"), ({"stages": {"vae": {}}}, "stages name no decoder"),
        ({"options": {}}, "options of the decoder are missing"),
        ({"options": {"nobody": {}}}, "options are of nobody, which is no stage of unclip"),
        ({"options": {"decoder": {"foo": 5}}}, "foo is no option of the decoder; its options are sampler"),
        ({"options": {"decoder": {"self": 5}}}, "self is no option of the decoder"),
        ({"pipeline": "vae"}, "stages name no vae"), ({"pipeline": "dalle"}, "stages name no dalle"),
    ],
)  # fmt: skip
def test_recipes_of_another_pipeline(change, line):
    recipe = replace(RECIPE, **change)
    with pytest.raises(UserError, match=line):
        check_parts(recipe, kind_of(recipe.pipeline, ""), "r.yaml")
    check_parts(RECIPE, kind_of("unclip", ""), "r.yaml")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["seed=99999999999999999999"], "seed must be a whole number of at least 0 and below 4294967296"),
        (["seed=-1"], "seed must be"), (["out="], "out must be text"),
        (["out=/proc/x"], "/proc/x cannot be"),
        (["pipeline.decoder=null"], "pipeline.decoder must be the directory of a run, got None"),
        (["pipeline.decoder=5"], "pipeline.decoder must be"),
        (["pipeline.prior_sampler=5"], "sampler of the"),
        (["pipeline.prior_candidates=0"], "candidates of the prior"), (["guidance=inf"], "guidance must be"),
        (["prompt=[[a],b]"], "prompt"), (["pipeline=vae", "guidance=3"], "no prompts"),
        (["pipeline=gan", "guidance=3"], "pipeline=gan knows none"), (["pipeline.kind=foo"], "pipeline.kind"),
    ],
)  # fmt: skip
def test_settings(command, monkeypatch, tmp_path, settings, line):
    monkeypatch.setattr("dalle.pipelines.load.load_stage", None)
    given = {setting.split("=")[0] for setting in settings}
    usual = [s for s in ("prompt=x", "out=new", "precision=fp32") if s.split("=")[0] not in given]
    assert line in command("sample.py", *usual, *settings).error
    assert files_below(tmp_path) == {}
