"""What preflight says is what is true, for every stage, and it leaves nothing behind."""

import gc
import itertools
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from conftest import files_below, untrained
from tiny import NETS, column, configure, overrides, train
from torch import nn
from torch.utils.data import DataLoader

from dalle.errors import UserError
from dalle.optim.factory import OptimizerFactory
from dalle.run_dir import Run
from dalle.stages.base import Stage
from dalle.training import fit, memory, preflight
from dalle.training.checks import build_stage

NEEDED = {"clip": (), "dvae": (), "vqgan": (), "vae": (), "dalle": ("clip", "dvae")}  # others need a CLIP


@pytest.mark.parametrize("model", NETS)
def test_every_stage(command, untrained_stages, tmp_path, model):
    for stage in NEEDED.get(model, ("clip",)):
        shutil.copytree(untrained_stages / "default" / stage, tmp_path / "logs" / "default" / stage)
    before = files_below(tmp_path)
    ended = command("train.py", *overrides(model, Path("logs")), "preflight=true", "trainer.max_steps=30")
    assert ended.code == 0, ended.err
    assert {name for name in files_below(tmp_path) if ".cache" not in name} == before.keys()
    first, *lines = [line for line in ended.out.splitlines() if line]
    stage = {"dit": "decoder"}.get(model, model)
    (number,) = re.findall(rf"^{stage}: ([\d,]+) parameters, 32 items, 30 steps of 8 = 7.5 epochs$", first)
    said = {line[2:13].strip(): line[13:].strip() for line in lines}
    assert list(said) == ["parameters", "upstream", "sizes", "step", "to the end", "memory", "measured"]
    each = [int(part.rpartition(" ")[2].replace(",", "")) for part in said["parameters"].split(", ")]
    assert sum(each) == int(number.replace(",", ""))
    assert re.match(r"[\d.]+ GFLOP and [\d.]+ s a device, [\d.]+ GFLOP/s \(cpu, 32-true\)$", said["step"])
    assert re.match(r"30 steps on 1 device: \d+ s without validation and tests$", said["to the end"])
    assert "activations" in said["memory"]
    alone = ("clip", "dvae", "vae", "upsampler")  # a VQGAN has its perceptual distance's
    assert ("frozen networks" in said["memory"]) == (model not in alone)
    assert ("clip" in said["upstream"]) == (model in ("prior", "ar_prior", "decoder", "dit", "gan"))


class Toy(Stage):
    def __init__(self, n_in: int, width: int, n_out: int) -> None:
        super().__init__(OptimizerFactory(torch.optim.Adam, lr=1e-3, weight_decay=0.0, warmup=0))
        self.net = nn.Sequential(nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, n_out))

    def step(self, batch):
        return {"loss": self.net(batch["image"]).square().mean()}


class ToyData(lightning.LightningDataModule):
    sizes = {"image_size": 64}  # noqa: RUF012

    def __init__(self, batch: int, n_in: int) -> None:
        super().__init__()
        self.batch, self.n_in = batch, n_in

    def items(self, split: str) -> int:
        return 100 * self.batch

    def train_dataloader(self):
        batches: Any = [{"image": torch.randn(self.batch, self.n_in)} for _ in range(100)]
        return DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_figures_of_a_network_small_enough_to_count(tmp_path, capsys, accumulate):
    """Two layers: a forward pass, and backward two of weights and one of activations (none into the data)."""
    batch, n_in, width, n_out = 128, 64, 256, 32
    more = [f"trainer.accumulate_grad_batches={accumulate}", "trainer.max_steps=50", "callbacks=none"]
    config = configure("clip", tmp_path, *more) | {"batch_size": batch}
    config["callbacks"]["ema"] = None
    stage = Toy(n_in, width, n_out)
    data = ToyData(batch, n_in)
    watched = preflight.watch(config, stage, data)
    assert watched.flops == 4 * batch * n_in * width + 6 * batch * width * n_out
    kept = 4 * batch * (n_in + width + n_out)  # float32: what enters either layer, and the loss
    assert kept <= watched.activations <= kept + 1024
    assert watched.saved.now == 0  # all of it was let go
    preflight.report(config, stage, data, done=20)
    said = capsys.readouterr().out
    weights = (n_in + 1) * width + (width + 1) * n_out
    assert f"{weights:,} parameters, 12,800 items, 50 steps of {batch * accumulate}" in said
    assert "30 steps on 1 device" in said
    kib = f"{4 * weights / 1024:.3g} KiB"
    assert f"weights {kib} + gradients {kib} + optimizer {8 * weights / 1024:.3g} KiB" in said
    stays = weights * (4 + 8 + 4 * (accumulate > 1))
    (at_once,) = re.findall(r"; ([\d.]+) KiB at once", said)
    most = kept + 4 * weights + 2 * 4 * batch * width  # gradients, and of activations in the making
    assert stays + kept <= 1024 * float(at_once) <= stays + most
    per_step = watched.flops * accumulate / 1e9
    assert f"{per_step:.4g} GFLOP" in said


