"""`dalle encode` by any number of processes, and training from what it has written."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import untrained
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from made_tars import picture, tar
from omegaconf import OmegaConf
from tiny import ROOT, overrides, weights

import dalle.files as dalle_files
from dalle.cli.encode import main
from dalle.cli.entry import said
from dalle.data import encoding
from dalle.data.encoded import Encoded
from dalle.data.webdataset import WebDataset
from dalle.errors import UserError
from dalle.files import _host, hidden_name
from dalle.instantiate import instantiate
from dalle.locks import locked
from dalle.nets.clip import CLIP
from dalle.run_dir import Run, load_clip, load_image_tokenizer
from dalle.training import fit

ITEMS = 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def logs(untrained_stages) -> Path:
    return untrained_stages


@pytest.fixture
def shards(tmp_path) -> Path:
    """One shard; every third picture has two captions."""
    members = [
        {f"{k:03}.png": picture(k), f"{k:03}.txt": f"thing {k}\n{'again' if k % 3 == 0 else ''}".encode()}
        for k in range(ITEMS)
    ]
    return tar(tmp_path / "shards" / "0.tar", *members).parent


def encode(kind: str, logs: Path, data: Path, out: Path, *more: str) -> None:
    GlobalHydra.instance().clear()
    main([kind, "name=default", f"paths.logs='{logs}'", *of(data), f"out='{out}'", *more])


def of(data: Path) -> list[str]:
    return ["data=webdataset", f"data.shards='{data}'", "data.image_size=16", "data.lines=all",
            "data.shuffle_window=null"]  # fmt: skip


def config(model: str, logs: Path, *more: str) -> dict:
    words = [word for word in overrides(model, logs, *more) if not word.startswith("data.size")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("train", words), resolve=True)  # pyright: ignore[reportReturnType]


def train(model: str, logs: Path, run: Path, *more: str) -> Run:
    fit.train(config(model, logs, f"paths.run='{run}'", "trainer.max_steps=5", *more))
    return Run(run)


def files(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.suffix}


# What is written


def test_the_layout_is_clip_retrievals_and_the_values_are_the_networks(logs, shards, tmp_path):
    encode("clip", logs, shards, tmp_path / "out", "shard_items=16")
    source, clip = WebDataset("train", shards, 16, lines="all"), load_clip(logs / "default" / "clip")
    folder = tmp_path / "out" / "train"
    images = np.concatenate([np.load(folder / f"img_emb/img_emb_{k}.npy") for k in range(3)])
    exact = clip.embed_image(source.images(range(len(source)))).numpy()
    np.testing.assert_allclose(images, exact, rtol=1e-4, atol=1e-5)
    rows = [
        row for k in range(3) for row in pq.read_table(folder / f"metadata/metadata_{k}.parquet").to_pylist()
    ]
    assert [row["captions"] for row in rows] == [source.captions(i) for i in range(len(source))]
    assert [row["caption"] for row in rows] == [source.captions(i)[0] for i in range(len(source))]
    texts = np.concatenate([np.load(folder / f"text_emb/text_emb_{k}.npy") for k in range(3)])
    flat = [caption for row in rows for caption in row["captions"]]
    np.testing.assert_allclose(texts, clip.embed_captions(flat)["text_embed"].numpy(), rtol=1e-4, atol=1e-5)
    assert np.load(folder / "text_hidden/text_hidden_0.npy").dtype == np.float16
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["weights"] == clip.weights_hash
    assert (
        manifest["fingerprint"]["train"]
        == WebDataset("train", shards, 16, lines="all", shuffle_window=None).fingerprint()
    )


def test_codes_and_latents(logs, shards, tmp_path):
    encode("codes", logs, shards, tmp_path / "codes")
    source, net = WebDataset("train", shards, 16), load_image_tokenizer(logs / "default" / "dvae")
    codes = np.load(tmp_path / "codes/train/codes/codes_0.npy")
    assert codes.dtype == np.uint16
    assert (codes == net.encode(source.images(range(len(source)))).numpy()).all()
    untrained("vae", tmp_path / "logs")
    encode("latents", tmp_path / "logs", shards, tmp_path / "latents", "dtype=float16")
    latents = np.load(tmp_path / "latents/train/latents/latents_0.npy")
    assert latents.dtype == np.float16
    assert latents.shape == np.load(tmp_path / "latents/train/latents_logvar/latents_logvar_0.npy").shape


def test_bf16_is_measured(logs, shards, tmp_path, capsys):
    encode("clip", logs, shards, tmp_path / "out", "precision=bf16", "splits=[train]")
    assert "bf16 beside fp32 on 36 pictures: mean_cosine 0.99" in capsys.readouterr().out
    difference = json.loads((tmp_path / "out" / "manifest.json").read_text())["difference"]
    assert 0.99 < difference["least_cosine"] <= difference["mean_cosine"] < 1 + 1e-9


# Several processes, one after another or at once


def test_it_goes_on_where_it_was_killed_and_passes_by_what_others_hold(logs, shards, tmp_path, capsys):
    out = tmp_path / "out"
    encode("clip", logs, shards, out, "shard_items=10")
    whole = files(out)
    (out / "train/metadata/metadata_1.parquet").unlink()  # killed before the last file of a shard
    (out / "val/metadata/metadata_0.parquet").unlink()
    (out / "train/img_emb/img_emb_1.npy").write_bytes(b"half")
    with locked(out / ".locks" / "val_0"):
        encode("clip", logs, shards, out, "shard_items=10")
        assert "5 of 6 shards are whole, 1 of them written now; the others" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"1 of 1 shards of val are still to be written"):
            Encoded("val", out)
    encode("clip", logs, shards, out, "shard_items=10")
    now = files(out)
    assert now.keys() == whole.keys()
    changed = {name for name in now if now[name] != whole[name]}
    assert all("_1." in name or name.startswith("val/") for name in changed)
    assert len(Encoded("val", out)) == 2


def test_what_a_killed_process_has_left_is_removed(logs, shards, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(dalle_files, "alive", lambda pid: pid == 7)
    encode("clip", logs, shards, out, "splits=[train]")
    dead, other = (hidden_name(out / "train/img_emb/x").with_suffix(f".{_host()}-{n}.tmp") for n in (8, 7))
    for left in (dead, other):
        left.write_bytes(b"half")
    encode("clip", logs, shards, out, "splits=[train]")
    assert not dead.exists()
    assert other.exists()  # of a process that is at work


def test_whoever_stops_it_is_told_what_stays(logs, shards, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        encode("clip", logs, shards, tmp_path / "out")
    assert "out: whole shards are kept; the same command goes on with the others\n" in capsys.readouterr().out


def test_numbers_that_do_not_fit_are_not_written(logs, shards, tmp_path, monkeypatch):
    made = CLIP.encode_image
    monkeypatch.setattr(CLIP, "encode_image", lambda net, image: 1e9 * made(net, image))
    with pytest.raises(UserError, match="too large for float16: give precision=fp32 and dtype=float32"):
        encode("clip", logs, shards, tmp_path / "out", "dtype=float16")
    assert not list((tmp_path / "out").rglob("*.npy"))
    encode("clip", logs, shards, tmp_path / "large", "text_states=false")


def test_a_full_disk_is_one_line(logs, shards, tmp_path, monkeypatch):
    """Not the end of the process at the first row that finds no room."""

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="the disk is full"):
        encode("clip", logs, shards, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_paths_of_a_mixture_hold_from_any_folder(logs, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    source = ["+data@data.sources.a=webdataset", "data.sources.a.shards=shards", "data.image_size=16"]
    main(["clip", "name=default", f"paths.logs='{logs}'", "data=mixture", *source, "out=out"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Encoded("train", tmp_path / "out").images([0]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (["shard_items=20"], "encoded otherwise .*shard_items 10, here 20"),
        (["data.image_size=8"], "image_size 16, here 8"),
        (["dtype=float16"], "dtype float32, here float16"),
    ],
)
def test_other_settings_are_refused(logs, shards, tmp_path, change, error):
    encode("clip", logs, shards, tmp_path / "out", "shard_items=10")
    with pytest.raises(UserError, match=error):
        encode("clip", logs, shards, tmp_path / "out", "shard_items=10", *change)


def test_mistakes_are_one_line(logs, shards, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"holds something else \(mine\.txt\)"):
        encode("clip", logs, shards, tmp_path / "full")
    with pytest.raises(UserError, match="give one of clip, codes, latents; did you mean codes"):
        main(["code"])
    with pytest.raises(UserError, match=r"set data\.image_size=16"):
        encode("codes", logs, shards, tmp_path / "out", "data.image_size=8")
    with pytest.raises(UserError, match="shard_items must be"):
        encode("codes", logs, shards, tmp_path / "out", "shard_items=0")
    for wrong in ("splits=[]", "splits=train", "splits=['../x']", "device=tpu", "+foo=1", "~name",
                  "clip=null", "upstream=null", "data=null"):  # fmt: skip
        with pytest.raises(Exception, match=wrong.lstrip("+~").partition("=")[0]) as error:
            encode("clip", logs, shards, tmp_path / "out", wrong)
        assert "this is a bug" not in said(error.value)
    with pytest.raises(UserError, match="holds no finished run"):
        encode("clip", tmp_path / "none", shards, tmp_path / "out")
    with pytest.raises(UserError, match="holds no manifest"):
        Encoded("train", tmp_path)
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / "full") == ["mine.txt"]


def facts(path: Path, **changes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def rows(path: Path, name: str, change) -> None:
    file = path / f"train/{name}/{name}_0.npy"
    np.save(file, change(np.load(file)))


DAMAGE = {
    "more shards than a disk holds": lambda path: facts(path, items={"train": 2**39}, shard_items=1),
    "more items than numbers": lambda path: facts(path, items={"train": 2**70}),
    "fewer rows": lambda path: rows(path, "img_emb", lambda a: a[:3]),
    "other rows": lambda path: rows(path, "text_hidden", lambda a: a[:, :1]),
    "nothing": lambda path: (path / "train/img_emb/img_emb_0.npy").write_bytes(b""),
    "words": lambda path: rows(path, "img_emb", lambda a: a.astype("U5")),
    "other sizes": lambda path: facts(path, network={"embed_dim": 2**60}),
    "no pictures' settings": lambda path: facts(path, data={"node": {"_partial_": True}}),
    "settings of no pictures": lambda path: facts(path, data={"node": {"_target_": "torch.nn.Identity"}}),
    "settings of a network": lambda path: facts(path, data={"node": {"_target_": "dalle.nets.vae.VAE"}}),
    "no fingerprint": lambda path: facts(path, fingerprint={}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(logs, shards, tmp_path, damage):
    encode("clip", logs, shards, tmp_path / "out")
    DAMAGE[damage](tmp_path / "out")

    def read() -> None:
        source = Encoded("train", tmp_path / "out")
        source.embeddings(load_clip(logs / "default" / "clip"))
        source.images([0])

    with pytest.raises(
        UserError, match=r"damaged|still to be written|must be|changed|not an option|cannot be read|no source"
    ):
        read()


def test_codes_that_are_none(logs, shards, tmp_path):
    encode("codes", logs, shards, tmp_path / "out")
    rows_of = tmp_path / "out/train/codes/codes_0.npy"
    np.save(rows_of, np.full_like(np.load(rows_of), 65535))
    codes = Encoded("train", tmp_path / "out").codes(load_image_tokenizer(logs / "default" / "dvae"))
    with pytest.raises(UserError, match="holds codes that are none of 32"):
        codes([0])


# What is trained from it


def test_a_prior_without_pictures_is_that_with_pictures(logs, shards, tmp_path):
    direct = train("prior", logs, tmp_path / "direct", *of(shards))
    encode("clip", logs, shards, tmp_path / "out")
    shutil.rmtree(shards)
    encoded = train("prior", logs, tmp_path / "encoded", "data=encoded", f"data.path='{tmp_path / 'out'}'",
                    "datamodule.num_workers=1")  # fmt: skip
    expected = weights(direct)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(encoded).items())
    # Text states are kept in half precision, and a test of pictures keeps nothing
    assert encoded.manifest()["metrics"] == pytest.approx(direct.manifest()["metrics"], abs=1e-4)
    with pytest.raises(UserError, match=r"holds no pictures, which are needed here, and .*not there"):
        Encoded("train", tmp_path / "out").images([0])


@pytest.mark.parametrize(("model", "kind"), [("decoder", "clip"), ("dalle", "codes")])
def test_stages_that_need_pictures_have_them_from_the_data(logs, shards, tmp_path, model, kind):
    direct = train(model, logs, tmp_path / "direct", *of(shards))
    encode(kind, logs, shards, tmp_path / "out")
    encoded = train(model, logs, tmp_path / "encoded", "data=encoded", f"data.path='{tmp_path / 'out'}'")
    expected = weights(direct)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(encoded).items())


def test_another_network_or_other_pictures_are_refused(logs, shards, tmp_path):
    encode("clip", logs, shards, tmp_path / "out")
    untrained("clip", tmp_path / "logs", seed=1)
    settings = ("data=encoded", f"data.path='{tmp_path / 'out'}'")
    data = instantiate(config("prior", tmp_path / "logs", *settings)["datamodule"], "datamodule")
    with pytest.raises(UserError, match="embeddings by another network"):
        data.prepare_data()
    with pytest.raises(UserError, match="holds clip, and codes are needed: dalle encode codes"):
        Encoded("train", tmp_path / "out").codes(data.clip)
    tar(shards / "1.tar", {"x.png": picture(1), "x.txt": b"new"})
    with pytest.raises(UserError, match="have changed since they were encoded"):
        Encoded("train", tmp_path / "out").images([0])


def test_rows_come_in_any_order_and_windows(logs, shards, tmp_path):
    encode("clip", logs, shards, tmp_path / "out", "shard_items=7")
    source = Encoded("train", tmp_path / "out", shuffle_window=5)
    cache = source.embeddings(load_clip(logs / "default" / "clip"))
    items = [20, 3, 13, 14, 0, 35]
    assert cache.images(items).equal(torch.cat([cache.images([item]) for item in items]))
    assert source.order is not None
    assert sorted(source.order(0, 0, len(source))(np.arange(len(source)))) == list(range(len(source)))
