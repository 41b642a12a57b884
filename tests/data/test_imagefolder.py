"""ImageFolder: captions from class folders; all else is Folder's."""

import pytest
from PIL import Image

from dalle.data.imagefolder import ImageFolder
from dalle.data.sources import Source
from dalle.errors import UserError

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)


def by_name(source):
    return {name: source.captions(i) for i, name in enumerate(source.names)}


def test_class_names_become_captions(tmp_path):
    put(tmp_path, "red_panda/a.png", "cat/deep/b.jpg")
    source = ImageFolder("train", tmp_path, 8, **WHOLE)
    assert isinstance(source, Source)
    assert by_name(source) == {
        "red_panda/a.png": ["a photo of a red panda"],
        "cat/deep/b.jpg": ["a photo of a cat"],
    }
    assert source.images([0]).shape == (1, 3, 8, 8)


def test_several_templates(tmp_path):
    put(tmp_path, "cat/a.png")
    assert ImageFolder("train", tmp_path, 8, ["a {}", "the {}"], **WHOLE).captions(0) == ["a cat", "the cat"]


def test_given_splits_and_a_class_called_train(tmp_path):
    put(tmp_path / "given", "train/cat/a.png", "val/dog/b.png")
    assert by_name(ImageFolder("val", tmp_path / "given", 8)) == {"val/dog/b.png": ["a photo of a dog"]}
    put(tmp_path / "traffic", "train/a.png", "car/b.png")
    captions = by_name(ImageFolder("train", tmp_path / "traffic", 8, **WHOLE))
    assert captions["train/a.png"] == ["a photo of a train"]


def test_pictures_without_a_class_are_reported(tmp_path):
    put(tmp_path, "cat/a.png", "loose.png")
    with pytest.warns(UserWarning, match=r"1 without a readable caption \(loose.png\)"):
        assert len(ImageFolder("train", tmp_path, 8, **WHOLE)) == 1


def test_mistakes(tmp_path):
    put(tmp_path, "loose.png")
    with pytest.raises(UserError, match="one folder per class"):
        ImageFolder("train", tmp_path, 8)
    with pytest.raises(UserError, match="where the class name goes"):
        ImageFolder("train", tmp_path, 8, "a photo")
    with pytest.raises(UserError, match="empty list"):
        ImageFolder("train", tmp_path, 8, [])