def test_steps_by_epochs_and_without_an_end(tmp_path):
    config, data = configure("clip", tmp_path), ToyData(8, 4)
    for steps, epochs, expected in ((30, -1, 30), (-1, 2, 100), (30, 2, 30), (300, 2, 100), (-1, -1, None)):
        config["trainer"] |= {"max_steps": steps, "max_epochs": epochs}
        assert preflight.total_steps(config, data, world=2) == expected
    assert preflight.outline(config, Toy(4, 4, 4), data, 2).endswith("steps of 16 without an end")


@pytest.mark.parametrize(
    ("limit", "batches"), [(None, 9), (3, 3), (4, 3), (5, 3), (100, 9), (1.0, 9), (0.5, 3), (0.7, 6)]
)
def test_epochs_that_are_cut_short_are_of_whole_steps(tmp_path, limit, batches):
    assert preflight.whole_batches(11, limit, accumulated=3) == batches
    config, data = configure("clip", tmp_path), ToyData(1, 4)
    data.items = lambda split: 11
    config["trainer"] |= {"max_steps": -1, "max_epochs": 4, "limit_train_batches": limit}
    config["trainer"]["accumulate_grad_batches"] = 3
    config["batch_size"] = 1
    assert preflight.total_steps(config, data, world=1) == 4 * batches // 3


def test_training_takes_as_many_steps_as_was_said(tmp_path, capsys):
    more = ("trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=3", "trainer.max_epochs=3")
    run = train("vae", tmp_path, *more, steps=-1)
    assert run.manifest()["steps"] == 3
    assert "3 steps of 16" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1, 2, 0.2])
def test_an_epoch_of_less_than_a_step_is_refused(tmp_path, limit):
    with pytest.raises(UserError, match=rf"limit_train_batches={limit} .*no whole step .*accumulate.*=3"):
        preflight.whole_batches(11, limit, accumulated=3)


def test_batches_that_teach_nothing_are_refused_as_in_training(command, tmp_path):
    words = (*overrides("clip", Path("logs")), "batch_size=1")
    for more in ((), ("preflight=true",)):
        assert "needs batch_size=2 or more" in command("train.py", *words, *more).error


