"""sample.py edit=... on tiny stages with random weights: pictures, recipes that make them again, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import files_below
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from tiny import ROOT

from dalle.cli import entry
from dalle.errors import UserError
from dalle.images import GAP, MIN_CELL
from dalle.pipelines.sampling import sample

PROMPT = "prompt=a small red circle"
FAST = {"dalle": (), "unclip": ("steps=2", "pipeline.prior_sampler.steps=2")}
PAPER = (255, 255, 255)


@pytest.fixture
def make(untrained_stages, tmp_path, monkeypatch):
    """`make("out", "dalle", "edit=inpaint")`: what sample.py does, in the folder of the pictures."""
    monkeypatch.chdir(tmp_path)

    def run(out: str, pipeline: str, *overrides: str) -> Path:
        settings = [f"pipeline={pipeline}", f"paths.logs='{untrained_stages}'", f"out='{out}'"]
        words = [*settings, "precision=fp32", *FAST[pipeline], *overrides]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose("sample", [entry.quoted(word) for word in words])
        config = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(config, dict)
        return sample(config)

    return run


@pytest.fixture(autouse=True)
def pictures(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    Image.fromarray(noise[:8, :8]).save(tmp_path / "small.png")
    mask = Image.new("RGB", (16, 16))
    mask.paste(PAPER, (4, 4, 8, 12))  # two cells of 4 px
    mask.save(tmp_path / "mask.png")
    for name, colour in {"black": (0, 0, 0), "dark": (90, 90, 90), "white": PAPER}.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "none.png").write_bytes(b"no picture")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


EDITS = {
    "dalle inpaint": ("edit=inpaint", "image=picture.png", "mask=mask.png", PROMPT),
    "dalle outpaint": ("edit=outpaint", "image=picture.png", "editing.right=6", "editing.top=4", PROMPT),
    "unclip denoise": ("edit=denoise", "image=picture.png"),
    "unclip restore": ("edit=restore", "image=picture.png", "editing.blur=1.5", "editing.noise=0.1"),
    "unclip restore hole": ("edit=restore", "image=picture.png", "mask=mask.png", PROMPT),
    "unclip enhance": ("edit=enhance", "image=small.png", PROMPT),
    "unclip restyle": ("edit=restyle", "image=picture.png", "editing.strength=0.5", PROMPT),
    "unclip variations": ("edit=variations", "image=picture.png", "editing.eta=0.8"),
    "unclip inpaint": ("edit=inpaint", "image=picture.png", "mask=mask.png", PROMPT),
    "unclip outpaint": ("edit=outpaint", "image=picture.png", "editing.right=6", "editing.top=4", PROMPT),
    "unclip interpolate": ("edit=interpolate", "image=picture.png", "other=small.png", "editing.frames=3"),
    "unclip text_diff": ("edit=text_diff", "image=picture.png", "editing.source=a blue square", PROMPT),
    "unclip fixed noise": (
        "edit=interpolate",
        "image=picture.png",
        "other=small.png",
        "editing.frames=3",
        "editing.fixed_noise=true",
    ),
    "unclip reconstruct": ("edit=reconstruct", "image=picture.png", "editing.dims=[0,1,8]"),
}
FRAMES = {
    "unclip interpolate": 3, "unclip fixed noise": 3, "unclip text_diff": 5, "unclip reconstruct": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_leaves_pictures_and_a_recipe_that_makes_them_again(make, name):
    pipeline = name.split()[0]
    frames = FRAMES.get(name, 0)
    first = make("first", pipeline, *EDITS[name], *(() if frames else ("n=2",)), "seed=3")
    pictures = [f"{i:03d}-00.png" for i in range(frames)] or ["000-00.png", "000-01.png"]
    more = ["edit.json", "grid.png", "recipe.yaml", *(["sequence.gif"] if frames else [])]
    assert sorted(files_below(first)) == pictures + more
    report = json.loads((first / "edit.json").read_text())
    assert sorted(report["pictures"]) == pictures
    if pipeline == "unclip":  # DALL-E has no CLIP here
        assert all(-1 <= row["to_original"] <= 1 for row in report["pictures"].values())
        assert ("to_caption" in report["means"]) == (PROMPT in EDITS[name])
        assert ("judge/all" in report["means"]) == (PROMPT in EDITS[name] and "outpaint" not in name)
    other = "unclip" if pipeline == "dalle" else "dalle"
    again = make("again", other, "recipe=first/recipe.yaml", "seed=9")
    assert files_below(again) == files_below(first)
    size = Image.open(first / "000-00.png").size
    assert size == ((22, 20) if "outpaint" in name else (16, 16))
    assert len({(first / picture).read_bytes() for picture in pictures}) == len(pictures)
    if frames:
        with Image.open(first / "sequence.gif") as moving:
            assert moving.n_frames == 2 * frames - 2  # there and back


def test_inpainting_keeps_what_is_not_white_and_says_how_well_it_would_have_stayed(make, capsys):
    image, white = pixels(Path("picture.png")), pixels(Path("mask.png"))[..., 0] > 0
    out = make("pasted", "dalle", *EDITS["dalle inpaint"])
    assert (pixels(out / "000-00.png") == image)[~white].all()
    assert not (pixels(out / "000-00.png") == image)[white].all()
    said = capsys.readouterr().out
    assert "codes drawn anew: 12%" in said  # two of sixteen
    plain = make("plain", "dalle", *EDITS["dalle inpaint"], "editing.paste=false")
    off = (pixels(plain / "000-00.png") - image)[~white]
    dB = 20 * np.log10(255 / np.sqrt((off**2).mean()))
    assert f"the kept part, as the image tokenizer gives it back: {dB:.1f} dB" in said


@pytest.mark.parametrize("name", ["unclip inpaint", "unclip restyle", "unclip interpolate"])
def test_a_strip_shows_how_the_pictures_come_about(make, name):
    plain = make("plain", "unclip", *EDITS[name], "steps=4")
    shown = make("shown", "unclip", *EDITS[name], "steps=4", "progress_strip=true")
    assert (shown / "000-00.png").read_bytes() == (plain / "000-00.png").read_bytes()
    strip, side = Image.open(shown / "progress_strip.png"), MIN_CELL + GAP
    steps = 2 if name == "unclip restyle" else 4  # a strength of 0.5
    assert (strip.width - GAP) / side == steps
    assert strip.height // side == FRAMES.get(name, 1)


def test_a_picture_that_changed_is_not_the_recipes(make):
    make("first", "unclip", *EDITS["unclip denoise"])
    recipe = yaml.safe_load(Path("first/recipe.yaml").read_text())
    assert recipe["edit"]["files"]["image"]["path"] == "picture.png"
    Image.new("RGB", (16, 16)).save("picture.png")
    with pytest.raises(UserError, match=r"picture.png is another picture than it was"):
        make("again", "unclip", "recipe=first/recipe.yaml")
    Path("picture.png").unlink()
    with pytest.raises(UserError, match=r"there is no picture image=picture.png"):
        make("again", "unclip", "recipe=first/recipe.yaml")


def test_pictures_without_an_edit_have_recipes_as_before(make):
    out = make("plain", "dalle", PROMPT)
    assert "edit" not in yaml.safe_load((out / "recipe.yaml").read_text())


DAMAGE = {
    "no edit": ({"kind": "paint"}, "pipeline=unclip has no edit='paint'"),
    "another's": ({"kind": "inpaint"}, "edit.files say too little"),
    "settings": ({"settings": {"noise": -1}}, "editing.noise must be a number above 0, got -1"),
    "no picture": ({"files": {}}, "edit.files say too little"),
    "odd files": ({"files": {"image": {"path": "a"}}}, "edit.files"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_recipes_are_one_line(make, name):
    make("first", "unclip", *EDITS["unclip denoise"])
    facts = yaml.safe_load(Path("first/recipe.yaml").read_text())
    damage, message = DAMAGE[name]
    facts["edit"] |= damage
    Path("bad.yaml").write_text(yaml.safe_dump(facts))
    with pytest.raises(UserError) as error:
        make("again", "unclip", "recipe=bad.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dalle edit=inpant image=picture.png", "has no edit='inpant'; did you mean edit=inpaint?"),
        ("dalle edit=denoise image=picture.png", "edit=denoise is of pipeline=unclip, not of pipeline=dalle"),
        ("dalle image=picture.png", "image is of an edit: say which with edit="),
        ("dalle editing.left=3", "editing.left is of an edit: say which with edit="),
        ("dalle edit=inpaint mask=mask.png prompt=a", "edit=inpaint needs image="),
        ("dalle edit=inpaint image=picture.png prompt=a", "edit=inpaint needs mask="),
        ("dalle edit=inpaint image=picture.png mask=mask.png", "edit=inpaint needs prompt="),
        ("dalle edit=inpaint image=none.png mask=mask.png prompt=a", "image=none.png is broken; give"),
        ("dalle edit=inpaint image=gone.png mask=mask.png prompt=a", "there is no picture image=gone.png"),
        (
            "dalle edit=inpaint image=small.png mask=mask.png prompt=a",
            "mask=mask.png has 16 x 16 px, but the picture 8 x 8; give one of its size",
        ),
        (
            "dalle edit=outpaint image=picture.png prompt=a",
            "edit=outpaint needs editing.left= or editing.right= or editing.top= or editing.bottom=",
        ),
        ("dalle edit=outpaint image=picture.png editing.left=-1 prompt=a", "editing.left must be"),
        (
            "unclip edit=outpaint image=picture.png editing.left=1000000000 prompt=a",
            "editing.left must be a whole number from 0 to 4096, got 1000000000",
        ),
        ("dalle edit=inpaint image=picture.png mask=black.png prompt=a", "the mask is black all over, or"),
        ("unclip edit=inpaint image=picture.png mask=dark.png prompt=a", "or darker than middle gray"),
        ("unclip edit=restore image=picture.png mask=white.png", "the mask is white all over"),
        (
            "dalle edit=inpaint image=picture.png mask=mask.png prompt=a editing.blur=2",
            "editing.blur is no setting of edit=inpaint; its settings are editing.paste",
        ),
        ("dalle edit=inpaint image=picture.png mask=mask.png prompt=[a,b]", "takes one prompt, not 2"),
        (
            "dalle edit=inpaint image=picture.png mask=mask.png prompt=a init_image=picture.png",
            "init_image is not for edits",
        ),
        (
            "dalle edit=inpaint image=picture.png mask=mask.png prompt=a progress_strip=true",
            "progress_strip is not for edit=inpaint of pipeline=dalle; leave it out",
        ),
        (
            "unclip edit=outpaint image=picture.png editing.left=1 prompt=a progress_strip=true",
            "progress_strip is not for edit=outpaint of pipeline=unclip; leave it out",
        ),
        (
            "unclip edit=interpolate image=picture.png other=small.png editing.fixed_noise=1",
            "editing.fixed_noise must be true or false, got 1",
        ),
        ("unclip edit=restore image=picture.png", "edit=restore needs editing.blur= or mask="),
        ("unclip edit=restore image=picture.png mask=mask.png editing.blur=1", "editing.blur or mask, not"),
        ("unclip edit=denoise image=picture.png mask=mask.png", "edit=denoise takes no mask"),
        ("unclip edit=restyle image=picture.png prompt=a editing.strength=2", "editing.strength must be"),
        ("unclip edit=inpaint image=picture.png prompt=a", "edit=inpaint needs mask="),
        (
            "unclip edit=inpaint image=picture.png mask=mask.png prompt=a editing.resamplings=0",
            "editing.resamplings must be a whole number from 1 to 100, got 0",
        ),
        ("unclip edit=interpolate image=picture.png", "edit=interpolate needs other="),
        ("unclip edit=interpolate image=picture.png other=gone.png", "there is no picture other=gone.png"),
        ("unclip edit=interpolate image=picture.png other=small.png n=2", "one sequence, of editing.frames="),
        (
            "unclip edit=interpolate image=picture.png other=small.png editing.frames=1",
            "editing.frames must be a whole number from 2 to 1000, got 1",
        ),
        ("unclip edit=denoise image=picture.png other=small.png", "takes one picture; leave out other"),
        ("unclip edit=text_diff image=picture.png", "edit=text_diff needs prompt="),
        ("unclip edit=text_diff image=picture.png prompt=a editing.angle=.nan", "editing.angle must be"),
        ("unclip edit=text_diff image=picture.png prompt=a editing.angle=1.1", "editing.angle must be"),
        ("unclip edit=reconstruct image=picture.png editing.dims=[]", "editing.dims must be"),
        ("unclip edit=reconstruct image=picture.png editing.dims=[-1]", "editing.dims[0] must be"),
        ("unclip edit=reconstruct image=picture.png editing.dims=[.nan]", "editing.dims[0] must be"),
        ("unclip edit=reconstruct image=picture.png editing.dims=4", "editing.dims must be"),
        ("unclip edit=reconstruct image=picture.png n=2", "a picture for each of editing.dims="),
        ("dalle edit=reconstruct image=picture.png", "is of pipeline=unclip, not of pipeline=dalle"),
        ("unclip edit=variations", "edit=variations needs image="),
        ("unclip edit=variations image=picture.png prompt=a", "edit=variations reads no prompt; leave it"),
        ("unclip edit=variations image=picture.png editing.eta=.nan", "editing.eta must be a number from 0"),
        ("unclip edit=variations image=picture.png editing.eta=1.5", "editing.eta must be a number from 0"),
        ("unclip edit=variations image=picture.png sampler=heun", "is done by DDIM alone, not by heun; take"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_loaded(make, monkeypatch, words, message):
    def refuse(*_):
        raise AssertionError("stages were loaded")

    monkeypatch.setattr("dalle.pipelines.sampling.load", refuse)
    pipeline, *more = words.split()
    with pytest.raises(UserError) as error:
        make("out", pipeline, *more)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("out").exists()


def test_a_picture_that_is_not_small(make):
    with pytest.raises(UserError, match="enhance makes pictures of 8, 4, 2 px ones of 16 px"):
        make("out", "unclip", "edit=enhance", "image=picture.png")
    assert not Path("out").exists()
