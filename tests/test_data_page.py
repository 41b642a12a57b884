"""The lines of the page on formats as they stand, on a small made sample of each."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from formats import coco, idx, packed, parquet, picture, write, zipped
from made_tars import shards
from PIL import Image
from tiny import ROOT

from dalle.cli import command as cli
from dalle.data.file_listing import list_files
from dalle.run_dir import Run

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [
    (title, block)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    if "python " in block
]
SAMPLES = {
    "COCO", "Hugging Face", "Tables", "Zip files", "MNIST and its like", "Filters", "Mixtures",
    "Pictures in their own shape",
}  # fmt: skip


@pytest.fixture
def samples(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    coco(tmp_path / "COCO", train=12, val=4)
    files = [str(picture(tmp_path / "images" / f"{k}.png", k)) for k in range(12)]
    held = {"image": files, "text": [f"thing {k}" for k in range(12)]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_dict(held, features=features).save_to_disk("SAVED")
    rows = "".join(f"images/{k}.png\tthing {k}\n" for k in range(12))
    write(tmp_path / "TABLE.tsv", f"filepath\ttitle\n{rows}")
    scored = "".join(f"images/{k}.png\tthing {k}\t{0.25 + k / 100}\t{k % 4 / 20}\n" for k in range(12))
    write(tmp_path / "SCORED.tsv", f"filepath\ttitle\tsimilarity\tpunsafe\n{scored}")
    parquet(tmp_path / "PACKED.parquet", packed(tmp_path / "loose", 12))
    zipped(tmp_path / "PICTURES.zip", 12)
    idx(tmp_path / "MNIST")
    for k in range(24):
        size = ((30, 40), (40, 30))[k % 2]
        pixels = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
        (tmp_path / "PHOTOS").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "PHOTOS" / f"{k}.png")
        write(tmp_path / "PHOTOS" / f"{k}.txt", f"thing {k}")
    return tmp_path


def test_every_format_has_its_lines():
    assert {title for title, _ in BLOCKS} == SAMPLES


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_lines_train_sample_and_evaluate_as_they_stand(title, block, shell, samples):
    for line in block.splitlines():
        line = line.split(" #")[0].removeprefix("python ")
        if line.startswith("train"):
            shell(f"{line} trainer.enable_progress_bar=false")
        elif line.startswith(("sample", "evaluate")):
            shell(line)
    runs = [Run(path) for path in (samples / "logs").glob("*/*") if (path / "manifest.json").exists()]
    assert len(runs) == {"COCO": 3, "Tables": 2, "Pictures in their own shape": 4}.get(title, 1)
    assert list((samples / "logs").rglob("*.png")) or title != "COCO"


@pytest.mark.slow
def test_the_lines_for_shards_and_for_encoding_work_as_they_stand(shell, samples, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(samples / "cache"))
    pages = [(ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("shards", "encode")]
    (train,), (encode, prior) = (
        re.findall("```bash\n(.*?)```", page, re.DOTALL)[0].splitlines() for page in pages
    )
    shards(samples / "PATH")
    shell(f"{train.removeprefix('python ')} trainer.enable_progress_bar=false")
    shell("sample.py name=mine prompt='thing 1'")
    shell("evaluate.py run=logs/mine/clip")
    monkeypatch.setattr(sys, "argv", shlex.split(encode))
    cli.main()
    assert "data=encoded data.path=EMBEDDINGS reads them" in capfd.readouterr().out
    shutil.rmtree(samples / "logs" / "mine" / "prior")
    ended = shell(f"{prior.removeprefix('python ')} trainer.enable_progress_bar=false")
    assert "for 22 pictures: " in ended.out  # of no size
    assert Run(samples / "logs" / "mine" / "prior").finished


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("COCO", "data=coco data.root=COCO"),
        ("COCO/annotations/captions_val2017.json", "data=coco data.root=COCO data.annotations=annotations/"),
        ("SAVED", "data=hf data.path=SAVED"),
        ("TABLE.tsv", "data=table data.path=TABLE.tsv"),
        ("PACKED.parquet", "data=table data.path=PACKED.parquet"),
        ("SHARDS", "data=webdataset 'data.shards=SHARDS/*.tar'"),
        ("SHARDS/00000.tar", "data=webdataset data.shards=SHARDS/00000.tar"),
        ("PICTURES.zip", "data=folder data.root=PICTURES.zip"),
        ("MNIST", "data=idx data.root=MNIST"),
        ("a folder, with texts", "data=folder \"data.root='a folder, with texts'\""),
        ("classes", "data=imagefolder data.root=classes"),
        ("COCO.zip", "data=coco data.root=COCO.zip"),
    ],
)
def test_data_check_says_what_is_there_and_the_line_for_it(samples, monkeypatch, capsys, path, settings):
    for k in range(4):
        write(picture(samples / "a folder, with texts" / f"{k}.png", k).with_suffix(".txt"), f"thing {k}")
        picture(samples / "classes" / ("cats", "dogs")[k % 2] / f"{k}.png", k)
    shards(samples / "SHARDS")
    shutil.make_archive("COCO", "zip", ".", "COCO")
    said = check(monkeypatch, capsys, path)
    assert f"\nsettings       {settings}" in said
    sheet = re.search(r"contact sheet +(.*)", said)
    assert sheet is not None
    assert (samples / sheet[1]).stat().st_size > 1000


def check(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["dalle", "data", "check", *arguments])
    cli.main()
    return capsys.readouterr().out


def test_data_check_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k in range(8):
        write(picture(tmp_path / "set" / f"{k}.png", k).with_suffix(".txt"), f"thing {k}\n" + "long " * 60)
    write(picture(tmp_path / "set" / "same.png", 0).with_suffix(".txt"), "as 0")
    whole = (tmp_path / "set" / "1.png").read_bytes()
    (tmp_path / "set" / "1.png").write_bytes(whole[:300] + bytes(200) + whole[500:])
    (tmp_path / "set" / "2.png").write_bytes(b"")
    (tmp_path / "set" / "3.txt").unlink()
    said = check(monkeypatch, capsys, "set", "tokenizer.context_length=12", "--sheet", "sheet.png")
    for line in (
        "pictures       7 (train 5, val 1, test 1)",
        "shorter side   20 to 20 px, median 20",
        "captions       13, 1.9 a picture",
        "words          2 to 60, median 2",
        "tokens         6 of 13 (46%) are longer than the 12 tokens",
        "left out       2",
        "1 without a readable caption: 3.png",
        "1 empty: 2.png",
        "1 broken, as decoding shows; replaced by others in training: set/1.png",
        "duplicates     2 pictures are equal to another, byte for byte",
    ):
        assert line in said, said
    assert (tmp_path / "sheet.png").exists()
    assert "as decoding shows" not in check(monkeypatch, capsys, "set", "--quick")
    check(monkeypatch, capsys, "set", "--quick", "--sheet", "sheet.png")  # its own may be made again


@pytest.mark.parametrize("place", ["set/0.png", "set/0.txt", "set", "notes.txt", "link.png"])
def test_the_contact_sheet_takes_no_other_files_place(tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    for k in range(4):
        write(picture(tmp_path / "set" / f"{k}.png", k).with_suffix(".txt"), f"thing {k}")
    (tmp_path / "link.png").symlink_to("set/0.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=f"error: --sheet {place}"):
        check(monkeypatch, capsys, "set", "--sheet", place)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "link.png").is_symlink()


def test_data_check_names_settings_as_they_are_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(picture(tmp_path / "set" / "0.png", 0).with_suffix(".txt"), "thing")
    with pytest.raises(SystemExit, match=r"error: data\.image_size must be a number, got nan"):
        check(monkeypatch, capsys, "set", "data.image_size=nan")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("batches", "pickled Python objects run code when they are opened, and are never read"),
        ("arrays.npz", "arrays.npz and its like are arrays"),
        ("one.png", "is one picture; give the folder"),
        ("empty", "empty holds 0 files in no format that is read"),
        ("lone", "no usable picture"),
        ("latin", "captions.csv is not UTF-8 text; save it as UTF-8"),
        ("packed", "packed holds 2 zip files (a.zip, b.zip): unpack them beside one another"),
        ("packed/captions.tsv.gz", "captions.tsv.gz is packed; unpack it first"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "batches" / "data_batch_1", "x")
    write(tmp_path / "arrays.npz", "x")
    picture(tmp_path / "one.png", 0)
    picture(tmp_path / "lone" / "0.png", 0)
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "latin" / "birds" / "0.png", 0)
    write(tmp_path / "latin" / "captions.csv", "file_name,text\n0.png,caf\xe9\n0.png,th\xe9\n", "latin-1")
    for file in ("a.zip", "b.zip", "captions.tsv.gz"):
        write(tmp_path / "packed" / file, "x")
    with pytest.raises(SystemExit, match=re.escape(message)) as ended:
        check(monkeypatch, capsys, name)
    assert str(ended.value.code).count("\n") == 0


def test_data_check_says_which_tables_beside_class_folders_it_did_not_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        picture(tmp_path / "set" / ("cats", "dogs")[k] / f"{k}.png", k)
    write(tmp_path / "set" / "captions.csv", "bild,wort\n0.png,eine Katze\n")
    said = check(monkeypatch, capsys, "set", "--quick")
    assert "data=imagefolder" in said
    assert "captions       2, 1.0 a picture" in said  # each of two pictures is in all splits
    assert "not read       captions.csv is without columns that are known: it has bild, wort" in said


def test_what_data_check_writes_is_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        write(picture(tmp_path / "logs" / f"{k}.png", k).with_suffix(".txt"), f"pile of logs {k}")
    write(tmp_path / "logs" / "first" / "clip" / "manifest.json", "{}")
    picture(tmp_path / "logs" / "first" / "clip" / "samples" / "0.png", 9)
    for _ in range(2):
        assert "captions       3" in (said := check(monkeypatch, capsys, ".", "--quick"))
        assert "left out       0" in said
    assert len(list(Path("logs/data_check").iterdir())) == 1
    assert len(list_files(tmp_path / "logs" / "first").files) == 2  # where they are asked for
