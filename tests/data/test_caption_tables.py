"""Tables, splits and pictures as people have them: each is read, or named in one line."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dalle.data.caption_files import ClassNames
from dalle.data.folder import Folder
from dalle.data.image_files import inspect, read
from dalle.data.imagefolder import ImageFolder
from dalle.errors import UserError

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


def pictures(root, *names):
    """Small pictures, no two of them equal."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, len(name), 0)).save(root / name)


def read_all(root, **options):
    source = Folder("train", root, 8, **WHOLE | options)
    return {name: source.captions(i) for i, name in enumerate(source.names)}


EXPECTED = {"0.jpg": ["thing 0"], "1.jpg": ["thing 1"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", "filepath\ttitle\n0.jpg\tthing 0\n1.jpg\tthing 1\n"),
        ("captions.csv", '"File Name";"Caption"\n0.jpg;thing 0\n1.jpg;thing 1\n'),
        ("captions.csv", "sep=;\nimage;prompt\n0.jpg;thing 0\n1.jpg;thing 1\n"),
        ("captions.txt", "image,caption\r\n0.jpg,thing 0\r\n1.jpg,thing 1\r\n"),
        ("captions.tsv", "img\tsentence\n0\tthing 0\n1\tthing 1\n"),
        ("results.csv", "image_name| comment_number| comment\n0.jpg| 0| thing 0\n1.jpg| 0| thing 1\n"),
        ("Flickr8k.token.txt", "0.jpg#0\tthing 0\n1.jpg#0\tthing 1\n"),
        ("captions.csv", "0.jpg,thing 0\n1.jpg,thing 1\n"),
        ("captions.csv", "file_name,text\n%30.jpg,thing 0\n%31.jpg,\u200bthing 1\ufeff\n"),
        ("metadata.jsonl", "".join(f'{{"img": "{k}", "txt": "[\\"thing {k}\\"]"}}\n' for k in range(2))),
        ("metadata.json", json.dumps([{"file_name": f"{k}.jpg", "text": f"thing {k}"} for k in range(2)])),
        ("metadata.json", json.dumps({f"{k}.jpg": f"thing {k}" for k in range(2)})),
        ("metadata.json", '{"file_name": ["0.jpg", "1.jpg"], "text": ["thing 0", "thing 1"]}'),
        (
            "metadata.json",
            '{"image": {"0": "0.jpg", "1": "1.jpg"}, "caption": {"0": "thing 0", "1": "thing 1"}}',
        ),
        ("metadata.jsonl", "".join(f'{{"file_name": "{k}.jpg", "prompt": "thing {k}"}}\n' for k in range(2))),
        (
            "metadata.jsonl",
            "".join(f'{{"image": "x\\\\{k}", "caption": "thing {k}"}}\n' for k in range(2)),
        ),
    ],
)
def test_tables(tmp_path, name, text):
    pictures(tmp_path, "0.jpg", "1.jpg")
    (tmp_path / name).write_text(text, newline="")
    assert read_all(tmp_path) == EXPECTED


