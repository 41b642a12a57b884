"""data=table: every dialect of CSV and TSV, JSON lines, parquet with paths or with pictures in it."""

import json
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import WHOLE, captions, packed, parquet, picture, write

from dalle.data.folder import Folder
from dalle.data.hf import HuggingFace
from dalle.data.sources import Source
from dalle.data.table import Table
from dalle.errors import UserError

EXPECTED = {"images/0.png": ["thing 0"], "images/1.png": ["a thing, 1"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def root(tmp_path):
    for k in range(2):
        picture(tmp_path / "images" / f"{k}.png", k)
    return tmp_path


def read(path, split="train", **options):
    return Table(split, path, 8, **WHOLE | options)


TSV = "filepath\ttitle\nimages/0.png\tthing 0\nimages/1.png\ta thing, 1\n"


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("train.tsv", TSV, "utf-8"),
        ("train.csv", TSV, "utf-8-sig"),
        ("train.csv", TSV.replace("images/", "images%2F"), "utf-8"),
        ("train.csv", TSV.replace("\n", "\r\n"), "utf-16"),
        ("train.csv", TSV, "utf-16-le"),
        ("train.csv", TSV.replace("\n", "\r"), "utf-8"),
        ("train.csv", TSV.replace("\t", ";"), "utf-8"),
        ("train.csv", TSV.replace("\t", "\x01"), "utf-8"),
        ("train.csv", TSV.replace("\t", "^"), "utf-8"),
        ("train.csv", TSV + "filepath\ttitle\n", "utf-8"),
        ("train.csv", TSV.replace("thing", "\0thing").replace("0.png\t", "0.png\t\0"), "utf-8"),
        ("train.csv", 'path,caption\nimages/0.png,thing 0\nimages/1.png,"a thing, 1"\n', "utf-8"),
        ("train.csv", 'path,caption\n"images/0.png","thing 0"\n"images/1.png","a thing, 1"\n', "utf-8"),
        ("train.csv", "path,caption\nimages/0.png,thing 0\nimages/1.png,a thing, 1\n", "utf-8"),
        ("train.csv", "images/0.png\tthing 0\nimages/1.png\ta thing, 1\n", "utf-8"),
        ("train.csv", "'path';'caption'\n'images/0.png';'thing 0'\n'images/1.png';'a thing, 1'\n", "utf-8"),
        ("train.csv", TSV.replace("images/", "C:\\data\\images\\"), "utf-8"),
        ("train.csv", TSV.replace("images/", ".\\images\\"), "utf-8"),
        ("train.csv", TSV.replace("images/", "/elsewhere/images/"), "utf-8"),
        ("train.csv", TSV.replace("images/", "").replace(".png", ""), "utf-8"),
        (
            "train.jsonl",
            '{"image": "images/0.png", "text": "thing 0"}\n{"image": "images/1.png", "text": "a thing, 1"}',
            "utf-8",
        ),
        (
            "train.json",
            json.dumps([{"image": k, "text": v[0]} for k, v in EXPECTED.items()]),
            "utf-8-sig",
        ),
    ],
)
def test_dialects(root, name, text, encoding):
    assert captions(read(write(root / name, text, encoding))) == EXPECTED


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        (r'images/0.png,"he said \"hi\", then left"', 'he said "hi", then left'),
        ('images/0.png,"he said ""hi"", then left"', 'he said "hi", then left'),
        ('images/0.png,a 5" wide thing, red', 'a 5" wide thing, red'),
        ('images/0.png,"two\nlines, one caption"', "two\nlines, one caption"),
        ('images/0.png,"[""one"", ""two""]"', ["one", "two"]),
        ("images/0.png,,", None),
    ],
)
def test_quotes(root, line, caption):
    path = write(root / "a.csv", f"path,caption\n{line}\nimages/1.png,other\n")
    found = captions(read(path))
    assert found.pop("images/1.png") == ["other"]
    assert found == (
        {} if caption is None else {"images/0.png": [caption] if isinstance(caption, str) else caption}
    )


def test_absolute_paths_and_another_root(root, tmp_path_factory):
    text = TSV.replace("images/", f"{root}/images/")
    assert captions(read(write(root / "a.tsv", text))) == EXPECTED
    path = write(tmp_path_factory.mktemp("elsewhere") / "a.tsv", TSV)
    assert captions(read(path, root=root)) == EXPECTED
    address = TSV.replace("images/", f"file://{root}/images/").replace("0.png", "%30.png")
    assert captions(read(write(root / "a.tsv", address))) == EXPECTED


