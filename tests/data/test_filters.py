"""Filters: what each takes is counted in the one report, whichever way pictures and columns are kept."""

import json
import math

import numpy as np
import pytest
from made_tars import picture, tar
from PIL import Image

from dalle.data.filters import Filters, number_of, script_of
from dalle.data.folder import Folder
from dalle.data.table import Table
from dalle.data.webdataset import WebDataset
from dalle.errors import UserError

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}
# name, size, caption, similarity, punsafe
ROWS = [
    ("a", (40, 40), "a red ball", 0.35, 0.01),
    ("b", (30, 60), "a long blue bar", 0.30, 0.05),
    ("c", (20, 20), "small", 0.31, 0.02),
    ("d", (40, 40), "красный мяч", 0.40, 0.00),
    ("e", (40, 40), "a green cap", 0.10, 0.00),
    ("f", (40, 40), "a grey cat", 0.33, 0.90),
    ("g", (40, 40), "a white dog", math.nan, 0.00),
    ("h", (40, 40), "1234567", 0.32, None),
]


def pictures(folder):
    folder.mkdir(exist_ok=True)
    for k, (name, size, *_) in enumerate(ROWS):
        noise = np.random.default_rng(k).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")


def rows():
    for name, _, caption, similarity, punsafe in ROWS:
        yield {"file_name": f"{name}.png", "text": caption, "Similarity": similarity, "p_unsafe": punsafe}


def folder_of_jsonl(folder, filters):
    pictures(folder)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows())))
    return Folder("train", folder, 16, filters=filters, **WHOLE)


def csv(folder, filters):
    pictures(folder)
    lines = ["file_name,text,Similarity,p_unsafe"]
    lines += [",".join("" if v is None else str(v) for v in row.values()) for row in rows()]
    (folder / "table.csv").write_text("\n".join(lines))
    return Table("train", folder / "table.csv", 16, filters=filters, **WHOLE)


def parquet(folder, filters):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures(folder)
    parquet.write_table(pa.Table.from_pylist(list(rows())), folder / "table.parquet")
    return Table("train", folder / "table.parquet", 16, filters=filters, **WHOLE)


def packed(folder, filters):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    pictures(folder)
    held = [{**row, "image": (folder / row.pop("file_name")).read_bytes()} for row in rows()]
    parquet.write_table(pa.Table.from_pylist(held), folder / "table.parquet")
    return Table("train", folder / "table.parquet", 16, filters=filters, **WHOLE)


def shards(folder, filters):
    pictures(folder)
    members = [
        {
            f"{row['file_name']}": (folder / row["file_name"]).read_bytes(),
            f"{row['file_name'][0]}.txt": row["text"].encode(),
            f"{row['file_name'][0]}.json": json.dumps(row).encode(),
        }
        for row in rows()
    ]
    tar(folder / "0.tar", *members[:5])
    tar(folder / "1.tar", *members[5:])
    return WebDataset("train", folder, 16, filters=filters, **WHOLE)


KINDS = [folder_of_jsonl, csv, parquet, packed, shards]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def captions(source):
    return {source.captions(item)[0] for item in range(len(source))}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, "abcdefgh"),
        ({"min_side": 30}, "abdefgh"),
        ({"max_aspect": 1.5}, "acdefgh"),
        ({"min_caption": 6, "max_caption": 11}, "adefgh"),
        ({"script": "latin"}, "abcefgh"),
        ({"script": ["cyrillic"]}, "dh"),
        ({"at_least": {"similarity": 0.3}}, "abcdfh"),
        ({"at_most": {"punsafe": 0.05}}, "abcdeg"),
        ({"at_most": {"punsafe": 0.05}, "at_least": {"similarity": 0.31, "punsafe": 0.01}}, "ac"),
    ],
)
def test_what_is_left(tmp_path, make, options, left):
    names = {row[2]: row[0] for row in ROWS}
    source = make(tmp_path / "set", Filters(**options))
    assert "".join(sorted(names[caption] for caption in captions(source))) == left


