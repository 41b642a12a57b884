"""Folders of pictures: what is read, what is refused; captions from recipes; classes of sources."""

import pytest
from conftest import files_below
from PIL import Image

from dalle.data import folder
from dalle.data.imagefolder import ImageFolder
from dalle.data.shapes import Shapes
from dalle.errors import UserError
from dalle.evaluation.targets import Folder, classes_of
from dalle.images import to_uint8
from dalle.pipelines.recipe import SampleRecipe

SOURCE = Shapes("test", image_size=16, size=4)  # folders do not ask it


def paint(folder, names, size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        Image.new("RGB", size, (40 * k, 10, 200)).save(folder / name)
    return folder


def test_pictures_are_read_as_they_are(tmp_path):
    target = Folder(str(paint(tmp_path / "p", ["b.png", "a.png"])), tmp_path, None)
    assert (target.pictures, target.image_size, target.captioned) == (2, 8, False)
    images, _ = target.make(SOURCE, [0, 1], [])  # in the order of their names
    assert to_uint8(images)[:, :, 0, 0].tolist() == [[40, 10, 200], [0, 10, 200]]


@pytest.mark.parametrize(
    ("names", "size", "message"),
    [
        ([], (8, 8), r"has no picture that can be read; found none"),
        (
            ["a.png"],
            (8, 6),
            r"are of 8x6 \(a.png\), and only squares of one size compare; image_size=6 resizes",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, names, size, message):
    with pytest.raises(UserError, match=message):
        Folder(str(paint(tmp_path / "p", names, size)), tmp_path, None)


def test_a_file_and_nothing_are_no_folders(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        Folder(str(tmp_path / "file"), tmp_path, None)
    with pytest.raises(UserError, match="does not exist"):
        Folder(str(tmp_path / "nothing"), tmp_path, None)


def test_mixed_sizes_are_named_and_resized_on_request(tmp_path):
    paint(tmp_path / "p", ["a.png", "b.png"])
    paint(tmp_path / "p", ["c.png"], (16, 12))
    with pytest.raises(UserError, match=r"are of 8x8 \(a.png\) and 16x12 \(c.png\).*image_size=8 resizes"):
        Folder(str(tmp_path / "p"), tmp_path, None)
    target = Folder(str(tmp_path / "p"), tmp_path, 6)
    images, _ = target.make(SOURCE, [0, 1, 2], [])
    assert images.shape == (3, 3, 6, 6)
    assert "to 6 px, bicubic" in target.facts["resized"]


def test_broken_pictures_are_left_out_and_counted(tmp_path):
    root = paint(tmp_path / "p", ["a.png", "b.png", "c.png"])
    (root / "b.png").write_bytes(b"no picture")
    whole = (root / "c.png").read_bytes()
    (root / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"1 pictures are used; 2 are broken \(b.png, c.png\)"):
        target = Folder(str(root), tmp_path, None)
    assert (target.names, target.skipped) == (["a.png"], 2)
    (root / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="has no picture that can be read; found 3 pictures, all broken"):
        Folder(str(root), tmp_path, None)


def test_captions_of_a_recipe_of_text_files_and_of_some_only(tmp_path):
    sampled = paint(tmp_path / "s", ["000-00.png", "000-01.png", "001-00.png", "grid.png"])
    recipe = SampleRecipe(
        ["a ring", "a cross"], 2, 0, {"clip": {"path": "clip", "weights": "0"}}, {}, 1, "fp32", "cpu"
    )
    recipe.write(sampled / "recipe.yaml")
    target = Folder(str(sampled), tmp_path, None)
    assert target.captions(SOURCE, 3) == ["a ring", "a ring", "a cross"]
    paint(sampled, ["002-00.png"])
    with pytest.raises(UserError, match=r"002-00.png is none of the pictures of recipe.yaml, which has 2"):
        Folder(str(sampled), tmp_path, None)
    beside = paint(tmp_path / "t", ["a.png", "b.png"])
    (beside / "a.txt").write_text("an a\n")
    assert not Folder(str(beside), tmp_path, None).captioned
    (beside / "b.txt").write_text("a b\n")
    assert Folder(str(beside), tmp_path, None).captions(SOURCE, 2) == ["an a", "a b"]


def test_other_pictures_and_other_captions_are_another_subject(tmp_path):
    root = paint(tmp_path / "p", ["a.png"])
    first = Folder(str(root), tmp_path, None).facts["content"]
    assert Folder(str(root), tmp_path, None).facts["content"] == first
    (root / "a.txt").write_text("an a\n")
    second = Folder(str(root), tmp_path, None).facts["content"]
    Image.new("RGB", (8, 8), (1, 2, 3)).save(root / "a.png")
    assert len({first, second, Folder(str(root), tmp_path, None).facts["content"]}) == 3
    assert set(files_below(root)) == {"a.png", "a.txt"}


def test_classes_of_shapes_are_colours_and_shapes_of_single_objects():
    source = Shapes("test", image_size=16, size=40)
    sentences, labels = classes_of(source, range(40))
    captions, scenes = source.captions_of(range(40)), source.scenes(range(40))
    assert len(sentences) == 48
    assert ((labels >= 0) == (scenes.count == 1)).all()
    said = [(i, sentences[label][0]) for i, label in enumerate(labels.tolist()) if label >= 0]
    colours = [sentence.split()[1] for _, sentence in said]
    spoken = [(c, captions[i]) for (i, _), c in zip(said, colours, strict=True) if " red " in captions[i]]
    assert spoken
    assert all(colour == "red" for colour, _ in spoken)


def test_classes_of_class_folders_and_of_nothing(tmp_path):
    for name in ("cat", "dog"):
        paint(tmp_path / name, ["1.png", "2.png", "3.png"])
    source = ImageFolder(
        "train", tmp_path, 8, ["a photo of a {}", "a {}"], val_fraction=0.0, test_fraction=0.0
    )
    sentences, labels = classes_of(source, range(6))
    assert sentences == [("a photo of a cat", "a cat"), ("a photo of a dog", "a dog")]
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    (tmp_path / "cat" / "1.txt").write_text("x\n")
    assert classes_of(folder.Folder("train", tmp_path, 8), range(1)) is None
