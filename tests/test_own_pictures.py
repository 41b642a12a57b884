"""Pictures of one's own: the lines of the README and of its page as they stand, on a handful of them."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tiny import ROOT, configure

from dalle.errors import UserError
from dalle.run_dir import Run
from dalle.training.defaults import fill_lengths

PICTURES = 20
README, PAGE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/own_data.md"))
SECTIONS = (
    README.partition("## Your own pictures\n")[2].partition("\n## ")[0],
    PAGE.partition("## Real pictures")[0],
)
BLOCKS = sorted({block for text in SECTIONS for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)})
LADDERS = [
    [
        "train.py -m model=clip,prior,decoder,gan,vae {} name=mine",
        "train.py model=decoder model/net=unet {} name=mine overwrite=true",
        "sample.py name=mine prompt='thing 3'",
        "sample.py pipeline=gan name=mine prompt='thing 3'",
        "evaluate.py name=mine",
        "evaluate.py run=logs/mine/clip",
    ],
    [
        "train.py -m model=vqgan,dalle image_tokenizer=vqgan {} name=mine",
        "sample.py pipeline=dalle name=mine prompt='thing 3'",
        "evaluate.py run=logs/mine/vqgan",
    ],
    [
        "train.py model=vqvae {} name=mine",
        "train.py model=dvae {} name=other",
        "train.py model=dalle model/net=llama {} name=other",
        "train.py model=decoder model/net=dit {} name=mine",
    ],
]


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """PICTURES with captions beside them, FOLDERS by class."""
    made = {name: tmp_path / name for name in ("PICTURES", "FOLDERS")}
    for k in range(PICTURES):
        picture = Image.new("RGB", (40 + k, 50), (12 * k, 200 - 9 * k, 90))
        ImageDraw.Draw(picture).ellipse((5, 5, 20 + k, 30), fill=(255 - 12 * k, 40, 9 * k))
        for folder in (made["PICTURES"], made["FOLDERS"] / ("cats", "dogs")[k % 2]):
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{k}.png")
        (made["PICTURES"] / f"{k}.txt").write_text(f"thing {k}\na picture of thing {k}\n")
    return made


def test_there_are_blocks():
    assert len(BLOCKS) == 2  # the three lines, which both show, and class folders


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_lines_work_as_they_stand(block, shell, folders):
    lines = [line.split(" #")[0] for line in block.splitlines() if line.startswith("python ")]
    assert lines
    for line in lines:
        for name, folder in folders.items():
            line = line.replace(name, f"'{folder}'")
        ended = shell(line.removeprefix("python ") + " trainer.enable_progress_bar=false" * ("train" in line))
        assert "for 18 pictures of " in ended.out or "train.py" not in line
        assert "batch_size=8" in ended.out or "train.py" not in line


@pytest.mark.slow
@pytest.mark.parametrize("ladder", LADDERS, ids=["DALL-E 2", "DALL-E", "others"])
def test_every_stage_trains_and_is_used_with_twenty_pictures_of_any_size(ladder, shell, folders):
    own = (
        f"data=folder data.root='{folders['PICTURES']}' data.image_size=20 trainer.enable_progress_bar=false"
    )
    for line in ladder:
        shell(line.format(f"{own} trainer.enable_progress_bar=false"))
    for run in Path("logs").glob("*/*"):
        if (run / "manifest.json").exists():
            config = Run(run).config()
            assert "auto" not in (config["batch_size"], config["trainer"]["max_steps"])
            assert "auto" not in config["model"]["net"].values()
    for path in Path("logs").rglob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=decoder", "model.net.attention=[5]"], "attention names feature maps of side"),
        (["-m", "model=clip,prior,decoder", "datamodule.train_items=4", "batch_size=5"], "training set of 4"),
        (["model=decoder", "model.net.text_width=77"], "model.net.text_width=77 does not fit the data"),
        (["model=dalle", "model.net.heads=3"], "3 heads do not divide width 128"),
        (["model=dalle", "model.net.grid=9"], "model.net.grid=9 does not fit the data, which has 16"),
        (["model=gan", "model.discriminator.multipliers=[1,2,2,2,2,2,2]"], "cannot be folded"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_trains(command, no_training, folders, arguments, message):
    ended = command("train.py", *arguments, "data=folder", f"data.root='{folders['PICTURES']}'")
    assert message in ended.error
    left = [path for path in Path("logs").rglob("*") if path.is_file()]
    assert [path.name for path in left] in ([], ["multirun.yaml"])  # Hydra's own


def lengths(items: int, world: int = 1, batch="auto", steps="auto", saved=None) -> tuple[int, int, dict]:
    config = {
        "at_most": {"batch_size": 32, "max_steps": 3600}, "batch_size": batch, "model": {},
        "datamodule": {"batch_size": batch}, "trainer": {"max_steps": steps},
    }  # fmt: skip
    shorter = fill_lengths(config, items, world, saved)
    assert config["datamodule"]["batch_size"] == config["batch_size"]
    assert "at_most" not in config
    return config["batch_size"], config["trainer"]["max_steps"], shorter


def test_batches_and_steps_follow_the_number_of_pictures():
    assert lengths(40_000) == (32, 3600, {})
    assert lengths(1644) == (32, 3600, {})
    assert lengths(300) == (32, 1800, {"trainer.max_steps": 1800})
    assert lengths(18) == (8, 1000, {"batch_size": 8, "trainer.max_steps": 1000})
    assert lengths(5)[0] == 5
    assert lengths(1)[0] == 1
    assert lengths(18, world=2)[0] == 8
    assert lengths(40, world=4)[0] == 8
    assert lengths(18, world=3)[0] == 6
    assert lengths(18, batch=16, steps=7) == (16, 7, {})
    for items in range(1, 300):
        assert 1 <= lengths(items)[0] <= items


@pytest.mark.parametrize(
    ("size", "batch"), [(16, 32), (32, 32), (64, 32), (96, 21), (128, 16), (256, 8), (512, 8)]
)
def test_batches_of_large_pictures_are_smaller(size, batch):
    """Of networks that see them: twice the side, half the pictures, but never fewer than 8 by that."""
    for net, expected in (({"image_size": "auto"}, batch), ({"width": 128}, 32)):
        config = {
            "at_most": {"batch_size": 32, "max_steps": 3600}, "batch_size": "auto", "model": {"net": net},
            "datamodule": {}, "trainer": {"max_steps": 10}, "data": {"image_size": size},
        }  # fmt: skip
        shorter = fill_lengths(config, 40_000)
        assert config["batch_size"] == expected
        assert shorter == ({} if expected == 32 else {"batch_size": expected})


def test_a_run_that_is_resumed_keeps_what_it_had():
    saved = {"batch_size": 5, "trainer": {"max_steps": 77}}
    assert lengths(40_000, saved=saved)[:2] == (5, 77)


@pytest.mark.parametrize("value", [0, -1, "many", 1.5, True])
def test_at_most_is_a_number(tmp_path, value):
    config = configure("prior", tmp_path)
    config["at_most"]["batch_size"] = value
    with pytest.raises(UserError, match=r"at_most.batch_size must be a whole number"):
        fill_lengths(config, 10)


def test_networks_without_memory_make_no_numbers(tmp_path):
    """The check of a ladder moves nothing that a training draws."""
    from dalle.training import ladder

    torch.manual_seed(3)
    ladder.check([configure(model, tmp_path) for model in ("clip", "prior", "ar_prior", "dvae", "dalle")])
    drawn = torch.rand(1)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, torch.rand(1), rtol=0, atol=0)
