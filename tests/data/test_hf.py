"""Hugging Face data sets: local folders, files, what save_to_disk writes; columns found or named."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from formats import WHOLE, captions, packed, parquet, picture, write
from torch.utils.data import DataLoader

from dalle.data.folder import Folder
from dalle.data.hf import HuggingFace
from dalle.data.sources import Source, SourceDataset, identity_collate
from dalle.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def read(path, split="train", **options):
    return HuggingFace(split, path, 8, **WHOLE | options)


def labelled(folder, n=6, **features):
    files = [str(picture(folder / f"{k}.png", k)) for k in range(n)]
    kinds = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["apple", "hot_dog"]))
    return datasets.Dataset.from_dict({"img": files, "label": [k % 2 for k in range(n)]}, features=kinds)


def test_parquet_as_the_hub_has_it(tmp_path):
    rows = packed(tmp_path / "loose")
    parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", rows[:5])
    parquet(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", rows[5:])
    source, val = read(tmp_path / "set"), read(tmp_path / "set", "val")
    assert isinstance(source, Source)
    assert captions(source) == {f"train/{k}": [f"thing {k}"] for k in range(5)}
    assert captions(val) == {f"validation/{k}": [f"thing {k + 5}"] for k in range(3)}
    for k in range(8):
        write(tmp_path / "loose" / f"{k}.txt", f"thing {k}")
    loose = Folder("train", tmp_path / "loose", 8, **WHOLE)
    assert val.images([0, 2]).equal(loose.images([5, 7]))


@pytest.mark.parametrize(
    "pattern", ["set/train.parquet", "set/*.parquet", ["set/train.parquet", "set/val.parquet"]]
)
def test_files_patterns_and_lists(tmp_path, pattern, monkeypatch):
    rows = packed(tmp_path / "loose")
    parquet(tmp_path / "set" / "train.parquet", rows[:6])
    parquet(tmp_path / "set" / "val.parquet", rows[6:])
    monkeypatch.chdir(tmp_path)
    assert len(read(pattern)) == 6
    assert len(read(pattern, "val")) == (0 if pattern == "set/train.parquet" else 2)


def test_saved_to_disk_and_classes_by_name(tmp_path):
    data = labelled(tmp_path / "loose")
    datasets.DatasetDict(train=data, test=data.select([5])).save_to_disk(tmp_path / "saved")
    with pytest.warns(UserWarning, match="equal to one in another split"):
        source = read(tmp_path / "saved")
    assert source.captions(0) == ["a photo of an apple"]
    assert source.captions(1) == ["a photo of a hot dog"]
    assert source.has_classes
    assert len(read(tmp_path / "saved", "test")) == 1
    assert read(tmp_path / "saved", template=["{}!", "one {}"]).captions(1) == ["hot dog!", "one hot dog"]


def test_a_folder_of_pictures_with_metadata(tmp_path):
    rows = [{"file_name": picture(tmp_path / f"{k}.png", k).name, "text": f"thing {k}"} for k in range(3)]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert captions(read(tmp_path)) == {f"train/{k}": [f"thing {k}"] for k in range(3)}


def test_several_captions_empty_ones_and_broken_pictures(tmp_path):
    rows = packed(tmp_path / "loose", 4)
    some = [["one", " two "], [], [""], ["four", None]]
    rows = [{**row, "caption": texts} for row, texts in zip(rows, some, strict=True)]
    rows += [{"image": {"bytes": b"no picture", "path": None}, "caption": ["x"]}]
    rows += [{"image": {"bytes": None, "path": None}, "caption": ["x"]}]
    rows += [{"image": {"bytes": None, "path": "https://a.b/c.jpg"}, "caption": ["x"]}]
    parquet(tmp_path / "a.parquet", rows)
    with pytest.warns(UserWarning, match="Left out") as said:
        source = read(tmp_path / "a.parquet")
    assert captions(source) == {"train/0": ["one", "two"], "train/3": ["four"]}
    line = str(said[0].message)
    for part in (
        "2 without a readable caption (train/1, train/2)",
        "1 broken (train/4)",
        "1 empty (train/5)",
        "1 an address, no picture (download them first, as img2dataset does) (train/6)",
    ):
        assert part in line


def test_columns_of_other_names_are_listed_and_can_be_named(tmp_path):
    rows = [{"bild": row["image"], "was": row["caption"], "zahl": 1} for row in packed(tmp_path / "loose", 2)]
    path = parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(
        UserError, match=r"there are bild .*was \(string\), zahl \(int64\).*data.caption_column=NAME"
    ):
        read(path)
    assert captions(read(path, caption_column="was")) == {f"train/{k}": [f"thing {k}"] for k in range(2)}
    assert read(path, caption_column=["was", "zahl"]).captions(0) == ["thing 0", "a photo of a 1"]
    with pytest.raises(UserError, match=r"data.image_column=foto is not there; there are bild"):
        read(path, image_column="foto", caption_column="was")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.csv", b"a,b", "neither parquet nor Arrow; data=table"),
        ("set/00000.tar", b"", "data=webdataset reads tar files"),
        ("set/a.txt", b"x", "which is not for pictures"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    path = write(tmp_path / name, "")
    path.write_bytes(content)
    place = path if path.parent == tmp_path else path.parent
    with pytest.raises(UserError, match=message) as error:
        read(place)
    assert "\n" not in str(error.value)


def test_a_file_without_rows_is_said_to_be_one(tmp_path):
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a parquet file there has no rows"):
        read(tmp_path / "a.parquet")


def test_scripts_of_a_data_set_are_never_run(tmp_path):
    write(tmp_path / "set" / "set.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "set")
    assert not (tmp_path / "ran").exists()


def test_the_hub_is_named_before_it_is_asked(tmp_path, monkeypatch, capsys):
    def nowhere(self, name, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", nowhere)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="owner/nothing-here is no file or folder here, and the hub does not give it"
    ):
        read("owner/nothing-here")
    assert "asked for at the Hugging Face hub" in capsys.readouterr().out
    with pytest.raises(UserError, match="no/such/folder does not exist"):
        read("no/such/folder")


def test_a_new_version_is_read_anew(tmp_path):
    rows = packed(tmp_path / "loose", 4)
    first = read(parquet(tmp_path / "a.parquet", rows[:3]))
    second = read(parquet(tmp_path / "a.parquet", rows))
    assert (len(first), len(second)) == (3, 4)
    assert first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize("place", ["https://a.b/c.parquet", "../other/*.parquet", "/etc/*.parquet"])
def test_a_folder_does_not_lead_elsewhere(tmp_path, place):
    """`datasets` reads what a README.md says, also from the network."""
    parquet(tmp_path / "set" / "train.parquet", packed(tmp_path / "loose", 2))
    configs = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: '{}'\ntags: []\n---\n"
    write(tmp_path / "set" / "README.md", configs.format("*.parquet"))
    assert len(read(tmp_path / "set")) == 2
    write(tmp_path / "set" / "README.md", configs.format(place))
    with pytest.raises(UserError, match=r"README.md in data.path=.* names files elsewhere"):
        read(tmp_path / "set")


def test_workers_see_the_same_pictures(tmp_path):
    source = read(parquet(tmp_path / "a.parquet", packed(tmp_path / "loose", 8)))
    loader = DataLoader(
        SourceDataset(source), batch_sampler=[[2 * k, 2 * k + 1] for k in range(4)], num_workers=2,
        collate_fn=identity_collate, multiprocessing_context="fork",
    )  # fmt: skip
    assert torch.cat([batch["image"] for batch in loader]).equal(source.pixels(range(8)))
