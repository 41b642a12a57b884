"""Folder: every kind of picture and caption file, splits that stay put, and bad input reported once."""

import json
import multiprocessing
import os
import struct
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features
from torch.utils.data import DataLoader

from dalle.data.datamodules import ImageDataModule
from dalle.data.folder import Folder
from dalle.data.image_files import BadPicture, read, to_rgb
from dalle.data.sources import EpochSampler, Source, SourceDataset, identity_collate
from dalle.data.splits import divide
from dalle.errors import UserError

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}  # all pictures in training


def picture(color=(255, 0, 0), size=(8, 8), mode="RGB"):
    return Image.new(mode, size, color)


def put(root, name, image=None, caption="a thing", **options):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def folder(root, split="train", size=8, **options):
    return Folder(split, root, size, **WHOLE | options)


def levels(source, item=0):
    """One image as bytes (H, W, 3)."""
    return ((source.images([item])[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)


def test_is_a_source_with_exact_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    put(tmp_path, "a.png", Image.fromarray(noise), "one\n\n  two  \n")
    source = folder(tmp_path)
    assert isinstance(source, Source)
    assert source.captions(0) == ["one", "two"]
    assert torch.equal(levels(source), torch.from_numpy(noise))
    assert source.images([0, 0]).dtype == torch.float32
    assert source.images([0]).aminmax() == (noise.min() / 127.5 - 1, noise.max() / 127.5 - 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "PNG"])
def test_file_formats(tmp_path, suffix):
    put(tmp_path, f"deep/er/a.{suffix}", picture((0, 0, 255), (32, 32)))
    torch.testing.assert_close(
        levels(folder(tmp_path)).float().mean((0, 1)), torch.tensor([0.0, 0.0, 255.0]), atol=3, rtol=0
    )


def gray16():
    return Image.fromarray(np.full((8, 8), 32896, np.uint16))  # 128 * 257


def palette_with_hole():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (picture((255, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (picture((255, 0, 0, 128), mode="RGBA"), (255, 127, 127)),
        (picture((0, 0), mode="LA"), (255, 255, 255)),
        (picture(100, mode="L"), (100, 100, 100)),
        (picture(1, mode="1"), (255, 255, 255)),
        (gray16(), (128, 128, 128)),
        (palette_with_hole(), (255, 255, 255)),
        (picture((1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), (1, 2, 3)),
    ],
    ids=["clear", "half clear", "gray clear", "gray", "1 bit", "16 bit", "palette with hole", "palette"],
)
def test_modes_in_png(tmp_path, image, expected):
    put(tmp_path, "a.png", image)
    assert (levels(folder(tmp_path)) == torch.tensor(expected, dtype=torch.uint8)).all()


def test_cmyk(tmp_path):
    put(tmp_path, "a.jpg", picture((0, 255, 255, 0), (32, 32), "CMYK"))
    red = levels(folder(tmp_path)).float().mean((0, 1))
    assert red[0] > 200 > 60 > max(red[1], red[2])


def wide_gamut(
    red=(0.60974, 0.31111, 0.01947), green=(0.20528, 0.62567, 0.06087), blue=(0.14919, 0.06322, 0.74457)
):
    """A profile of three primaries (Adobe RGB's, in XYZ under D50) and a gamma of 563/256."""

    def s15(*values):
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 563) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1.0, 0.8249)}
    tags |= {k: b"XYZ " + bytes(4) + s15(*v) for k, v in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    size = struct.pack(">I", at + len(body))
    head = size + bytes(4) + b"\x02\x10\0\0" + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += s15(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def in_srgb(colour):
    """What `wide_gamut` means by a colour, in 8 bits of sRGB."""
    wide = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
    srgb = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
    linear = (np.array(colour) / 255) ** (563 / 256) @ wide @ np.linalg.inv(srgb)
    bent = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055)
    return (bent.clip(0, 1) * 255).round()


@pytest.mark.parametrize("colour", [(100, 180, 100), (200, 120, 60), (128, 128, 128), (255, 255, 255)])
def test_colours_of_a_wide_gamut_become_those_of_srgb(tmp_path, colour):
    put(tmp_path, "a.png", picture(colour), icc_profile=wide_gamut())
    got = levels(folder(tmp_path))[0, 0].numpy().astype(float)
    assert abs(got - in_srgb(colour)).max() <= 2
    assert colour[0] == colour[1] or abs(got - colour).max() > 10  # the profile changes it


@pytest.mark.parametrize(
    ("name", "image", "options", "off"),
    [
        ("a.jp2", picture((10, 20, 30), (32, 32)), {"irreversible": False}, 0),
        ("a.avif", picture((10, 120, 30), (32, 32)), {"quality": 100}, 4),
        ("a.tiff", Image.fromarray(np.full((8, 8), 0.5, np.float32)), {}, 0),
        ("a.tif", picture((10, 20, 30)).convert("RGB"), {"compression": "tiff_lzw"}, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rarer_formats(tmp_path, name, image, options, off):
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    put(tmp_path, name, image, **options)
    expected = (128, 128, 128) if image.mode == "F" else image.getpixel((0, 0))
    got = levels(folder(tmp_path)).int()
    assert (got - torch.tensor(expected)).abs().max() <= off


def test_lab(tmp_path):
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = ImageCms.applyTransform(picture((200, 60, 90)), lab)
    put(tmp_path, "a.tiff", image)
    assert (levels(folder(tmp_path)).int() - torch.tensor((200, 60, 90))).abs().max() <= 4


def test_animations_show_their_first_frame(tmp_path):
    frames = [picture((0, 255, 0)), picture((0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.txt").write_text("x")
    assert levels(folder(tmp_path))[0, 0].tolist() == [0, 255, 0]


def test_32_bit_gray_holds_16_bits():
    assert to_rgb(Image.fromarray(np.full((2, 2), 65535, np.int32))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """The top left corner of the upright picture is white, wherever the camera stored it."""
    upright = Image.new("RGB", (64, 64))
    upright.paste("white", (0, 0, 32, 32))
    # How to undo each orientation (Exif 2.3, tag 0x0112), as the stored picture must have been turned.
    turn = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(tmp_path, "a.jpg", stored, exif=exif, quality=95)
    seen = levels(folder(tmp_path)).float().mean(-1) > 127
    assert seen[:4, :4].all()
    assert seen.sum() == 16


@pytest.mark.parametrize(("size", "left"), [((16, 8), True), ((8, 16), False)])
def test_center_crop_keeps_the_middle(tmp_path, size, left):
    image = picture((0, 0, 0), size)
    image.paste("white", (4, 0, 12, 8) if left else (0, 4, 8, 12))
    put(tmp_path, "a.png", image)
    assert (levels(folder(tmp_path)) == 255).all()


def test_shrinking_does_not_alias(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # a plain subsampling by 8 would give all white
    put(tmp_path, "a.png", Image.fromarray(stripes))
    assert (levels(folder(tmp_path)).float() - 127.5).abs().max() < 12


def test_extreme_shapes_stay_cheap(tmp_path):
    put(tmp_path, "a.png", picture(size=(20_000, 1)))
    put(tmp_path, "b.png", picture(size=(1, 1)))
    assert folder(tmp_path).images([0, 1]).shape == (2, 3, 8, 8)
    assert folder(tmp_path, crop="random").images([0, 1]).shape == (2, 3, 8, 8)


def test_random_crops_depend_on_the_epoch_and_on_nothing_else(tmp_path):
    ramp = np.repeat(np.arange(0, 160, 10, np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    put(tmp_path, "a.png", Image.fromarray(ramp))
    source, again = folder(tmp_path, crop="random"), folder(tmp_path, crop="random")
    assert not source.fixed
    crops = [source.images([0], epoch) for epoch in range(60)]
    assert all(torch.equal(crop, again.images([0], epoch)) for epoch, crop in enumerate(crops))
    lefts = {int(((crop[0, 0, 0, 0] + 1) * 127.5).round()) for crop in crops}
    assert lefts == set(range(0, 90, 10))
    assert folder(tmp_path, "val", crop="random", val_fraction=0.5).fixed


# Captions


def write(path, text):
    path.write_text(text, encoding="utf-8")


def several(root, *names):
    for name in names:
        put(root, name, caption=None)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_jsonl(tmp_path, bom):
    several(tmp_path, "a.png", "sub/b.png", "c.png")
    rows = [
        {"file_name": "a.png", "text": "ä thing"},
        {"file_name": "sub/b.png", "captions": ["x", "y\u2028z"]},
        {"file_name": "c.png", "caption": "see"},
    ]
    write(
        tmp_path / "metadata.jsonl", bom + "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    )
    source = folder(tmp_path)
    assert {n: source.captions(i) for i, n in enumerate(source.names)} == {
        "a.png": ["ä thing"],
        "c.png": ["see"],
        "sub/b.png": ["x", "y\u2028z"],
    }


@pytest.mark.parametrize("header", ["file_name,caption", "image, text", "\ufeffsize,file,captions"])
def test_csv(tmp_path, header):
    several(tmp_path, "a.png", "b.png")
    lead = "9," if header.startswith("\ufeff") else ""
    write(
        tmp_path / "captions.csv",
        f'{header}\n{lead}a.png,"red, or so"\n{lead}b.png,blue\n{lead}a.png,again\n',
    )
    source = folder(tmp_path)
    assert [source.captions(i) for i in range(2)] == [["red, or so", "again"], ["blue"]]


def test_a_named_table_and_tables_in_subfolders(tmp_path):
    several(tmp_path, "a.png", "sub/b.png")
    write(tmp_path / "mine.csv", "file,text\na.png,mine\n")
    write(tmp_path / "sub/metadata.jsonl", '{"file_name": "b.png", "text": "below"}')
    with pytest.warns(UserWarning, match="1 without a readable caption"):
        assert folder(tmp_path, captions="mine.csv").captions(0) == ["mine"]
    with pytest.warns(UserWarning, match="without"):
        assert folder(tmp_path).captions(0) == ["below"]


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("images/a.png", "captions/a.txt"),
        ("images/x/a.png", "text/x/a.txt"),
        ("images/train/a.png", "captions/train/a.TXT"),
        ("train/images/a.png", "train/captions/a.txt"),
        ("img/a.png", "txt/a.png.txt"),
        ("a.png", "captions/a.txt"),
        ("photos/a.png", "photos/captions/a.txt"),
    ],
)
def test_captions_in_a_folder_of_their_own(tmp_path, image, text):
    put(tmp_path, image, caption=None)
    (tmp_path / text).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / text).write_text("a thing\nanother")
    assert folder(tmp_path).captions(0) == ["a thing", "another"]


def test_a_text_that_several_pictures_may_mean_is_nobodys(tmp_path):
    for name in ("images/a.png", "pictures/a.png", "images/b.png"):
        put(tmp_path, name, caption=None)
    (tmp_path / "captions").mkdir()
    for name in "ab":
        (tmp_path / "captions" / f"{name}.txt").write_text(f"thing {name}")
    with pytest.warns(UserWarning, match=r"2 without a readable caption \(images/a.png, pictures/a.png\)"):
        source = folder(tmp_path)
    assert source.names == ["images/b.png"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train.parquet", "1 parquet files, which data=table data.path={root} reads"),
        ("00000.TAR", "1 WebDataset .tar. files, which data=webdataset data.shards={root}/00000.TAR reads"),
        (
            "00000.tar 1.tar",
            r"2 WebDataset .tar. files, which data=webdataset data.shards={root}/\*.tar reads",
        ),
        ("all.zip", "1 zip files, which data=folder data.root={root}/all.zip reads"),
        ("all.tar.gz", "1 tar.gz files, which have to be unpacked first"),
        ("titles.tsv.gz", "1 packed table files, which have to be unpacked first"),
    ],
)
def test_other_formats_are_named_with_what_reads_them(tmp_path, name, said):
    for file in name.split():
        (tmp_path / file).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=rf"no usable picture.*{said.format(root=tmp_path)}"):
        folder(tmp_path)


def test_a_table_and_texts_complete_each_other(tmp_path):
    put(tmp_path, "a.png", caption="from text")
    several(tmp_path, "b.png")
    write(tmp_path / "captions.csv", "file,text\nb.png,from table\n")
    source = folder(tmp_path)
    assert [source.captions(i) for i in range(2)] == [["from text"], ["from table"]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"text": "x"}', "columns that are known: it has text;.*data.image_column=NAME"),
        ("metadata.jsonl", "{oops", "no line of it is a JSON object"),
        ("captions.csv", "bild;was\na.png;red\n", "it has bild, was; data.image_column=NAME"),
        ("captions.csv", "", "captions.csv is empty"),
    ],
)
def test_a_table_that_says_nothing_is_named_with_its_columns(tmp_path, name, text, message):
    several(tmp_path, "a.png")
    write(tmp_path / name, text)
    with pytest.raises(UserError, match=message):
        folder(tmp_path)


def test_one_broken_line_is_left_out_and_named(tmp_path):
    several(tmp_path, "a.png")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": 3}\n{oops\n')
    with pytest.warns(UserWarning, match=r"1 lines of metadata.jsonl .*\(line 2\)"):
        assert folder(tmp_path).captions(0) == ["3"]


# Splits


names = st.lists(
    st.text("abcxyz/", min_size=1, max_size=6).map(lambda s: f"n{s}.png"), unique=True, max_size=60
)


@given(names, st.integers(0, 5))
def test_splits_are_a_partition_and_none_is_empty(names, seed):
    splits = divide(names, 0.1, 0.1, seed)
    if len(names) >= 3:
        assert sorted(chain(*splits.values())) == sorted(names)
        assert all(splits.values())
    else:
        assert all(split == names for split in splits.values())


def test_splits_are_as_large_as_asked_for():
    splits = divide([f"{i}.png" for i in range(5000)], 0.1, 0.3)
    assert len(splits["val"]) == pytest.approx(500, abs=80)
    assert len(splits["test"]) == pytest.approx(1500, abs=120)


@settings(max_examples=25)
@given(st.integers(100, 300), st.integers(0, 99))
def test_a_name_stays_in_its_split_when_others_come(n, seed):
    few, many = [f"{i}.png" for i in range(100)], [f"{i}.png" for i in range(n)]
    before, after = divide(few, 0.3, 0.3, seed), divide(many, 0.3, 0.3, seed)
    assert all(set(before[split]) <= set(after[split]) for split in before)


def test_the_seed_moves_the_splits_and_a_zero_fraction_is_empty():
    names = [f"{i}.png" for i in range(100)]
    assert divide(names, 0.2, 0.2, 0) != divide(names, 0.2, 0.2, 1)
    assert divide(names, 0.0, 0.0) == {"train": names, "val": [], "test": []}


def test_given_folders_decide(tmp_path):
    for k, name in enumerate(("train/a.png", "train/b.png", "train/c.png", "validation/d.png", "e.png")):
        put(tmp_path, name, picture((k, 0, 0)))
    with pytest.warns(UserWarning, match=r"1 outside the folders of the splits \(e.png\)"):
        val = Folder("val", tmp_path, 8)
    train, test = Folder("train", tmp_path, 8), Folder("test", tmp_path, 8)
    assert val.names == ["validation/d.png"]
    assert len(test) == 1
    assert sorted(train.names + test.names) == ["train/a.png", "train/b.png", "train/c.png"]


# Bad input


def damaged(root):
    """One good picture and one of each kind that cannot be used."""
    put(root, "good.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.gif", "cut.bmp"):
        path = put(root, name.replace(".", f"_{name[4:]}."), noise)
        path.write_bytes(path.read_bytes()[:1500])
    put(root, "empty.png").write_bytes(b"")
    put(root, "text.jpg").write_bytes(b"not a picture")
    put(root, "silent.png", caption=None)
    put(root, "blank.png", caption=" \n")
    put(root, "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    put(root, "large.png", picture(size=(101, 100)))
    write(root / "captions.csv", "file,text\ngone.png,x\n")


def test_bad_pictures_are_left_out_and_reported_once(tmp_path):
    damaged(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sources = [folder(tmp_path, split, max_pixels=10_000) for split in ("train", "val", "test")]
    assert sources[0].names == ["good.png"]
    (report,) = [str(w.message) for w in caught]
    for part in (
        "1 pictures are used",
        "6 broken (cut_bmp.bmp, cut_gif.gif, cut_jpg.jpg, ...)",
        "1 empty (empty.png)",
        "2 without a readable caption (blank.png, silent.png)",
        "1 with a caption that is not UTF-8 text, as it has to be saved (latin.png)",
        "1 larger than 10000 pixels (large.png)",
        "1 listed but not there (gone.png)",
    ):
        assert part in report


def test_a_bomb_is_not_decoded(tmp_path):
    path = put(tmp_path, "bomb.png")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"1 (larger than 64000000 pixels|broken) \(bomb.png\)"):
        folder(tmp_path)


@pytest.mark.parametrize(("copies", "others"), [(20, 0), (20, 1)])
def test_fewer_than_three_different_pictures_are_in_every_split(tmp_path, capsys, copies, others):
    """Copies of one picture go where the first goes, which would leave nothing to validate with."""
    for k in range(copies + others):
        put(tmp_path, f"{k:02}.png", picture((max(0, k + 1 - copies), 0, 0)), caption=f"number {k}")
    with pytest.warns(UserWarning, match=rf"{copies} equal to another \(1 different ones\) \("):
        sizes = [len(Folder(split, tmp_path, 8)) for split in ("train", "val", "test")]
    assert sizes == [copies + others] * 3
    assert "fewer than 3 different ones are in every split" in capsys.readouterr().out


def test_copies_of_three_pictures_are_divided(tmp_path):
    for k in range(20):
        put(tmp_path, f"{k:02}.png", picture((k % 3, 0, 0)))
    with pytest.warns(UserWarning, match="20 equal to another .3 different ones., kept in one split"):
        sizes = [len(Folder(split, tmp_path, 8)) for split in ("train", "val", "test")]
    assert sum(sizes) == 20
    assert min(sizes) >= 6


def test_a_picture_that_breaks_while_being_read_is_replaced_with_its_caption(tmp_path):
    for name in "abc":
        put(tmp_path, f"{name}.png", picture((ord(name), 0, 0), (64, 64)), caption=name)
    source = folder(tmp_path)
    content = bytearray((tmp_path / "b.png").read_bytes())
    content[60] ^= 255  # amid the pixels: both ends stay right
    (tmp_path / "b.png").write_bytes(content)
    with pytest.warns(UserWarning, match=r"b.png: broken; another picture takes its place"):
        images = source.images([0, 1, 2])
    assert torch.equal(images[1], images[2])
    assert [source.captions(i) for i in range(3)] == [["a"], ["c"], ["c"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.images([1])


def test_when_all_break_it_says_so(tmp_path):
    put(tmp_path, "a.png")
    source = folder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="none of the 1"), pytest.warns(UserWarning, match="takes its place"):
        source.images([0])


def test_a_root_of_no_use_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        folder(tmp_path / "nowhere")
    write(tmp_path / "notes.md", "")
    with pytest.raises(UserError, match="is not a folder"):
        folder(tmp_path / "notes.md")
    with pytest.raises(UserError, match=r"Looked for \.png.*same name.*found 0 pictures among 1 files"):
        folder(tmp_path)
    put(tmp_path, "a.png", caption=None)
    with pytest.raises(UserError, match=r"found 1 pictures: 1 without a readable caption \(a.png\)"):
        folder(tmp_path)
    with pytest.raises(UserError, match=r"no file .*none\.csv"):
        folder(tmp_path, captions="none.csv")
    with pytest.raises(UserError, match="nothing to train on"):
        Folder("train", tmp_path, 8, val_fraction=0.6, test_fraction=0.4)


def test_hidden_files_are_not_pictures(tmp_path):
    for name in ("a.png", "._b.png", ".cache/c.png"):
        put(tmp_path, name)
    assert folder(tmp_path).names == ["a.png"]


# Memory and identity


def test_each_file_is_decoded_once_also_across_workers(tmp_path):
    for i in range(6):
        put(tmp_path, f"{i}.png", picture((i, i, i)))
    source = folder(tmp_path)
    loader = DataLoader(
        SourceDataset(source), batch_sampler=EpochSampler(6, 2), collate_fn=identity_collate, num_workers=1
    )
    first = torch.cat([batch["image"] for batch in loader])
    for path in tmp_path.glob("*.png"):
        path.unlink()  # what workers have read, this process knows
    assert torch.equal(source.pixels(range(6)), first)


@pytest.mark.parametrize("size", [24, 9], ids=["as it is", "made smaller"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_picture_that_need_not_change_is_read_as_pillow_reads_it(tmp_path, mode, size):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).convert(mode)
    stored.save(tmp_path / "a.jpg", quality=90)
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft(None, (2 * size, 2 * size))
        expected = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    assert (read(tmp_path / "a.jpg", size, 1, 10**6) == expected).all()


def test_pictures_leave_a_worker_as_bytes_and_become_the_numbers_of_images(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    for name, pixels in zip("abcd", values, strict=True):
        put(tmp_path, f"{name}.png", Image.fromarray(pixels))
    source = Folder("train", tmp_path, 16, **WHOLE)
    batch = SourceDataset(source).__getitems__(range(4))
    assert batch["image"].dtype == torch.uint8
    assert (batch["image"].permute(0, 2, 3, 1).numpy() == values).all()
    datamodule = ImageDataModule(
        lambda split: source, 4, val_items=None, test_items=None, train_items=None
    )  # fmt: skip
    made = datamodule.on_after_batch_transfer(dict(batch), 0)["image"]
    assert made.is_contiguous()
    assert torch.equal(made, source.images(range(4)))
    exact = values.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert (made.permute(0, 2, 3, 1).numpy() == exact).all()


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
def test_workers_name_a_broken_picture_once(tmp_path, monkeypatch):
    """Two that read it at the same time."""
    for name in "abc":
        put(tmp_path, f"{name}.png", picture((ord(name), 0, 0)))
    source, both = folder(tmp_path), multiprocessing.get_context("fork").Barrier(2, timeout=60)

    def read_at_once(path, *others):
        if path.name == "a.png":
            both.wait()
            raise BadPicture("broken")
        return read(path, *others)

    def note(line):
        with (tmp_path / "said").open("a") as file:
            file.write(f"{line}\n")

    monkeypatch.setattr("dalle.data.picture_reader.read", read_at_once)
    monkeypatch.setattr("dalle.data.picture_reader.rank_zero_warn", note)
    batches = DataLoader(
        SourceDataset(source), batch_sampler=[[0], [0]], collate_fn=identity_collate, num_workers=2,
        multiprocessing_context="fork",
    )  # fmt: skip
    one, other = (batch["image"] for batch in batches)
    assert torch.equal(one, other)
    assert torch.equal(one, source.pixels([1]))
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.endswith("a.png: broken; another picture takes its place")


def test_the_fingerprint_follows_what_images_and_captions_depend_on(tmp_path):
    put(tmp_path, "a.png", caption="x")
    before = folder(tmp_path).fingerprint()
    assert folder(str(tmp_path)).fingerprint() == before
    others = {before, folder(tmp_path, size=16).fingerprint(), folder(tmp_path, crop="random").fingerprint()}
    put(tmp_path, "a.png", caption="a longer one")
    others.add(folder(tmp_path).fingerprint())
    put(tmp_path, "a.png", picture((0, 255, 0)), caption="x")
    others.add(folder(tmp_path).fingerprint())
    put(tmp_path, "a.png", caption="x")
    os.utime(tmp_path / "a.png", (1, 1))
    assert folder(tmp_path).fingerprint() == before
    assert len(others) == 5


def emoji():
    here = Path(__file__).resolve().parents[2]
    root = Path(os.environ.get("DALLE_TEST_DATA", here / "../shared/data/emoji-captions")) / "images"
    if not root.is_dir():
        pytest.skip(f"the real pictures are not at {root}; DALLE_TEST_DATA names their folder")
    return root


def test_real_pictures():
    splits = {split: Folder(split, emoji(), 64) for split in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == 1644
    assert 40 < len(splits["val"]) < 130
    captions = [c for source in splits.values() for i in range(len(source)) for c in source.captions(i)]
    assert len(captions) == 3285
    images = splits["val"].images(range(len(splits["val"])))
    assert images.shape[1:] == (3, 64, 64)
    assert images[:, :, 0, 0].median() == 1  # drawings on white
    assert images.std() > 0.3