def test_a_resumed_run_has_less_to_do(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train("clip", Path("logs"), steps=4)
    (run.path / "manifest.json").unlink()
    before = files_below(tmp_path)
    words = ["preflight=true", "trainer.max_steps=10"]
    assert "6 steps on 1" in command("train.py", *overrides("clip", Path("logs")), *words, "resume=true").out
    assert "10 steps on 1" in command("train.py", *overrides("clip", Path("logs")), *words).out
    assert files_below(tmp_path) == before


def test_every_training_begins_with_the_outline(tmp_path, capsys):
    alone = "model.classification_weight=0"  # nothing is trained beside the network
    run = train("clip", tmp_path / "logs", alone, steps=2)
    parameters = run.manifest()["parameters"]
    said = f"clip: {parameters:,} parameters, 32 items, 2 steps of 8 = 0.5 epochs\n"
    assert capsys.readouterr().out.startswith(said)
    assert max(column(run, "train/loss")) == 1


def test_runs_that_no_pipeline_takes_together(command, untrained_stages, tmp_path):
    shutil.copytree(untrained_stages / "default" / "decoder", tmp_path / "logs" / "default" / "decoder")
    clip = untrained("clip", tmp_path / "logs", seed=9)
    said = command("train.py", *overrides("prior", Path("logs")), "preflight=true").out
    assert "careful: logs/default/decoder was trained with another clip" in said
    shutil.rmtree(clip.path)
    shutil.copytree(untrained_stages / "default" / "clip", clip.path)
    assert "careful" not in command("train.py", *overrides("prior", Path("logs")), "preflight=true").out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(command, tmp_path):
    words = [*overrides("clip", Path("logs")), "trainer=gpu", "precision=bf16", "preflight=true"]
    said = command("train.py", *words).out
    assert "(cuda:0, bf16-mixed)" in said
    assert re.search(r"seen at most [\d.]+ MiB$", said, re.MULTILINE)


def test_a_step_too_large_for_the_device(command, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(lightning.Trainer, "fit", full)
    line = command("train.py", *overrides("clip", Path("logs")), "preflight=true").error
    assert "a step does not fit into the memory of cpu; give a smaller batch_size" in line


class Allocated(memory.Live):
    """What the allocator gives and takes back meanwhile, beside what is counted."""

    most = 0

    def __enter__(self) -> Any:
        gc.collect()  # what earlier tests have left would be given back meanwhile
        self.before = self.now
        self.profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self.profile.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.profile.__exit__(None, None, None)
        made: Any = self.profile.profiler
        events = [e for e in made.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        Allocated.most = self.before + max(itertools.accumulate(e.nbytes() for e in events))


def foretold(monkeypatch, model: str, logs: Path, *more: str) -> tuple[int, int]:
    """Bytes at once, as they are counted, and by the allocator."""
    monkeypatch.setattr(preflight, "Live", Allocated)
    monkeypatch.setattr(preflight, "WARM", 0)
    monkeypatch.setattr(preflight, "TIMED", 1)
    config = configure(model, logs, f"paths.run='{logs / 'run' / model}'", *more)
    datamodule, _ = fit.prepare(config, Run(Path(config["paths"]["run"])))
    stage: Any = build_stage(config["model"])
    watched = preflight.watch(config, stage, datamodule)
    found = preflight.at_once(config, stage, datamodule, watched)
    return found, found - watched.live + Allocated.most


HALF = ("precision=bf16", "callbacks.ema=null")
WAYS = [
    *((model, ("optimizer=adamw",)) for model in NETS),
    *((model, (*HALF, "optimizer=adamw")) for model in ("clip", "decoder", "dvae", "dalle")),
    *((model, ("optimizer=muon",)) for model in ("prior", "decoder")),
    ("dalle", ("model.net.checkpoint=true", "trainer.accumulate_grad_batches=2")),
    ("dit", ("optimizer=adamw_8bit",)),
]


@pytest.mark.parametrize(("model", "way"), WAYS, ids=lambda given: given if isinstance(given, str) else None)
def test_memory_is_what_the_allocator_sees(monkeypatch, untrained_stages, tmp_path, model, way):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    counted, seen = foretold(monkeypatch, model, tmp_path / "logs", *way)
    assert counted == pytest.approx(seen, rel=0.1)


class Clock:
    """Stands for the time of a run whose batches take so many seconds."""

    def __init__(self, monkeypatch, seconds: list[float]):
        self.now, self.seconds = 0.0, iter(seconds)
        monkeypatch.setattr(preflight.time, "perf_counter", self)

    def __call__(self) -> float:
        self.now += next(self.seconds, 1.0)
        return self.now


class Elsewhere(Stage):
    """A stage without weights that says it is on this device."""

    device: Any = None

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.net = device, SimpleNamespace(compile=lambda **_: None)


def watch_batches(watched: preflight.Watch, device: str) -> int:
    """Batches on a stage that says it is on this device, until the watch has seen enough; how many."""
    stage = Elsewhere(torch.device(device))
    strategy = SimpleNamespace(root_device=stage.device, batch_to_device=lambda batch: batch)
    trainer: Any = SimpleNamespace(should_stop=False, strategy=strategy)
    watched.on_fit_start(trainer, stage)
    for k in range(50):
        if trainer.should_stop:
            return k
        strategy.batch_to_device({})
        watched.on_train_batch_start(trainer, stage, {}, k)
        watched.on_train_batch_end(trainer, stage)
    raise AssertionError("never enough")


@pytest.mark.parametrize(
    ("seconds", "timed"),
    [
        ([1.0] * 20, preflight.TIMED),
        ([1.0, 1.0, 300.0, 90.0] + [1.0] * 20, preflight.TIMED),  # compiled in the first two batches
        ([100.0] * 20, 1),
    ],
)
def test_compiling_takes_no_batch_away(monkeypatch, seconds, timed):
    Clock(monkeypatch, seconds)
    watched = preflight.Watch(compiled=True)
    batches = watch_batches(watched, "cpu")
    assert batches - watched.watched - preflight.WARM - 1 == watched.timed == timed
    assert watched.seconds(1) == seconds[-1]


def test_a_step_of_many_batches_has_one_that_takes_longer(monkeypatch):
    Clock(monkeypatch, [1.0, 3.0] * 20)
    watched = preflight.Watch(compiled=False, accumulated=2)
    watch_batches(watched, "cpu")
    assert watched.seconds(2) == 4
    assert watched.seconds(8) == 7 + 3


def test_on_a_gpu_it_says_so_and_what_was_in_use_there(monkeypatch, tmp_path, capsys):
    """The stage is back on the CPU when the report is written."""
    resets: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    watched = preflight.Watch(compiled=True)
    watch_batches(watched, "cuda:0")
    assert watched.device == torch.device("cuda:0")
    assert resets == [watched.device] * 2  # after the first batch, and after the one that was not compiled
    stage, data = Toy(4, 8, 2), ToyData(8, 4)
    stage.trainer = SimpleNamespace(optimizers=[])  # pyright: ignore
    config = configure("clip", tmp_path, "callbacks=none", "trainer.max_steps=50")
    assert preflight.memory(config, stage, data, watched).endswith("; seen at most 3 GiB")
    monkeypatch.setattr(preflight, "watch", lambda *_: watched)
    preflight.report(config, stage, data, done=0)
    assert "GFLOP/s (cuda:0, 32-true)" in capsys.readouterr().out
