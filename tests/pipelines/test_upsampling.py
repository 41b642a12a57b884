"""sample.py upsamplers=[...] and pipeline=upsampler, on tiny stages with random weights."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import untrained
from PIL import Image

from dalle.diffusion.samplers import Sampler
from dalle.images import from_uint8, save_png, to_pil
from dalle.pipelines.load import load_vae, with_upsamplers
from dalle.run_dir import load_stage
from dalle.stages.decoder import DecoderStage

FAST = ("precision=fp32", "steps=2", "upsampling.steps=2", "pipeline.prior_sampler.steps=2")
LARGER = ("data.image_size=32",)


@pytest.fixture(scope="module")
def logs(untrained_stages, tmp_path_factory) -> Path:
    """Stages that draw 16 px, and upsamplers of 8 -> 16, 16 -> 32 and 32 -> 64 px."""
    logs = tmp_path_factory.mktemp("upsampling") / "logs"
    shutil.copytree(untrained_stages, logs)
    untrained("upsampler", logs, *LARGER)
    untrained("upsampler", logs, "data.image_size=64", f"paths.run='{logs}/default/second'", seed=1)
    untrained("upsampler", logs, "name=tiny")
    untrained("vae", logs)
    return logs


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two pictures of different sizes, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, shape in (("a", (3, 16, 16)), ("b", (3, 10, 24))):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        save_png(to_pil(from_uint8(pixels)), folder / f"{name}.png")
    (folder / "a.txt").write_text("no picture")
    return folder


def pictures(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.png"))}


@pytest.mark.parametrize(
    "words",
    [
        ("pipeline=unclip", "prompt=[a red circle, a ring]", "n=2", *FAST),
        ("pipeline=dalle", "prompt=a red circle", "precision=fp32", "upsampling.steps=2"),
    ],
)
def test_a_cascade_and_its_recipe(logs, command, tmp_path, words):
    """Drawn at 16 px, enlarged twice; made again bit for bit, also where the runs were moved."""
    out, again = tmp_path / "out", tmp_path / "again"
    ended = command(
        "sample.py", *words, f"paths.logs='{logs}'", f"out='{out}'", "upsamplers=[upsampler,second]"
    )
    assert ended.code == 0, ended
    with Image.open(out / "000-00.png") as image:
        assert image.size == (64, 64)
    assert command("sample.py", f"recipe='{out / 'recipe.yaml'}'", f"out='{again}'").code == 0
    assert pictures(again) == pictures(out)


def test_drawn_pictures_are_what_is_enlarged(logs, command, tmp_path):
    words = ("pipeline=unclip", "prompt=a ring", *FAST, f"paths.logs='{logs}'")
    command("sample.py", *words, f"out='{tmp_path / 'small'}'")
    command("sample.py", *words, f"out='{tmp_path / 'large'}'", "upsamplers=[upsampler]")
    low = Image.open(tmp_path / "small" / "000-00.png")
    pixels = from_uint8(torch.tensor(list(low.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1))
    loaded = with_upsamplers(
        load_vae(logs / "default" / "vae"), {"upsampler_1": logs / "default" / "upsampler"}
    )
    made = loaded.pipeline.upsample(pixels[None], options={"upsampler_1": {"sampler": Sampler("ddim", 2)}})
    large = Image.open(tmp_path / "large" / "000-00.png")
    difference = (
        torch.tensor(list(large.tobytes())).float() - torch.tensor(list(to_pil(made[0]).tobytes())).float()
    )
    assert difference.abs().mean() < 3  # the small ones were rounded to 8 bits here


def test_pictures_do_not_depend_on_the_batch(logs):
    pipeline = with_upsamplers(
        load_vae(logs / "default" / "vae"), {"upsampler_1": logs / "default" / "upsampler"}
    ).pipeline
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    options = {"upsampler_1": {"sampler": Sampler("ddim", 2)}}
    together = pipeline.upsample(images, seed=4, options=options)
    alone = pipeline.upsample(images[2:], seed=4, numbers=[2], batch_size=1, options=options)
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-4)


def test_a_folder_of_pictures_of_any_size(logs, folder, command, tmp_path):
    out = tmp_path / "out"
    words = ("pipeline=upsampler", f"paths.logs='{logs}'", "precision=fp32", "upsampling.steps=2", "n=2")
    assert command("sample.py", *words, f"images='{folder}'", f"out='{out}'").code == 0
    sizes = {p.name: Image.open(p).size for p in out.glob("0*.png")}
    assert sizes == {"000-00.png": (32, 32), "000-01.png": (32, 32),
                     "001-00.png": (48, 20), "001-01.png": (48, 20)}  # fmt: skip
    assert (out / "000-00.png").read_bytes() != (out / "000-01.png").read_bytes()
    again = tmp_path / "again"
    assert command("sample.py", f"recipe='{out / 'recipe.yaml'}'", f"out='{again}'").code == 0
    assert pictures(again) == pictures(out)
    save_png(Image.new("RGB", (16, 16)), folder / "a.png")
    error = command("sample.py", f"recipe='{out / 'recipe.yaml'}'", f"out='{tmp_path / 'third'}'").error
    assert "a.png is another picture than it was" in error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["upsamplers=[second]"], "upsampler_1 enlarges pictures of 32 px to 64 px, but what comes before it "
                                  "draws 16 px; give an upsampler trained with data.image_size=32"),
        (["upsamplers=[upsampler,upsampler]"], "upsampler_2 enlarges pictures of 16 px"),
        (["upsamplers=[nobody]"], "nobody holds no finished run"),
        (["upsamplers=[decoder]"], "holds a decoder, but an upsampler is needed here"),
        (["upsamplers=upsampler"], "upsamplers must be a list"),
        (["upsamplers=[upsampler]", "upsampling.steps=0"], "upsampling.steps must be a whole number from 1"),
        (["upsamplers=[upsampler]", "upsampling.noise_level=2"], "upsampling.noise_level must be"),
        (["upsamplers=[upsampler]", "upsampling.noise_level=0.3"], "noise_level=0.3 is not from 0 to 0.2"),
        (["upsamplers=[upsampler]", "upsampling.tile=4"], "tile=4 with an overlap of 4 is too small"),
        (["pipeline=dalle", "upsamplers=[upsampler]", "progress_strip=true"], "leave out upsamplers"),
    ],
)  # fmt: skip
def test_what_does_not_fit(logs, command, monkeypatch, words, line):
    def refuse(*args, **kwargs):
        raise AssertionError("something was drawn")

    monkeypatch.setattr(DecoderStage, "sample", refuse)
    assert line in command("sample.py", f"paths.logs='{logs}'", "prompt=a ring", *words).error


def test_folders_that_cannot_be_read(logs, command, tmp_path, folder):
    def error(*words: str) -> str:
        return command("sample.py", "pipeline=upsampler", f"paths.logs='{logs}'", *words).error

    assert "say which pictures to enlarge: images=FOLDER" in error()
    assert f"images={tmp_path / 'nothing'} does not exist" in error(f"images='{tmp_path / 'nothing'}'")
    assert "a.txt is not a folder" in error(f"images='{folder / 'a.txt'}'")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no pictures" in error(f"images='{empty}'")
    assert "reads no prompts" in error(f"images='{folder}'", "prompt=x")
    (folder / "c.png").write_bytes(b"no png")
    (folder / "d.jpg").write_bytes(b"")
    assert "c.png is broken and 1 more cannot be read either; take out" in error(f"images='{folder}'")


def test_the_python_surface_gives_what_the_stage_gives(logs):
    stage, _ = load_stage(logs / "default" / "upsampler")
    assert (stage.low_size, stage.net.image_size) == (16, 32)
    pipeline = load_vae(logs / "default" / "vae").pipeline
    images = torch.zeros(1, 3, 16, 16)
    assert pipeline.upsample(images) is images  # none after it
