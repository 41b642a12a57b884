"""Shards: what is read, how it is divided, in which order it comes, and what cannot harm."""

import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from made_tars import picture, sample, shards, tar

from dalle.data import shards as access
from dalle.data.shards import addresses, expanded
from dalle.data.shuffling import ShardOrder
from dalle.data.sources import EpochSampler
from dalle.data.webdataset import WebDataset, opened
from dalle.errors import UserError

ALL = {"val_fraction": 0.0, "test_fraction": 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dalle" / "shards"


def read(given, split="train", **options):
    return WebDataset(split, given, 8, **ALL | options)


def captions(source):
    return [source.captions(item) for item in range(len(source))]


# What is read


def test_samples_of_all_shards_in_order(tmp_path):
    source = read(shards(tmp_path / "a"))
    assert captions(source) == [[f"thing {k}"] for k in range(24)]
    alone = read(str(tar(tmp_path / "b.tar", sample(13))))
    assert source.images([13, 2])[0].equal(alone.images([0])[0])
    assert source.images(range(24)).shape == (24, 3, 8, 8)
    assert pickle.loads(pickle.dumps(source)).images([5]).equal(source.images([5]))  # a spawned worker


def test_every_kind_of_place_is_the_same_set(tmp_path):
    pattern = shards(tmp_path / "a")
    places = [
        pattern,
        tmp_path / "a",
        f"{tmp_path}/a/*.tar",
        "::".join(expanded(pattern, "")),
        f"file://{pattern}",
    ]
    places.append(expanded(pattern, ""))
    assert len({read(place).fingerprint() for place in places}) == 1
    assert read(f"{tmp_path}/a/{{00000..00001}}.tar").fingerprint() != read(pattern).fingerprint()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{08..10}", ["a08", "a09", "a10"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{1..0}{x,yz}", ["1x", "1yz", "0x", "0yz"]),
        ("a", ["a"]),
    ],
)
def test_braces(pattern, names):
    assert expanded(pattern, "data.shards") == names


def test_kinds_of_pictures_captions_and_names(tmp_path):
    long = "folder/" + "n" * 120
    members = {
        "a/b.one.two.txt": b"of another kind",
        "a/b.JPG": picture(0, "JPEG"), "a/b.txt": b"\xef\xbb\xbfone\r\ncaption\n",
        "b.webp": picture(1, "WEBP"), "b.json": b'{"width": 3, "caption": "two"}',
        f"{long}.png": picture(2), f"{long}.txt": "drei ü".encode(),
        "d.png": picture(3), "d.caption": "four".encode("utf-16"),
    }  # fmt: skip
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tar(tmp_path / f"{form}.tar", members, form=form)
        assert captions(read(path)) == [["one caption"], ["two"], ["drei ü"], ["four"]]
    assert captions(read(path, lines="all"))[0] == ["one", "caption"]
    assert captions(read(path, lines="first"))[0] == ["one"]


def test_names_with_dots_are_named(tmp_path):
    path = tar(tmp_path / "a.tar", sample(0), {"1.image.png": picture(1), "1.caption.txt": b"thing 1"})
    with pytest.warns(
        UserWarning, match=r"2 not named KEY.jpg or KEY.txt, where KEY has no dot \(a.tar/1.image"
    ):
        assert captions(read(path)) == [["thing 0"]]


def test_a_named_column_of_the_json(tmp_path):
    facts = {"0.png": picture(0), "0.txt": b"of txt", "0.json": b'{"caption": "of json", "alt": ["x", "y"]}'}
    path = tar(tmp_path / "a.tar", facts)
    assert captions(read(path)) == [["of txt"]]
    assert captions(read(path, caption_column="alt")) == [["x", "y"]]


# Splits


def test_a_column_that_is_not_there_is_told_at_once_with_those_that_are(tmp_path):
    shard = tar(tmp_path / "a.tar", {"0.png": picture(0), "0.txt": b"x", "0.json": b'{"alt": "a bird"}'})
    with pytest.raises(UserError, match=r"data\.caption_column=nope is in none .*/a\.tar; there are alt$"):
        read(shard, caption_column="nope")


