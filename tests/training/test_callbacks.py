"""Callbacks on a stage to follow by hand: moving average, pictures, loss by time, checkpoints."""

import math
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import lightning
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from dalle.data.datamodules import SourceDataModule
from dalle.data.shapes import Shapes
from dalle.optim.factory import OptimizerFactory
from dalle.stages.base import Stage
from dalle.training.callbacks import GenerationTest, LossByTime, SampleGrid, Throughput, take
from dalle.training.checkpoints import LastCheckpoint
from dalle.training.ema import Ema
from dalle.training.loggers import log_verdicts


class Line(Stage):
    """One weight w with loss w * x: SGD of step size 1 moves it down by the mean of x."""

    makes_images = True

    def __init__(self):
        super().__init__(
            OptimizerFactory(torch.optim.SGD, lr=1, weight_decay=0.0, warmup=0, decay="constant")
        )
        self.net = nn.Linear(1, 1, bias=False)
        self.other = nn.Parameter(torch.zeros(1))
        self.net.register_buffer("count", torch.zeros((), dtype=torch.int64))
        nn.init.zeros_(self.net.weight)
        self.seen: list[tuple[str, float]] = []

    @property
    def w(self) -> float:
        return self.net.weight.item()

    def step(self, batch):
        if self.training:
            self.net.count += 1
        self.seen.append(("train" if self.training else "eval", self.w))
        x = batch["image_embed"][:, 0]
        return {"loss": (self.net.weight[0] * x).mean(), "per_sample": x, "t": batch["image_embed"][:, 1]}

    def sample(self, batch, randn=torch.randn_like):
        """Gray pictures as light as the weight; what was drawn is kept."""
        self.drawn = randn(torch.empty(len(batch["caption"]), 3, 8, 8))
        self.seen.append(("sample", self.w))
        return self.drawn.clamp(-1, 1)


def batches(number: int = 8) -> DataLoader:
    """Samples of x = 1 at times 0, 1/4, 2/4, 3/4."""
    data = [
        {"image_embed": torch.tensor([1.0, i % 4 / 4]), "caption": f"picture {i}"} for i in range(4 * number)
    ]

    def collate(rows):
        return {
            "image_embed": torch.stack([r["image_embed"] for r in rows]),
            "caption": [r["caption"] for r in rows],
        }

    return DataLoader(data, batch_size=4, collate_fn=collate)


class Data(SourceDataModule):
    def __init__(self):
        super().__init__(Shapes, batch_size=4, val_items=None, test_items=None, train_items=None)

    def train_dataloader(self):
        return batches()

    def val_dataloader(self):
        return batches(1)


def fake_trainer(**attributes) -> lightning.Trainer:
    return Mock(spec=lightning.Trainer, **attributes)


class Log(lightning.pytorch.loggers.Logger):
    name, version = "log", ""

    def __init__(self):
        super().__init__()
        self.rows: dict[str, dict[int, float]] = {}

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        for key, value in metrics.items():
            self.rows.setdefault(key, {})[step] = value


def fit(stage: Stage, *callbacks, steps: int = 4, ckpt: Path | None = None, **options) -> lightning.Trainer:
    options = {"val_check_interval": 1000, "limit_val_batches": 0, "log_every_n_steps": 1, **options}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, callbacks=list(callbacks), logger=Log(),
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, LastCheckpoint) for c in callbacks), **options,
    )  # fmt: skip
    trainer.fit(stage, datamodule=Data(), ckpt_path=ckpt, weights_only=True)
    return trainer