def test_pictures_beside_the_folder_of_the_table_keep_their_names_where_all_of_it_moves(tmp_path):
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        for k in range(2):
            picture(place / "images" / f"{k}.png", k)
        write(place / "tables" / "a.tsv", TSV.replace("images/", "../images/"))
    one, other = (read(place / "tables" / "a.tsv") for place in places)
    assert one.names == other.names == ["../images/0.png", "../images/1.png"]
    assert one.fingerprint() == other.fingerprint()


def test_several_captions_of_a_picture_and_empty_ones(root):
    picture(root / "images" / "2.png", 2)
    text = (
        "image,caption\nimages/0.png,one\nimages/1.png,x\nimages/0.png,two\nimages/0.png,one\nimages/2.png,\n"
    )
    with pytest.warns(UserWarning, match=r"1 without a readable caption \(images/2.png\)"):
        found = captions(read(write(root / "a.csv", text)))
    assert found == {"images/0.png": ["one", "two"], "images/1.png": ["x"]}


def test_two_columns_of_one_name(root):
    path = write(root / "a.csv", "image,caption,caption\nimages/0.png,one,two\nimages/1.png,x,y\n")
    assert read(path).captions(0) == ["one", "two"]


def test_missing_pictures_and_addresses_are_named(root):
    text = TSV + "images/9.png\tgone\nhttps://a.b/c.png\tfar\ns3://a/b.png\tfarther\n"
    with pytest.warns(UserWarning, match="Left out") as said:
        assert captions(read(write(root / "a.tsv", text))) == EXPECTED
    assert "2 named by an address: download them first" in str(said[0].message)
    assert "1 listed but not there (images/9.png)" in str(said[0].message)


def test_addresses_alone_are_one_line(root):
    path = write(root / "a.tsv", "url\tcaption\nhttps://a.b/c.png\tfar\n")
    with pytest.raises(
        UserError,
        match=r"it has url, caption; data.image_column=NAME .*pictures at addresses have to be downloaded",
    ):
        read(path)
    with pytest.raises(UserError, match="1 named by an address: download them first, as img2dataset does"):
        read(path, image_column="url")


def test_splits_by_files_and_by_a_column(root):
    write(root / "sets" / "train.tsv", "filepath\ttitle\n../images/0.png\tthing 0\n")
    write(root / "sets" / "val.tsv", "filepath\ttitle\n../images/1.png\tthing 1\n")
    for path in (root / "sets", f"{root}/sets/*.tsv", [f"{root}/sets/{s}.tsv" for s in ("train", "val")]):
        assert [read(path, split).names for split in ("train", "val")] == [
            ["../images/0.png"],
            ["../images/1.png"],
        ]
    for split, k in (("train", 0), ("test", 1)):
        write(root / "parts" / f"split={split}" / "0.csv", f"image,text\n../../images/{k}.png,thing\n")
    assert read(root / "parts", "test").names == ["split=test/../../images/1.png"]
    path = write(root / "a.csv", "image,text,split\nimages/0.png,x,train\nimages/1.png,y,validation\n")
    assert read(path, "val").names == ["images/1.png"]


def test_relative_paths_of_tables(root, monkeypatch):
    for split, k in (("train", 0), ("val", 1)):
        write(root / "sets" / f"{split}.tsv", f"filepath\ttitle\n../images/{k}.png\tthing {k}\n")
    monkeypatch.chdir(root)
    for path in ("sets", "sets/*.tsv", ["sets/train.tsv", "sets/val.tsv"]):
        assert read(path, "val").names == ["../images/1.png"]
    monkeypatch.chdir(root / "images")
    assert captions(read("../sets/train.tsv")) == {"../images/0.png": ["thing 0"]}


def test_parquet_of_paths(root):
    rows = [{"image_path": name, "caption": some, "junk": {"a": b"x"}} for name, some in EXPECTED.items()]
    assert captions(read(parquet(root / "a.parquet", rows))) == EXPECTED
    numbers = [{"image": name, "caption": 3} for name in EXPECTED]
    assert read(parquet(root / "b.parquet", numbers)).captions(0) == ["3"]


