"""Pictures under their originals, figures and the histogram of codes, for any stage that gives some back."""

import logging
from types import SimpleNamespace
from unittest.mock import Mock

import lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tiny import train

from dalle.data.datamodules import SourceDataModule
from dalle.data.shapes import Shapes
from dalle.errors import UserError
from dalle.images import GAP
from dalle.metrics.codebook_usage import CodeUse
from dalle.metrics.fid import FrechetDistance
from dalle.stages.base import Stage
from dalle.training.reconstructions import Reconstructions, log_histogram, sheet


class Copy(Stage):
    """Gives back what it sees; every picture is the codes 0 and 1."""

    codebook_advice = "think again"

    def __init__(self, vocab_size: int = 4):
        super().__init__()
        self.net = SimpleNamespace(vocab_size=vocab_size)
        self.logged = {}

    def log_dict(self, table, **_):
        self.logged.update({key: float(value) for key, value in table.items()})


def run(tmp_path, stage, split: str = "val", step: int = 5, codes: bool = True, **options):
    source = Shapes("test", image_size=32, size=16)
    data = Mock(spec=SourceDataModule, split=lambda name: source)
    trainer = Mock(
        spec=lightning.Trainer, datamodule=data, is_global_zero=True, global_step=step, loggers=[],
        world_size=1,
    )  # fmt: skip
    callback = Reconstructions(tmp_path, **options)
    for part in (range(8), range(8, 16)):
        image = source.images(part)
        batch = {
            "image": image,
            "index": torch.tensor(part),
            "caption": [source.captions(i)[0] for i in part],
        }
        outputs = {"loss": torch.zeros(()), "reconstruction": image}
        if codes:
            outputs["codes"] = torch.tensor([[0, 1]]).expand(8, 2)
        getattr(callback, f"on_{'validation' if split == 'val' else 'test'}_batch_end")(
            trainer, stage, outputs, batch, 0
        )
    getattr(callback, f"on_{'validation' if split == 'val' else 'test'}_epoch_end")(trainer, stage)
    return callback


def test_figures_and_a_sheet(tmp_path):
    stage = Copy()
    callback = run(tmp_path, stage, count=3)
    assert stage.logged["val/psnr"] > 40
    assert stage.logged["val/code_perplexity"] == pytest.approx(2)
    assert stage.logged["val/codes_dead"] == 2
    assert "val/judge_reconstruction" not in stage.logged
    (path,) = tmp_path.iterdir()
    assert path.name == "reconstruction-0000005.png"
    with Image.open(path) as picture:
        assert picture.width >= 3 * 128
    assert callback.metrics == []  # the next validation begins anew
    assert callback.due == 1000


def test_the_judge_tests(tmp_path):
    stage = Copy()
    run(tmp_path, stage, "test")
    assert stage.logged["test/judge_reconstruction"] == 1
    assert not list(tmp_path.iterdir())


def test_without_codes(tmp_path):
    stage = Copy()
    run(tmp_path, stage, codes=False)
    assert not any("code" in key for key in stage.logged)


def test_stages_that_reconstruct_nothing_are_left_alone(tmp_path):
    callback, stage = Reconstructions(tmp_path), Copy()
    trainer = Mock(spec=lightning.Trainer)
    callback.on_validation_batch_end(trainer, stage, {"loss": torch.zeros(())}, {}, 0)
    callback.on_validation_epoch_end(trainer, stage)
    assert stage.logged == {}


def test_a_collapsed_codebook_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(tmp_path, Copy(vocab_size=3))
        assert not caplog.records
        stage = Copy(vocab_size=64)
        callback = Reconstructions(tmp_path)
        callback.metrics, callback.codes = [Mock(spec=FrechetDistance, compute=dict)], CodeUse(64)
        callback.codes.update(torch.zeros(4, 200, dtype=torch.int64))
        callback.tell(Mock(spec=lightning.Trainer, is_global_zero=True, loggers=[]), stage, "val")
    (record,) = caplog.records
    assert "1 of 64 codes are in use (perplexity 1.0); think again" in record.message


def test_originals_stand_over_reconstructions():
    image, made = torch.full((2, 3, 32, 32), -1.0), torch.full((2, 3, 32, 32), 1.0)
    picture = sheet(image, made, ["a", "b"])
    assert picture.getpixel((GAP + 5, GAP + 5)) == (0, 0, 0)
    assert picture.getpixel((GAP + 5, picture.height - 60)) == (255, 255, 255)
    assert picture.getpixel((GAP + 150, GAP + 5)) == (0, 0, 0)


def test_histogram_for_tensorboard():
    writer = Mock()
    logger = Mock(spec=TensorBoardLogger, experiment=writer)
    trainer = Mock(spec=lightning.Trainer, loggers=[logger], global_step=7)
    log_histogram(trainer, "val/codes", torch.tensor([3, 0, 1]))
    given = writer.add_histogram_raw.call_args
    assert given.args == ("val/codes",)
    assert given.kwargs["bucket_counts"] == [3, 0, 1]
    assert given.kwargs["bucket_limits"] == [1, 2, 3]
    assert (given.kwargs["num"], given.kwargs["sum"], given.kwargs["global_step"]) == (4, 2, 7)


def test_a_large_codebook_has_fewer_bins():
    logger = Mock(spec=TensorBoardLogger, experiment=Mock())
    trainer = Mock(spec=lightning.Trainer, loggers=[logger], global_step=7)
    log_histogram(trainer, "codes", torch.ones(8192, dtype=torch.int64))
    given = logger.experiment.add_histogram_raw.call_args.kwargs
    assert given["bucket_counts"] == [32] * 256


def test_damaged_inception_weights_are_told_before_anything_is_trained(tmp_path):
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"inception\.pth does not hold the FID Inception's weights"):
        train("vae", tmp_path, f"callbacks.reconstructions.inception={weights}", steps=2)
    assert not (tmp_path / "default" / "vae" / "metrics.csv").exists()