def test_unquoted_commas_and_stray_quotes_cut_nothing(tmp_path):
    pictures(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    rows = (
        'image,caption\n0.jpg,a red bird, on a branch, at dusk 0\n1.jpg,"a 5" nail\n2.jpg,"one\ntwo, three"\n'
    )
    (tmp_path / "captions.csv").write_text(rows)
    expected = [["a red bird, on a branch, at dusk 0"], ['"a 5" nail'], ["one\ntwo, three"]]
    assert list(read_all(tmp_path).values()) == expected


def test_a_huge_field_absolute_names_and_all_caption_columns(tmp_path):
    pictures(tmp_path, "sub/0.jpg")
    (tmp_path / "captions.csv").write_text(
        f'file,text,captions\n{tmp_path}/sub/0.jpg,{"x" * 200_000},"b, c"\n'
    )
    assert read_all(tmp_path) == {"sub/0.jpg": ["x" * 200_000, "b, c"]}


def test_columns_can_be_named(tmp_path):
    pictures(tmp_path, "0.jpg")
    (tmp_path / "captions.csv").write_text("bild;was;noch\n0.jpg;eins;zwei\n")
    found = read_all(tmp_path, image_column="bild", caption_column=["was", "noch"])
    assert found == {"0.jpg": ["eins", "zwei"]}


def test_names_that_several_pictures_have_are_named(tmp_path):
    pictures(tmp_path, "a/0.jpg", "b/0.jpg", "c.jpg")
    (tmp_path / "captions.csv").write_text("image,text\n0.jpg,which\nc.jpg,see\n")
    with pytest.warns(UserWarning, match="2 of a name that several have and captions.csv"):
        assert read_all(tmp_path) == {"c.jpg": ["see"]}


def test_a_list_for_more_folders_than_are_here_gives_no_picture_anothers_caption(tmp_path):
    pictures(tmp_path, "train/0.jpg")
    (tmp_path / "captions.csv").write_text("image,text\ntrain/0.jpg,mine\nval/0.jpg,another's\n")
    with pytest.warns(UserWarning, match="1 listed but not there"):
        assert read_all(tmp_path) == {"train/0.jpg": ["mine"]}


def test_null_and_surrogates(tmp_path):
    pictures(tmp_path, "0.jpg", "1.jpg")
    rows = '{"file_name": "0.jpg", "text": null}\n{"file_name": "1.jpg", "text": "cut \\ud83d"}\n'
    (tmp_path / "metadata.jsonl").write_text(rows)
    with pytest.warns(UserWarning, match=r"1 without a readable caption \(0.jpg\)"):
        assert read_all(tmp_path) == {"1.jpg": ["cut \ufffd"]}


def test_texts_beside_pictures_in_any_case(tmp_path):
    pictures(tmp_path, "IMG_0.JPG", "b.jpg")
    (tmp_path / "IMG_0.TXT").write_text("one\nes.utf8=uno\n")
    (tmp_path / "b.jpg.txt").write_text("two")
    assert read_all(tmp_path, lines="first") == {"IMG_0.JPG": ["one"], "b.jpg": ["two"]}


def test_what_is_no_picture_is_named_and_not_waited_for(tmp_path):
    pictures(tmp_path, "good.png", os.fsdecode(b"caf\xe9.png"))
    for path in list(tmp_path.glob("*.png")):
        path.with_suffix(".txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to(".")
    with pytest.warns(UserWarning, match=r"1 links that lead nowhere \(gone.png\); 1 no regular files"):
        source = Folder("train", tmp_path, 8, **WHOLE)
    assert len(source) == 2
    assert source.fingerprint()


def test_splits_of_the_usual_names_and_links(tmp_path, capsys):
    pictures(tmp_path, *(f"set/images/{s}/{k}.png" for s in ("train", "dev", "eval") for k in range(3)))
    pictures(tmp_path, "elsewhere/a.png")
    for path in list(tmp_path.rglob("*.png")):
        path.with_suffix(".txt").write_text("x")
    (tmp_path / "set/images/train/more").symlink_to(tmp_path / "elsewhere")
    sizes = [len(Folder(split, tmp_path / "set", 8)) for split in ("train", "val", "test")]
    assert sizes == [4, 3, 3]
    (line,) = capsys.readouterr().out.splitlines()
    assert "10 pictures with 10 captions from 10 text files; 4 train, 3 val, 3 test (by" in line


def test_equal_pictures_stay_in_one_split(tmp_path):
    pictures(tmp_path, *(f"{k}.png" for k in range(60)))
    for k in range(60):
        (tmp_path / f"{k}.txt").write_text("x")
    options = {"val_fraction": 0.3, "test_fraction": 0.3}
    before = {split: Folder(split, tmp_path, 8, **options).names for split in ("train", "val", "test")}
    for k in range(40):
        Image.new("RGB", (8, 8), "blue").save(tmp_path / f"same{k}.png")
        (tmp_path / f"same{k}.txt").write_text("x")
    with pytest.warns(UserWarning, match="40 equal to another"):
        after = {split: Folder(split, tmp_path, 8, **options).names for split in ("train", "val", "test")}
    assert sorted(sum(name.startswith("same") for name in names) for names in after.values()) == [0, 0, 40]
    assert all(set(before[split]) <= set(after[split]) for split in before)


def test_classes(tmp_path):
    names = ["animals/cat/0.png", "animals/ape/1.png", "unicorn/2.png"]
    found = ClassNames(("a photo of a {}",))(tmp_path, names, {})
    assert [found.captions[name][0] for name in names] == [
        "a photo of a cat",
        "a photo of an ape",
        "a photo of a unicorn",
    ]


@pytest.mark.parametrize("template", ["a {} in {style}", "{} {}", "{}{0}", "{0}"])
def test_templates(tmp_path, template):
    with pytest.raises(UserError, match="where the class name goes"):
        ImageFolder("train", tmp_path, 8, template)


def test_a_change_amid_a_picture_changes_its_digest(tmp_path):
    path = tmp_path / "a.bmp"
    Image.new("RGB", (64, 64)).save(path)
    before, content = inspect(path, 10**6).digest, bytearray(path.read_bytes())
    content[6000] ^= 1
    path.write_bytes(content)
    assert inspect(path, 10**6).digest != before


def test_16_bits_with_a_transparent_level_are_white_there(tmp_path):
    levels = np.full((8, 8), 65535 // 2, np.uint16)
    levels[:, :4] = 1000
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=1000)
    seen = read(tmp_path / "a.png", 8, 1, 10**6)
    assert (seen[:, :3] == 255).all()
    assert (seen[:, 5:] == 127).all()


def test_a_broken_profile_is_left_aside_and_srgb_changes_nothing(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("a.png", srgb), ("b.png", b"nonsense")):
        image.save(tmp_path / name, icc_profile=profile)
        assert (read(tmp_path / name, 8, 1, 10**6) == np.asarray(image)).all()
    assert inspect(tmp_path / "b.png", 10**6).odd_profile


@pytest.mark.parametrize(("fit", "white"), [("crop", 0), ("pad", 96), ("squash", 0)])
def test_fit(tmp_path, fit, white):
    Image.new("RGB", (32, 8)).save(tmp_path / "a.png")
    seen = torch.from_numpy(read(tmp_path / "a.png", 16, 1, 10**6, fit).copy())
    assert seen.shape == (16, 16, 3)
    assert (seen == 255).all(-1).sum() == white * 2