def averages(steps: int, decay: float) -> list[float]:
    """The average after each step, w being -1, -2, -3 ... after them and 0 before."""
    average, out = 0.0, []
    for n in range(1, steps + 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * -n
        out.append(average)
    return out


class TestEma:
    @pytest.mark.parametrize("decay", [0.1, 0.25, 0.999])
    def test_is_the_formula(self, decay):
        """Decays 2/11, 3/12, 4/13 ... until `decay` is reached, on the trained network only."""
        stage, ema = Line(), Ema(decay)
        fit(stage, ema, steps=6)
        assert ema.average["weight"].item() == pytest.approx(averages(6, decay)[-1], rel=1e-6)
        assert stage.w == -6
        assert ema.average.keys() == {"weight", "count"}
        assert ema.average["count"] == stage.net.count == 6

    def test_first_decays(self):
        assert averages(2, 0.999) == pytest.approx([-9 / 11, 3 / 12 * -9 / 11 - 9 / 12 * 2])

    def test_every_other_step(self):
        stage, ema = Line(), Ema(0.999, every=2)
        fit(stage, ema, steps=4)
        assert ema.updates == 2
        first = (1 - 2 / 11) * -2
        assert ema.average["weight"].item() == pytest.approx(3 / 12 * first + 9 / 12 * -4)

    def test_accumulated_batches_count_once(self):
        stage, ema = Line(), Ema(0.999)
        fit(stage, ema, steps=3, accumulate_grad_batches=2)
        assert ema.updates == 3

    def test_validation_and_samples_see_the_average_and_training_goes_on_with_the_live_weights(
        self, tmp_path
    ):
        stage, ema = Line(), Ema(0.999)
        fit(stage, ema, SampleGrid(tmp_path, every=1), steps=4, val_check_interval=2, limit_val_batches=1)
        two, four = averages(4, 0.999)[1::2]
        assert [kind for kind, _ in stage.seen] == ["train", "train", "eval", "sample"] * 2
        assert [w for _, w in stage.seen] == pytest.approx([0, -1, two, two, -2, -3, four, four])

    def test_swapping_is_undone_exactly(self):
        stage, ema = Line(), Ema(0.999)
        fit(stage, ema)
        live = stage.w
        ema.swap_in(stage)
        ema.swap_in(stage)  # twice is once
        assert stage.w == ema.average["weight"].item() != live
        ema.swap_out(stage)
        assert stage.w == live

    def test_goes_on_from_a_checkpoint(self, tmp_path):
        fit(Line(), Ema(0.999), LastCheckpoint(tmp_path), steps=3)
        stage, ema = Line(), Ema(0.999)
        fit(stage, ema, steps=6, ckpt=tmp_path / "last.ckpt")
        assert ema.average["weight"].item() == pytest.approx(averages(6, 0.999)[-1], rel=1e-6)

    def test_starts_where_a_checkpoint_has_none(self, tmp_path):
        fit(Line(), LastCheckpoint(tmp_path), steps=3)
        stage, ema = Line(), Ema(0.999)
        fit(stage, ema, steps=4, ckpt=tmp_path / "last.ckpt")
        assert ema.average["weight"].item() == pytest.approx(2 / 11 * -3 + 9 / 11 * -4)


class TestSampleGrid:
    def test_same_noise_each_time_and_as_often_as_asked(self, tmp_path):
        stage, drawn = Line(), []
        original = stage.sample
        stage.sample = lambda *a, **k: (original(*a, **k), drawn.append(stage.drawn))[0]
        fit(stage, SampleGrid(tmp_path, every=4, count=3), steps=8, val_check_interval=2, limit_val_batches=1)
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["step-0000002.png", "step-0000004.png", "step-0000008.png"]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0][0], drawn[0][1])
        assert len(drawn[0]) == 3
        with Image.open(tmp_path / names[0]) as picture:
            assert min(picture.size) > 3 * 8

    def test_fewer_validation_pictures_than_asked_for(self, tmp_path):
        stage = Line()
        fit(stage, SampleGrid(tmp_path, count=16), steps=2, val_check_interval=2, limit_val_batches=1)
        assert len(stage.drawn) == 4

    def test_stages_without_pictures_are_left_alone(self, tmp_path):
        stage = Line()
        stage.makes_images = False
        fit(stage, SampleGrid(tmp_path), steps=2, val_check_interval=2, limit_val_batches=1)
        assert list(tmp_path.iterdir()) == []


class TestLossByTime:
    def test_means_by_bin(self):
        callback, logged = LossByTime(bins=4), {}
        stage, trainer = Line(), fake_trainer(global_step=1, log_every_n_steps=2)
        stage.log_dict = logged.update
        t = torch.tensor([0.01, 0.25, 0.26, 0.99, 1.0])
        callback.on_train_batch_end(
            trainer, stage, {"per_sample": torch.tensor([1.0, 2, 4, 8, 16]), "t": t}, {}, 0
        )
        assert logged == {}
        trainer.global_step = 2
        callback.on_train_batch_end(
            trainer, stage, {"per_sample": torch.tensor([3.0]), "t": torch.tensor([0.0])}, {}, 1
        )
        means = {k: v.item() for k, v in logged.items()}
        assert means["train/loss_t0.00-0.25"] == 2  # (1 + 3) / 2
        assert means["train/loss_t0.25-0.50"] == 3
        assert means["train/loss_t0.75-1.00"] == 12
        assert math.isnan(means["train/loss_t0.50-0.75"])  # nothing was there
        logged.clear()
        trainer.global_step = 4
        callback.on_train_batch_end(
            trainer, stage, {"per_sample": torch.tensor([5.0]), "t": torch.tensor([0.0])}, {}, 2
        )
        assert logged["train/loss_t0.00-0.25"] == 5  # the sums start again

    def test_in_a_run(self):
        trainer = fit(Line(), LossByTime(bins=4), steps=4, log_every_n_steps=2)
        assert trainer.logger.rows["train/loss_t0.50-0.75"] == {1: 1.0, 3: 1.0}

    def test_stages_without_times_are_left_alone(self):
        LossByTime().on_train_batch_end(fake_trainer(), Line(), {"loss": torch.ones(())}, {}, 0)


