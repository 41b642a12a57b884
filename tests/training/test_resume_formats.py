"""A run over each format of data that is stopped and resumed ends as one that never stopped."""

import os
import signal

import datasets
import lightning
import pytest
import tiny
import torch
from formats import coco, idx, packed, parquet, picture, write, zipped
from tiny import column, train, weights

from dalle.run_dir import Run
from dalle.training import fit

STEPS, STOP = 6, 3
MIXTURE = (
    "mixture data.weights={a:3,b:1} +data@data.sources.a=table data.sources.a.path=TABLE.tsv "
    "data.sources.a.root=images data.sources.a.crop=random +data@data.sources.b=zip "
    "data.sources.b.root=PICTURES.zip datamodule.num_workers=2"
)


class Interrupt(lightning.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == STOP:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def samples(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    monkeypatch.setattr(tiny, "COMMON", tuple(word for word in tiny.COMMON if word != "data.size=32"))
    coco(tmp_path / "COCO", train=20, val=4)
    rows = "".join(f"{picture(tmp_path / 'images' / f'{k}.png', k).name}\tthing {k}\n" for k in range(20))
    write(tmp_path / "TABLE.tsv", f"filepath\ttitle\n{rows}")
    parquet(tmp_path / "PACKED.parquet", packed(tmp_path / "loose", 20))
    zipped(tmp_path / "PICTURES.zip", 20)
    idx(tmp_path / "MNIST")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    ["coco data.root=COCO", "hf data.path=PACKED.parquet", "table data.path=TABLE.tsv data.root=images",
     "zip data.root=PICTURES.zip", "idx data.root=MNIST", MIXTURE],
)  # fmt: skip
def test_stopped_and_resumed_is_as_never_stopped(samples, monkeypatch, words):
    """Captions and crops of an epoch that was entered amid, too: the stop is in the second one."""
    monkeypatch.chdir(samples)
    options = (*f"data={words}".split(), "trainer.val_check_interval=2")
    options += () if words == MIXTURE else ("data.crop=random",)
    whole = train("clip", samples / "logs", "name=whole", *options, steps=STEPS)
    made = fit.make_trainer

    def make_trainer(config, run):
        trainer = made(config, run)
        trainer.callbacks.insert(0, Interrupt())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(fit, "make_trainer", make_trainer)
        with pytest.raises(SystemExit):
            train("clip", samples / "logs", "name=parts", *options, steps=STEPS)
    parts = Run(samples / "logs" / "parts" / "clip")
    assert not parts.finished
    train("clip", samples / "logs", "name=parts", "resume=true", *options, steps=STEPS)
    assert column(parts, "train/loss") == column(whole, "train/loss")
    assert all(torch.equal(weights(parts)[name], tensor) for name, tensor in weights(whole).items())