@pytest.mark.parametrize("make", [csv, shards])
def test_each_filter_says_in_the_one_report_what_it_took(tmp_path, make):
    filters = Filters(25, 1.5, 8, 14, "latin", {"similarity": 0.2}, {"punsafe": 0.5})
    with pytest.warns(UserWarning, match="Left out") as said:
        make(tmp_path / "set", filters)
    (report,) = [str(one.message) for one in said if "Left out" in str(one.message)]
    for part in (
        "2 with a caption of fewer than 8 letters (min_caption)",  # c, h
        "1 with a caption of more than 14 letters (max_caption)",
        "1 with a caption in another script than latin (script)",
        "1 with similarity below 0.2 (at_least)",
        "1 with punsafe above 0.5 (at_most)",
        "1 without a number in the column similarity",
    ):
        assert part in report
    assert ": 1 pictures are used" in report or ": 1 samples are used" in report
    with pytest.warns(UserWarning, match="1 longer than 1.5 times their short side .max_aspect") as said:
        make(tmp_path / "set", Filters(25, 1.5))
    assert "1 smaller than 25 px (min_side)" in str(said[0].message)


def test_captions_that_do_not_fit_leave_a_picture_its_others(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(f"hi\na red ball\n{ROWS[3][2]}")
    source = Folder("train", tmp_path, 16, filters=Filters(min_caption=3, script="latin"), **WHOLE)
    assert source.captions(0) == ["a red ball"]
    held = {"0.png": picture(0), "0.txt": b"hi\na red ball\na blue ball"}
    place = tar(tmp_path / "0.tar", held)
    filters = Filters(min_caption=3)
    assert WebDataset("train", place, 16, lines="all", filters=filters, **WHOLE).captions(0) == [
        "a red ball", "a blue ball",
    ]  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, make):
    with pytest.raises(UserError, match=r"asks for the column pwatermark, but .* has .*Similarity.*p_unsafe"):
        make(tmp_path / "set", Filters(at_most={"pwatermark": 0.5}))


def test_where_there_are_no_columns(tmp_path):
    pictures(tmp_path)
    for name, *_ in ROWS:
        (tmp_path / f"{name}.txt").write_text("a thing")
    with pytest.raises(UserError, match="has no columns of numbers"):
        Folder("train", tmp_path, 16, filters=Filters(at_most={"punsafe": 0.5}), **WHOLE)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"at_least": {"x": math.nan}}, "at_least.x must be a number, got nan"),
        ({"at_most": {"x": True}}, "at_most.x must be a number"),
        ({"at_least": {"x": 2}, "at_most": {"x": 1}}, "leave nothing"),
        ({"min_caption": 5, "max_caption": 4}, "leave nothing"),
        ({"script": "klingon"}, "klingon is not known; there are latin"),
    ],
)
def test_bounds_that_make_no_sense(options, error):
    with pytest.raises(UserError, match=error):
        Filters(**options)


def test_columns_and_cells_that_are_odd():
    with pytest.raises(UserError, match=r"at_least\.x must be a number"):
        Filters(at_least={"x": 10**400})
    for cell in (10**400, "1e400", "nan", None, [1], "x"):
        assert number_of(cell) is None
    assert number_of("1e3") == 1000


def test_nothing_left_says_what_took_it(tmp_path):
    with pytest.raises(UserError, match=r"no usable .*8 smaller than 100 px"):
        csv(tmp_path / "set", Filters(min_side=100))
    with pytest.raises(UserError, match=r"no usable .*8 smaller than 100 px"):
        shards(tmp_path / "tars", Filters(min_side=100))


def test_filters_change_the_fingerprint_of_shards_only_where_they_are_used(tmp_path):
    plain, same = (shards(tmp_path / "set", some) for some in (None, Filters()))
    assert plain.fingerprint() == same.fingerprint()
    assert shards(tmp_path / "set", Filters(min_side=25)).fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("A cat, 3 €", "latin"),
        ("кот cat кот", "cyrillic"),
        ("猫です", "hiragana"),
        ("猫", "cjk"),
        ("42!", ""),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script