def test_a_caption_in_another_encoding_says_so(tmp_path):
    source = read(
        tar(tmp_path / "a.tar", {"0.png": picture(0), "0.txt": "caf\xe9".encode("latin-1")}, sample(1))
    )
    with pytest.warns(UserWarning, match="sample 0 of train: with a caption that is not UTF-8 text"):
        assert source.captions(0) == ["thing 1"]


def test_few_shards_are_divided_by_their_keys_and_many_as_wholes(tmp_path):
    few = {
        s: read(shards(tmp_path / "few"), s, val_fraction=0.2, test_fraction=0.1)
        for s in ("train", "val", "test")
    }
    found = [caption for source in few.values() for caption in captions(source)]
    assert sorted(map(len, few.values())) == [2, 5, 17]
    assert sorted(found) == sorted([f"thing {k}"] for k in range(24))
    many = {
        s: read(shards(tmp_path / "many", 8, 2), s, val_fraction=0.25, test_fraction=0.125)
        for s in ("train", "val", "test")
    }
    assert [len(many[s].shards) for s in many] == [5, 2, 1]
    assert len({shard for source in many.values() for shard in source.shards}) == 8


def test_given_shards_and_folders(tmp_path):
    for name, start in (("train", 0), ("val", 10)):
        tar(tmp_path / name / "0.tar", *map(sample, range(start, start + 4)))
    by_folder = read(tmp_path, "val")
    given = read(tmp_path / "train" / "0.tar", "val", val_shards=str(tmp_path / "val"))
    assert captions(by_folder) == captions(given) == [[f"thing {k}"] for k in range(10, 14)]
    with pytest.raises(UserError, match="share a shard"):
        read(tmp_path, val_shards=str(tmp_path / "val"))


def test_two_samples_are_in_every_split(tmp_path):
    path = tar(tmp_path / "a.tar", sample(0), sample(1))
    for split in ("train", "val", "test"):
        assert len(read(path, split, val_fraction=0.1, test_fraction=0.1)) == 2


# What is left out


def test_what_could_harm_or_cannot_be_read_is_left_out_and_named(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = tar(
        tmp_path / "a.tar", sample(0), {"../../out.png": picture(1), "../../out.txt": b"outside"},
        {"evil.pyd": b"x", "evil.pth": b"x", "evil.pkl": b"x"}, {"1.png": picture(1)},
        {"2.png": b"", "2.txt": b"x"}, {"00000.png": b"x"}, {"3.txt": b"x"},
        {"4.png": picture(4), "4.txt": b"x" * 2**21},
    )  # fmt: skip
    with tarfile.open(path, "a") as file:
        file.addfile(link)
    with pytest.warns(UserWarning, match="2 samples are used") as said:
        source = read(path)
    line = str(said[0].message)
    assert captions(source) == [["thing 0"], ["outside"]]  # a key like another: nothing is unpacked
    assert "3 files that may hold Python objects, which are not opened (a.tar/evil.pyd, " in line
    for part in (
        "1 without a caption (a.tar/1)",
        "1 empty (a.tar/2)",
        "1 there twice, of which the first is read (a.tar/00000.png)",
        "1 links or devices (a.tar/link.png)",
        "1 with a caption of no or too many bytes (a.tar/4)",
    ):
        assert part in line


def test_larger_pictures_and_decompression_bombs(tmp_path):
    path = tar(
        tmp_path / "a.tar", *map(sample, range(3)), {"big.png": picture(9, size=(99, 99)), "big.txt": b"x"}
    )
    with pytest.warns(UserWarning, match=r"sample 3 of train: larger than 1000 pixels.*takes its place"):
        made = read(path, max_pixels=1000).images(range(4))
    assert made[3].equal(made[0])


@pytest.mark.parametrize("cut", [100, 600, 30_000])
def test_a_shard_cut_short_counts_as_far_as_it_is_whole(tmp_path, cut):
    whole = tar(tmp_path / "a" / "0.tar", *map(sample, range(20)))
    tar(tmp_path / "a" / "1.tar", *map(sample, range(20, 22)))
    whole.write_bytes(whole.read_bytes()[:cut])
    with pytest.warns(UserWarning, match="cut short|no tar file"):
        source = read(tmp_path / "a")
    assert 2 <= len(source) < 22
    assert captions(source) == [[f"thing {k}"] for k in [*range(len(source) - 2), 20, 21]]
    assert len(source.images(range(len(source)))) == len(source)


def test_damage_in_the_middle_and_shards_that_are_none(tmp_path):
    path = tar(tmp_path / "0.tar", *map(sample, range(4)))
    content = bytearray(path.read_bytes())
    at = content.index(b"00002.png")
    content[at : at + 512] = b"\xff" * 512
    path.write_bytes(content)
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "2.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    (tmp_path / "3.tar").touch()
    with pytest.warns(UserWarning, match="Left out") as said:
        assert captions(read(f"{tmp_path}/{{0..4}}.tar")) == [["thing 0"], ["thing 1"]]
    line = str(said[0].message)
    for part in (
        "1 damaged from there on (0.tar/byte",
        "1 shards no tar file (1.tar)",
        "1 shards empty (3.tar)",
        "1 shards compressed (gzip): unpack it (2.tar)",
        "1 shards not there (4.tar)",
    ):
        assert part in line


def test_a_name_that_would_fill_the_memory_ends_the_shard(tmp_path):
    path = tar(tmp_path / "a.tar", sample(0))
    bomb = tarfile.TarInfo("././@PaxHeader")
    bomb.type, bomb.size = tarfile.XHDTYPE, 2**20
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512) + bomb.tobuf(tarfile.USTAR_FORMAT) + bytes(2**20 + 1024)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged from there on"):
        assert captions(read(path)) == [["thing 0"]]