@pytest.mark.parametrize("how", ["struct", "bytes"])
def test_parquet_of_pictures(tmp_path, how):
    rows = packed(tmp_path / "loose")
    if how == "bytes":
        rows = [{"jpg": row["image"]["bytes"], "txt": row["caption"]} for row in rows]
    parquet(tmp_path / "sets" / "train-0.parquet", rows[:6])
    parquet(tmp_path / "sets" / "test-0.parquet", rows[6:])
    options = {} if how == "struct" else {"caption_column": "txt"}
    source = read(tmp_path / "sets", **options)
    assert isinstance(source, Source)
    assert captions(source) == {f"train/{k}": [f"thing {k}"] for k in range(6)}
    assert list(captions(read(tmp_path / "sets", "test", **options)).values()) == [["thing 6"], ["thing 7"]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "bild;was\nimages/0.png;x\n", "it has bild, was; data.image_column=NAME and"),
        ("a.csv", "image,caption\n", "no usable picture"),
        ("a.parquet", "PAR1", "no whole parquet file"),
        ("a.jsonl", "[1, 2", "no line of it is a JSON object"),
    ],
)
def test_bad_tables_are_one_line(root, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        read(write(root / name, text))
    assert "\n" not in str(error.value)


def test_bad_places_are_one_line(root):
    for path, message in (("none.csv", "there is no such file"), (str(root / "images"), "holds no table")):
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match=r"data.root=.* is no folder"):
        read(write(root / "a.tsv", TSV), root=root / "none")
    with pytest.raises(UserError, match="mixes tables that hold pictures"):
        read([str(parquet(root / "b.parquet", packed(root / "loose", 1))), str(root / "a.tsv")])


def test_text_that_is_neither_utf_8_nor_utf_16_is_one_line(root):
    with pytest.raises(UserError, match="is not UTF-8 text; save it as UTF-8"):
        read(write(root / "a.tsv", TSV.replace("thing", "\xfcber"), "latin-1"))


def test_one_line_that_is_not_utf_8_is_named(root):
    path = write(root / "a.tsv", TSV)
    path.write_bytes(path.read_bytes() + b"images/0.png\tth\xefng\n" + b"images/0.png\tmore\n")
    with pytest.warns(UserWarning, match=r"1 lines of a.tsv without .*\(line 4\)"):
        assert captions(read(path)) == EXPECTED | {"images/0.png": ["thing 0", "more"]}


def test_a_row_of_parquet_that_is_not_utf_8_is_named(root):
    """Arrow takes any bytes for text, and looks at them only when they are asked for."""
    some = pa.array([b"thing 0", b"th\xefng"])
    text = pa.Array.from_buffers(pa.string(), 2, some.buffers())
    pq.write_table(pa.table({"image": list(EXPECTED), "caption": text}), root / "a.parquet")
    with pytest.warns(UserWarning, match=r"1 lines of a.parquet without .*\(line 2\)"):
        assert captions(read(root / "a.parquet")) == {"images/0.png": ["thing 0"]}
    with pytest.raises(UserError, match="a text in caption is not UTF-8"):
        HuggingFace("train", root / "a.parquet", 8, **WHOLE)


def test_numbers_of_hundreds_of_digits_are_text(root):
    write(root / "a.jsonl", json.dumps({"image": "images/0.png", "caption": 10**400}))
    assert read(root / "a.jsonl").captions(0) == [str(10**400)]


def test_metadata_in_parquet_beside_pictures(root):
    """A folder's table may be one, too."""
    parquet(
        root / "images" / "metadata.parquet", [{"file_name": f"{k}.png", "text": f"t {k}"} for k in range(2)]
    )
    assert captions(Folder("train", root, 8, **WHOLE)) == {f"images/{k}.png": [f"t {k}"] for k in range(2)}


def test_a_folder_of_texts_is_no_folder_of_tables(root):
    for k in range(2):
        write(root / "images" / f"{k}.txt", "a caption")
    with pytest.raises(UserError, match="holds no table"):
        read(root / "images")


@pytest.mark.parametrize(("package", "rows"), [("pyarrow", None), ("datasets", 2)])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package, rows):
    path = parquet(
        tmp_path / "a.parquet", packed(tmp_path / "loose", rows) if rows else [{"image": "x", "text": "y"}]
    )
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'dalle\[data\]'"):
        read(path)
