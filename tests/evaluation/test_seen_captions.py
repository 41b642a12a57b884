"""Captions that a training read: those of the items that its sampler drew."""

import json

import yaml

from dalle.data.shapes import Shapes
from dalle.data.sources import EpochSampler
from dalle.evaluation.seen_captions import captions_read


def run(folder, steps, source="dalle.data.shapes.Shapes", **node):
    """A finished run as far as anybody asks here."""
    folder.mkdir(parents=True)
    data = {"_target_": source, "_partial_": True, "image_size": 16, "size": 100}
    datamodule = {"source": data, "batch_size": 8, "seed": 3, **node}
    config = {
        "model": {"_target_": "x"},
        "datamodule": datamodule,
        "trainer": {"devices": 1, "accumulate_grad_batches": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "stage": folder.name, "steps": steps}))
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


def test_captions_of_the_items_that_were_drawn(tmp_path):
    source = Shapes("train", 16, size=100)
    batches = list(EpochSampler(100, 16, shuffle=True, drop_last=True, seed=3))
    drawn = {item for batch in batches[:3] for item in batch}
    found = captions_read({"decoder": run(tmp_path / "decoder", 3)})
    assert found == set(source.captions_of(sorted(drawn)))
    assert len(found) < len(set(source.captions_of(range(100))))


def test_epochs_limits_and_several_stages(tmp_path):
    source = Shapes("train", 16, size=100)
    every = captions_read({"prior": run(tmp_path / "prior", 200)})
    assert every == set(source.captions_of(range(100)))
    few = captions_read({"dalle": run(tmp_path / "dalle", 200, train_items=40)})
    assert few == set(source.captions_of(range(40)))
    paths = {"dalle": str(tmp_path / "dalle"), "clip": str(tmp_path / "prior"), "image_tokenizer": "nowhere"}
    assert captions_read(paths) == few  # its CLIP only chooses
    paths = {"decoder": str(tmp_path / "dalle"), "clip": str(tmp_path / "prior"), "prior": "open_clip/x/y"}
    assert captions_read(paths) == every


def test_other_data_add_none(tmp_path):
    assert captions_read({"dalle": run(tmp_path / "dalle", 9, "dalle.data.folder.Folder")}) == set()