class TestThroughput:
    def test_counts_samples_of_all_ranks_but_no_validation(self, monkeypatch):
        clock, work = iter([10.0, 12.0, 50.0, 54.0]), iter([1.0, 4.0, 4.0, 8.0])
        monkeypatch.setattr("dalle.training.callbacks.time.perf_counter", lambda: next(clock))
        monkeypatch.setattr("dalle.training.callbacks.time.process_time", lambda: next(work))
        callback, logged = Throughput(), []
        stage, trainer = Line(), fake_trainer(world_size=2, global_step=1, log_every_n_steps=2)
        stage.log = lambda key, value: logged.append((key, value))
        batch = {"caption": ["a"] * 8}
        callback.on_train_batch_start(trainer, stage, batch, 0)  # at 10 s
        callback.on_train_batch_end(trainer, stage, None, batch, 0)
        trainer.global_step = 2
        callback.on_train_batch_start(trainer, stage, batch, 1)
        callback.on_train_batch_end(trainer, stage, None, batch, 1)  # at 12 s
        assert logged == [("train/samples_per_second", 2 * 16 / 2), ("train/cpu_cores", (4 - 1) / 2)]
        callback.on_validation_start()
        callback.on_train_batch_start(trainer, stage, batch, 2)  # at 50 s
        callback.on_train_batch_end(trainer, stage, None, batch, 2)  # at 54 s
        assert [value for _, value in logged[2:]] == [16 / 4, (8 - 4) / 4]


class Ender(lightning.Callback):
    def __init__(self, step: int, end):
        self.step, self.end = step, end

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.end()


class TestLastCheckpoint:
    def test_every_and_at_the_end(self, tmp_path):
        saved = []

        class Watched(LastCheckpoint):
            def save(self, trainer):
                before = self.saved_step
                super().save(trainer)
                if self.saved_step != before:
                    saved.append(self.saved_step)

        fit(Line(), Watched(tmp_path, every=2), steps=5)
        assert saved == [2, 4, 5]
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    def test_an_error_in_writing_leaves_the_old_one_whole(self, tmp_path, monkeypatch):
        fit(Line(), LastCheckpoint(tmp_path), steps=2)
        before = (tmp_path / "last.ckpt").read_bytes()
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        real = torch.save

        def save(state, file, *args, **kwargs):
            real(state, file, *args, **kwargs)
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(OSError, match="disk full"):
            fit(Line(), LastCheckpoint(tmp_path, every=1), steps=1)
        assert (tmp_path / "last.ckpt").read_bytes() == before

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_takes_effect_when_the_step_is_done(self, tmp_path, capfd, number):
        stage, handlers = Line(), [signal.getsignal(s) for s in LastCheckpoint.SIGNALS]
        with pytest.raises(SystemExit) as exit:
            fit(
                stage,
                Ema(),
                LastCheckpoint(tmp_path),
                Ender(3, lambda: os.kill(os.getpid(), number)),
                steps=6,
            )
        assert exit.value.code == 1
        assert stage.w == -4  # step 4 was under way
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert state["global_step"] == 4
        assert state["callbacks"]["Ema"]["updates"] == 4
        out, err = capfd.readouterr()
        assert "resume=true goes on from step 4" in out
        assert "once more stops at once" in err
        assert [signal.getsignal(s) for s in LastCheckpoint.SIGNALS] == handlers

    def test_a_second_signal_stops_at_once(self, tmp_path):
        def twice():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        stage = Line()
        with pytest.raises(SystemExit):
            fit(stage, LastCheckpoint(tmp_path), Ender(3, twice), steps=6)
        assert stage.w == -3
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3

    def test_an_error_elsewhere_saves_what_there_is(self, tmp_path):
        def fail():
            raise RuntimeError("elsewhere")

        with pytest.raises(RuntimeError, match="elsewhere"):
            fit(Line(), LastCheckpoint(tmp_path), Ender(2, fail), steps=6)
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2

    def test_an_error_before_training_touches_nothing(self, tmp_path):
        """The counter of steps is restored before the optimizer, which may not fit."""

        class Other(Line):
            def configure_optimizers(self):
                return torch.optim.SGD([{"params": [self.net.weight]}, {"params": [self.other]}], lr=1)

        fit(Line(), LastCheckpoint(tmp_path), steps=2)
        before = (tmp_path / "last.ckpt").read_bytes()
        with pytest.raises(ValueError, match="parameter groups"):
            fit(Other(), LastCheckpoint(tmp_path), steps=4, ckpt=tmp_path / "last.ckpt")
        assert (tmp_path / "last.ckpt").read_bytes() == before

    def test_handlers_are_given_back(self, tmp_path):
        handlers = [signal.getsignal(s) for s in LastCheckpoint.SIGNALS]
        fit(Line(), LastCheckpoint(tmp_path), steps=1)
        assert [signal.getsignal(s) for s in LastCheckpoint.SIGNALS] == handlers


