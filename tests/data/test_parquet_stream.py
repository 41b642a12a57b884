"""Parquet read row group by row group when it is needed: here, from elsewhere, by any number of workers."""

from collections import Counter
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import WHOLE, packed
from torch.utils.data import DataLoader

from dalle.data import parquet_stream
from dalle.data import shards as access
from dalle.data.filters import Filters
from dalle.data.hf import HuggingFace, hugging_face
from dalle.data.parquet_stream import ParquetStream, opened
from dalle.data.sources import EpochSampler, Source, SourceDataset, identity_collate
from dalle.errors import UserError


def table(path: Path, rows: list[dict], group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """20 rows in two files, of which those of the last row group are fewer."""
    opened.cache_clear()
    rows = packed(tmp_path / "loose", 20)
    table(tmp_path / "set" / "a-00000.parquet", rows[:10])
    table(tmp_path / "set" / "a-00001.parquet", rows[10:])
    return tmp_path / "set"


def read(path, split="train", **options):
    return hugging_face(split, path, 8, **{**WHOLE, "streaming": True, **options})


def test_the_same_pictures_and_captions_as_from_disk(folder, tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    there, here = read(folder), read(folder, streaming=False)
    assert isinstance(there, ParquetStream)
    assert isinstance(here, HuggingFace)
    assert isinstance(there, Source)
    assert [there.captions(k) for k in range(20)] == [here.captions(k) for k in range(20)]
    assert there.images(range(20)).equal(here.images(range(20)))
    assert "2 parquet files, read as they are needed; 20 train, 0 val, 0 test" in capsys.readouterr().out


def test_captions_are_read_without_their_pictures_and_pictures_when_they_are_needed(folder, monkeypatch):
    asked, table_of = [], parquet_stream.table_of
    monkeypatch.setattr(
        parquet_stream, "table_of", lambda group, columns: asked.append(columns) or table_of(group, columns)
    )
    source = read(folder)
    assert asked == []
    assert source.captions(13) == ["thing 13"]
    assert asked == [("caption",)]
    source.images([13])
    assert set(asked) == {("caption",), ("image",)}


def test_row_groups_make_room(folder, monkeypatch):
    monkeypatch.setattr(parquet_stream, "HELD", 1)
    parquet_stream._held.cache_clear()
    source = read(folder)
    assert source.images([0, 19, 0, 5]).shape == (4, 3, 8, 8)
    assert len(parquet_stream._held(parquet_stream.os.getpid()).tables) == 1


def test_splits_by_row_groups_by_rows_and_by_files(folder, tmp_path):
    by_groups = {s: read(folder, s, val_fraction=0.2, test_fraction=0.2) for s in ("train", "val", "test")}
    said = {s: [source.captions(k)[0] for k in range(len(source))] for s, source in by_groups.items()}
    assert Counter(chain.from_iterable(said.values())) == Counter(f"thing {k}" for k in range(20))
    assert len(by_groups["val"].groups) == 1
    by_rows = {s: read(folder, s, val_fraction=0.1, test_fraction=0.05) for s in ("train", "val", "test")}
    assert {s: len(source) for s, source in by_rows.items()} == {"train": 17, "val": 2, "test": 1}
    table(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", packed(tmp_path / "more", 6))
    table(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet", packed(tmp_path / "more", 2, 6))
    assert len(read(tmp_path / "hub")) == 6
    assert len(read(tmp_path / "hub", "val")) == 2
    assert read(tmp_path / "hub").fingerprint() != read(tmp_path / "hub", "val").fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_each_row_once_in_windows_and_is_entered_anywhere(folder, workers):
    source = read(folder, shuffle_window=8)

    def epoch(start: int, rank: int = 0, world: int = 1, workers: int = workers) -> list[list[str]]:
        sampler = EpochSampler(
            20, 2, shuffle=True, drop_last=True, rank=rank, world=world, order=source.order
        )
        sampler.set_epoch(1, start)
        data = SourceDataset(source, seed=0)
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=identity_collate, num_workers=workers)
        return [batch["caption"] for batch in loader]

    whole = epoch(0)
    assert sorted(chain.from_iterable(whole)) == sorted(f"thing {k}" for k in range(20))
    assert epoch(4) == whole[4:]
    assert epoch(0, workers=0) == whole
    ranks = zip(epoch(1, 0, 2), epoch(1, 1, 2), strict=True)
    assert [Counter(a + b) for a, b in ranks] == [
        Counter(a + b) for a, b in zip(*[iter(whole[2:])] * 2, strict=True)
    ]


def test_from_elsewhere_after_faults(folder, monkeypatch):
    monkeypatch.setattr(access, "PAUSE", 0.001)
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    here = read(folder)
    try:
        there = read("memory://bucket/a-{00000..00001}.parquet")
        assert there.images(range(20)).equal(here.images(range(20)))
        assert len(read("memory://bucket/*.parquet")) == len(read("memory://bucket")) == 20
        _file, left = parquet_stream._file, [2]

        def shaky(file: str):
            left[0] -= 1
            if left[0] >= 0:
                raise ConnectionResetError("reset by peer")
            return _file(file)

        monkeypatch.setattr(parquet_stream, "_file", shaky)
        parquet_stream._open.cache_clear()
        parquet_stream._held.cache_clear()
        assert there.captions(3) == ["thing 3"]
        left[0] = 99
        parquet_stream._open.cache_clear()
        with pytest.raises(
            UserError, match=r"cannot be read, 5 times in a row \(ConnectionReset.*resume=true"
        ):
            there.captions(19)
        monkeypatch.setattr(parquet_stream, "_file", _file)
        parquet_stream._open.cache_clear()
        files.rm("/bucket", recursive=True)
        with pytest.raises(UserError, match="is no longer there; with it, resume=true goes on"):
            there.captions(10)
    finally:
        files.store.clear()


def test_what_is_no_parquet_is_named_and_rows_without_a_picture_are_replaced(tmp_path):
    opened.cache_clear()
    rows = packed(tmp_path / "loose", 8)
    rows[2]["image"]["bytes"], rows[5]["caption"] = b"", None
    table(tmp_path / "set" / "a.parquet", rows)
    (tmp_path / "set" / "b.parquet").write_bytes(b"PAR1 and no more")
    table(tmp_path / "set" / "c.parquet", [{"image": rows[0]["image"]}])
    odd = r"2 of 3 files are left out \(.*b.parquet: no whole parquet file, .*c.parquet: without the column c"
    with pytest.warns(UserWarning, match=odd):
        source = read(tmp_path / "set")
    with pytest.warns(UserWarning, match="row 2 of row group 0: empty"):
        source.images([2])
    assert source.captions(2) == ["thing 3"]
    with pytest.warns(UserWarning, match="without a readable caption"):
        assert source.captions(5) == ["thing 6"]


@pytest.mark.parametrize(
    ("path", "options", "line"),
    [
        ("set", {"filters": Filters(min_side=8)}, "data.filters needs to have seen all pictures"),
        ("set", {"buckets": True}, "data.buckets needs to have seen all pictures"),
        ("set", {"caption_column": "title"}, "data.caption_column=title is not there; there are image"),
        ("loose", {}, "there are no parquet files"),
        ("loose/0.png", {}, "reads parquet, which .*0.png is not"),
        ("nowhere/x.parquet", {}, "there is no such file"),
        ("broken.parquet", {}, "has no usable parquet file; .*broken.parquet is no whole parquet file"),
    ],
)
def test_one_line(folder, tmp_path, path, options, line):
    (tmp_path / "broken.parquet").write_bytes(bytes(100))
    with pytest.raises(UserError, match=line):
        read(tmp_path / path, **options)


def test_rows_are_numbered_across_groups(folder):
    source = read(folder)
    assert source.first.tolist() == [0, 4, 8, 10, 14, 18, 20]
    assert np.array_equal(source.rows, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1] * 2)
    assert source.called(11).endswith("a-00001.parquet, row 1 of row group 0")
