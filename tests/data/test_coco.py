"""COCO: what pycocotools reads, several captions a picture, the usual splits and Karpathy's."""

import json
import shutil

import pytest
from formats import captions, coco, karpathy, picture, write
from pycocotools.coco import COCO

from dalle.data.coco import Coco
from dalle.data.folder import Folder
from dalle.data.sources import Source
from dalle.errors import UserError


def splits(root, **options):
    return {split: captions(Coco(split, root, 8, **options)) for split in ("train", "val", "test")}


def test_the_captions_and_splits_are_those_of_pycocotools(tmp_path, capsys):
    found = splits(coco(tmp_path), test_fraction=0.0)
    assert isinstance(Coco("train", tmp_path, 8), Source)
    for split in ("train", "val"):
        official = COCO(tmp_path / "annotations" / f"captions_{split}2017.json")
        expected = {
            f"{split}2017/{image['file_name']}": [
                row["caption"].strip() for row in official.loadAnns(official.getAnnIds(imgIds=[key]))
            ]
            for key, image in official.imgs.items()
        }
        assert found[split] == expected
    assert found["test"] == {}
    said = capsys.readouterr().out
    assert "from captions_train2017.json, captions_val2017.json; 6 train, 3 val, 0 test" in said
    assert "(by the folders train2017, val2017)" in said


def test_a_split_that_is_not_there_is_drawn_from_training(tmp_path):
    found = splits(coco(tmp_path))
    assert [len(found[split]) for split in found] == [5, 3, 1]
    assert all(name.startswith("train2017/") for name in found["test"])


def test_a_zip_file_of_it(tmp_path):
    path = shutil.make_archive(str(tmp_path / "coco"), "zip", coco(tmp_path / "coco"))
    zipped, loose = splits(path), splits(tmp_path / "coco")
    assert zipped == loose


def test_karpathys_splits(tmp_path, capsys):
    found = splits(karpathy(tmp_path))
    assert "(as the tables say)" in capsys.readouterr().out  # not "by the folders val2014"
    numbers = {split: [int(name[-8:-4]) for name in some] for split, some in found.items()}
    assert numbers == {"train": [0, 1, 4, 5], "val": [2, 6], "test": [3, 7]}
    assert found["val"]["val2014/COCO_val2014_000000000002.jpg"] == ["thing 2", "a thing 2"]


def test_karpathys_file_beside_the_pictures_of_2017(tmp_path):
    """It names those of 2014, which are the same ones under other names."""
    rows = [
        {"filepath": "val2014", "filename": f"COCO_val2014_{k:012d}.jpg", "split": split,
         "sentences": [{"raw": f"thing {k}"}]}
        for k, split in enumerate(("train", "val", "test"))
    ]  # fmt: skip
    for k in range(3):
        picture(tmp_path / "train2017" / f"{k:012d}.jpg", k)
    write(tmp_path / "annotations" / "dataset_coco.json", json.dumps({"images": rows}))
    assert [list(some.values()) for some in splits(tmp_path).values()] == [[[f"thing {k}"]] for k in range(3)]


def test_validation_alone_is_divided(tmp_path):
    coco(tmp_path, train=0, val=6)
    assert [len(some) for some in splits(tmp_path).values()] == [4, 1, 1]


def test_pictures_of_validation_stay_out_of_training_where_only_they_have_captions(tmp_path):
    coco(tmp_path, train=4, val=6)
    found = splits(tmp_path, annotations="annotations/captions_val2017.json")
    names = [name for some in found.values() for name in some]
    assert len(names) == len(set(names)) == 6


def test_what_is_broken_is_named_and_the_rest_is_used(tmp_path):
    coco(tmp_path)
    path = tmp_path / "annotations" / "captions_train2017.json"
    held = json.loads(path.read_text())
    held["images"] += [{"id": 77, "file_name": "gone.jpg"}, {"id": 78}, "nothing"]
    held["annotations"] += [
        {"image_id": 0, "caption": None},
        {"caption": "nobody's"},
        7,
        {"image_id": [], "caption": "x"},
    ]
    path.write_text(json.dumps(held))
    with pytest.warns(
        UserWarning, match=r"1 listed but not there.*2 rows of captions_train2017.json"
    ) as said:
        found = splits(tmp_path)
    assert len(found["train"]) == 5
    assert "gone.jpg" in str(said[0].message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotations": "none.json"}, r"data.annotations=none.json: there is no file"),
        ({"annotations": "annotations/instances_train2017.json"}, "holds no captions .*captions_train2017"),
        ({"annotations": "annotations/cut.json"}, "cut.json is no whole JSON"),
        ({"annotations": "annotations/list.json"}, "list.json holds no list 'images'"),
    ],
)
def test_bad_annotations_are_one_line(tmp_path, options, message):
    coco(tmp_path)
    write(tmp_path / "annotations" / "cut.json", '{"images": [')
    write(tmp_path / "annotations" / "list.json", "[]")
    with pytest.raises(UserError, match=message):
        Coco("train", tmp_path, 8, **options)


def test_without_annotations_it_says_what_it_looked_for(tmp_path):
    picture(tmp_path / "train2017" / "0.jpg", 0)
    with pytest.raises(UserError, match=r"captions in annotations/captions_\*.json.*found 1 pictures"):
        Coco("train", tmp_path, 8)


def test_data_folder_points_here(tmp_path):
    with pytest.raises(
        UserError, match=r"captions_train2017.json is in the format of COCO: data=coco reads it"
    ):
        Folder("train", coco(tmp_path), 8)