def test_a_broken_sample_is_replaced_with_its_caption_and_named_once(tmp_path):
    path = tar(
        tmp_path / "a.tar", sample(0), {"1.png": b"no picture", "1.txt": b"x"}, sample(2),
        {"3.png": picture(3), "3.json": b"{"}, sample(4),
    )  # fmt: skip
    source = read(path)
    with pytest.warns(UserWarning, match="another picture takes its place") as said:
        made = source.images(range(5))
    assert captions(source) == [["thing 0"], ["thing 2"], ["thing 2"], ["thing 4"], ["thing 4"]]
    assert made[1].equal(made[2])
    assert made[3].equal(made[4])
    assert len(said) == 2


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("{folder}/none.tar", "has no usable sample.*1 shards not there"),
        ("{folder}/*.tar", "there are no tar files"),
        ("{folder}", "there are no tar files"),
        ("pipe:cat {folder}/a.tar", "would run a program"),
        ("foo://bucket/a.tar", "foo"),
        ("reference://bucket/*.tar", "reference://bucket/.* cannot be read"),
        ("{folder}/{{0..9999999}}.tar", "more than 1,000,000 shards"),
        ("{folder}/a.tar::{folder}/a.tar", "more than once"),
    ],
)
def test_mistakes_are_one_line(tmp_path, given, error):
    with pytest.raises(UserError, match=error) as raised:
        read(given.format(folder=tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system knows no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match="no regular file"):
        read(tmp_path / "a.tar")


# The index, and copies of what lies elsewhere


def test_the_index_is_kept_until_a_shard_changes(tmp_path, monkeypatch, cache):
    pattern = shards(tmp_path / "a", 2)
    first = read(pattern)
    assert len(list((cache / "index").iterdir())) == 2
    made, index_tar = [], access.index_tar
    monkeypatch.setattr(access, "index_tar", lambda path, *a: made.append(path.name) or index_tar(path, *a))
    opened.cache_clear()  # as in another process
    assert read(pattern).fingerprint() == first.fingerprint()
    assert made == []
    tar(tmp_path / "a" / "00001.tar", *map(sample, range(50, 53)))
    opened.cache_clear()
    assert len(read(pattern)) == 11
    assert made == ["00001.tar"]


def test_shards_from_elsewhere_are_copied_and_make_room(tmp_path, cache):
    shards(tmp_path / "a", 3)
    files = fsspec.filesystem("memory")
    for path in sorted((tmp_path / "a").iterdir()):
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    here = read(tmp_path / "a")
    try:
        there = read("memory://bucket/{00000..00002}.tar")
        assert captions(there) == captions(here)
        assert there.images(range(24)).equal(here.images(range(24)))
        assert there.fingerprint() == here.fingerprint()
        assert len(read("memory://bucket/")) == 24
        for copy in (cache / "copies").glob("*.tar"):
            copy.unlink()
        size = (tmp_path / "a" / "00000.tar").stat().st_size
        small = read("memory://bucket/*.tar", copies_gb=1.5 * size / 2**30)
        assert small.images(range(24)).equal(here.images(range(24)))
        assert len(list((cache / "copies").glob("*.tar"))) == 1
        files.rm("/bucket", recursive=True)
        for copy in (cache / "copies").glob("*.tar"):
            copy.unlink()
        with pytest.raises(UserError, match="is no longer there"):
            read("memory://bucket/{00000..00002}.tar").images([1])
    finally:
        files.store.clear()


# The order


def test_an_epoch_is_each_sample_once_in_windows_of_shards():
    first = [0, 5, 5, 17, 30]
    order = ShardOrder(first, 7, False, seed=1, epoch=2, items=30)
    seen = order(np.arange(30))
    assert sorted(seen) == list(range(30))
    everything = ShardOrder(first, None, False, seed=1, epoch=2, items=30)(np.arange(30))
    assert sorted(everything) == list(range(30))
    assert (seen != everything).any()
    assert (ShardOrder(first, 7, False, 1, 3, 30)(np.arange(30)) != seen).any()
    unmixed = ShardOrder(first, 1, False, 1, 2, 30)(np.arange(30))
    assert [set(seen[k : k + 7]) for k in range(0, 30, 7)] == [
        set(unmixed[k : k + 7]) for k in range(0, 30, 7)
    ]
    assert (np.diff(unmixed) != 1).sum() <= 2  # the shards are in a new order, their samples are not


def test_any_place_can_be_entered_alone():
    whole = ShardOrder([0, 9, 40, 100], 16, False, 0, 0, 100)(np.arange(100))
    order = ShardOrder([0, 9, 40, 100], 16, False, 0, 0, 100)
    for k in (99, 3, 50, 16, 15):
        assert order(np.array([k]))[0] == whole[k]


def test_a_limit_keeps_to_the_first_items_and_resampling_repeats_shards():
    assert sorted(ShardOrder([0, 10, 20], 4, False, 0, 0, 13)(np.arange(13))) == list(range(13))
    drawn = [ShardOrder([0, 10, 20, 30], None, True, 0, e, 30)(np.arange(30)) for e in range(8)]
    assert any(len(set(some)) < 30 for some in drawn)
    counts = np.bincount(np.concatenate(drawn) // 10, minlength=3)
    assert (counts > 0).all()


def test_ranks_share_what_one_process_would_see(tmp_path):
    source = read(shards(tmp_path / "a"), shuffle_window=6)
    options = {"shuffle": True, "drop_last": True, "seed": 3, "order": source.order}
    one = list(EpochSampler(24, 8, **options))
    two = [list(EpochSampler(24, 4, rank=rank, world=2, **options)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]
    resumed = EpochSampler(24, 8, **options)
    resumed.set_epoch(0, 2)
    assert list(resumed) == one[2:]
    assert addresses(str(tmp_path / "a"), "data.shards")[0].endswith("00000.tar")


def test_threads_read_one_shard_at_once(tmp_path):
    content = bytes(range(256)) * 400
    (tmp_path / "a.tar").write_bytes(content)
    shard = access.Shard(str(tmp_path / "a.tar"), 0)
    with ThreadPoolExecutor(8) as threads:
        places = [37 * i % 100_000 for i in range(4000)]
        read = list(threads.map(lambda at: shard.read(at, 64), places))
    assert read == [content[at : at + 64] for at in places]