class Copyist(Line):
    """Samples exactly the pictures it is shown."""

    def sample(self, batch, randn=torch.randn_like):
        noise = randn(torch.empty_like(batch["image"]))
        self.seen.append((batch["index"].tolist(), noise))
        return batch["image"]


class Clip(nn.Module):
    """Means of colours as embeddings."""

    embed_dim, image_size = 3, 32

    def embed_image(self, image):
        return image.flatten(2).mean(2) + torch.tensor([2.0, 0, 0])

    def embed_captions(self, captions):
        return {"text_embed": torch.ones(len(captions), 3)}


class TestGenerationTest:
    @pytest.fixture(autouse=True)
    def place(self, tmp_path):
        self.folder = tmp_path / "samples"

    def run(self, items: int, world: int = 1, clip: nn.Module | None = None, pictures=lambda made: made):
        source = Shapes("test", image_size=32, size=64)
        batch = {
            "index": torch.arange(16),
            "caption": [source.captions(i)[0] for i in range(16)],
            "image": source.images(range(16)),
        }
        datamodule = Mock(spec=SourceDataModule, split=lambda name: source, clip=clip, pictures=pictures)
        trainer = fake_trainer(datamodule=datamodule, world_size=world, global_rank=0, loggers=[])
        stage, logged = Copyist(), {}
        stage.log_dict = lambda table, **_: logged.update(table)
        callback = GenerationTest(self.folder, items=items, rows=10)
        callback.on_test_start(trainer, stage)
        for i in range(2):
            part = {k: v[8 * i : 8 * i + 8] for k, v in batch.items()}
            callback.on_test_batch_end(trainer, stage, None, part, i)
        callback.on_test_epoch_end(trainer, stage)
        return logged, stage, source

    def test_real_pictures_are_right_in_both_groups(self):
        logged, stage, source = self.run(items=12, clip=Clip())
        assert logged["test/pictures"] == 12
        assert [items for items, _ in stage.seen] == [list(range(8)), list(range(8, 12))]
        assert (
            logged["test/judge/all"] == logged["test/judge/seen/all"] == logged["test/judge/unseen/all"] == 1
        )
        assert 0 < source.unseen(range(12)).sum() < 12
        assert logged[next(k for k in logged if k.startswith("test/fid"))] == pytest.approx(0, abs=1e-3)

    def test_the_first_are_shown_with_their_verdicts(self, monkeypatch):
        shown = []
        monkeypatch.setattr(
            "dalle.training.callbacks.log_verdicts",
            lambda *given: shown.append(given) or log_verdicts(*given),
        )
        _, _, source = self.run(items=12, clip=Clip())
        ((_, key, captions, images, verdicts),) = shown
        assert key == "test/verdicts"
        assert list(captions) == [source.captions(i)[0] for i in range(10)]
        assert (images - source.images(range(10))).abs().max() < 0.5 / 127.5 + 1e-5
        assert verdicts["all"].tolist() == [1.0] * 10
        with Image.open(self.folder / "test.png") as picture:
            assert picture.width > 4 * 32

    def test_without_a_clip_the_judge_judges(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # no Inception either
        logged, _, _ = self.run(items=12)
        assert logged["test/judge/all"] == 1
        assert {key for key in logged if "judge" not in key} == {"test/pictures"}

    def test_what_was_made_becomes_pictures_in_the_datamodule(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        logged, _, _ = self.run(items=12, pictures=torch.zeros_like)
        assert logged["test/judge/all"] == 0

    def test_noise_belongs_to_the_item(self):
        _, stage, _ = self.run(items=16)
        _, other, _ = self.run(items=9)
        assert torch.equal(stage.seen[1][1][:1], other.seen[1][1])

    def test_items_are_shared_by_the_ranks(self):
        logged, _, _ = self.run(items=16, world=2)
        assert logged["test/pictures"] == 8


def test_take_keeps_the_first_of_everything():
    batch = take({"caption": ["a", "b", "c"], "index": torch.arange(3)}, 2)
    assert batch["caption"] == ["a", "b"]
    assert batch["index"].tolist() == [0, 1]
