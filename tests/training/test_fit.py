"""Training on the real configuration made tiny: what a run leaves behind, stopping, choices, loggers."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from tiny import (
    column,
    configure,
    train,
    wandb_config,
    wandb_history,
    wandb_records,
    weights,
    without_account,
)
from torch import Tensor

from dalle.data.tokenizers import tokenizer_facts
from dalle.errors import UserError
from dalle.run_dir import Run, load_stage
from dalle.training import fit

STAGES = ("clip", "prior", "decoder", "dvae", "dalle", "ar_prior")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """logs/ with tiny stages, each found by the next one by convention."""
    logs = tmp_path_factory.mktemp("logs")
    for stage in STAGES:
        train(stage, logs)
    return logs


@pytest.fixture
def logs(trained: Path, tmp_path: Path) -> Path:
    """logs/ with the tiny stages alone that others need: CLIP and the dVAE."""
    for stage in ("clip", "dvae"):
        shutil.copytree(trained / "default" / stage, tmp_path / "logs" / "default" / stage)
    return tmp_path / "logs"


class Probe(lightning.Callback):
    """Sees what happens in a run, and may end it: `hook` calls `stop` with the trainer."""

    def __init__(self, stop=None, hook: str = "on_train_batch_end"):
        if stop is not None:
            setattr(self, hook, lambda trainer, *_: stop(trainer))

    def on_fit_end(self, trainer, pl_module):
        self.live = {k: v.clone() for k, v in pl_module.net.state_dict().items()}
        self.ema = next(c for c in trainer.callbacks if type(c).__name__ == "Ema")
        self.trainer = trainer


@pytest.fixture
def probe(monkeypatch):
    """Puts a callback into the next run."""
    made = fit.make_trainer

    def put(callback):
        def make_trainer(config, run):
            trainer = made(config, run)
            trainer.callbacks.insert(len(trainer.callbacks) - 1, callback)  # checkpoints come last
            return trainer

        monkeypatch.setattr(fit, "make_trainer", make_trainer)
        return callback

    return put


def interrupt_in(step: int):
    """Ctrl-C while a step is under way, given by the number of those before it."""

    def stop(trainer):
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return Probe(stop, "on_train_batch_start")


def stop_at(step: int):
    def stop(trainer):
        if trainer.global_step == step:
            raise KeyboardInterrupt

    return stop


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What a run leaves behind


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_what_the_readme_says(trained, stage):
    run = Run(trained / "default" / stage)
    files = {".dalle-run", "config.yaml", "last.ckpt", "model.safetensors", "manifest.json", "metrics.csv"}
    tokenizer = {"tokenizer.json"} if stage in ("clip", "dalle") else set()
    samples = {"samples"} if stage in ("decoder", "dalle") else set()
    assert {p.name for p in run.path.iterdir()} == files | tokenizer | samples
    manifest = run.manifest()
    assert (manifest["stage"], manifest["steps"], manifest["image_size"]) == (stage, 2, 16)
    assert manifest["parameters"] == sum(p.numel() for p in load_stage(run.path)[0].net.parameters())
    assert manifest["data"]["items"] == {"train": 32, "val": 8, "test": 8}
    assert manifest["versions"]["torch"] == torch.__version__
    assert math.isfinite(manifest["metrics"]["test/loss"])
    assert list(column(run, "train/loss")) == [0, 1]
    norms = column(run, "train/grad_norm")
    assert len(norms) == 2
    assert min(norms.values()) > 0
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["model"]["net"].get("image_size", 16) == 16  # `auto` is resolved
    assert "auto" not in config["model"]["net"].values()


def test_stages_name_the_clip_they_belong_to(trained):
    clip, prior, decoder = (Run(trained / "default" / stage).manifest() for stage in STAGES[:3])
    assert prior["clip"] == decoder["clip"] == {"weights": clip["weights"], "embed_dim": 8}
    assert prior["image_embed_norm"] == decoder["image_embed_norm"]
    assert prior["image_embed_norm"]["kind"] == "whitened"
    assert prior["tokenizer"] == clip["tokenizer"]


def test_dalle_names_the_tokenizers_it_belongs_to(trained):
    dvae, dalle = (Run(trained / "default" / stage) for stage in ("dvae", "dalle"))
    assert dalle.manifest()["image_tokenizer"] == {
        "weights": dvae.manifest()["weights"],
        "vocab_size": 32,
        "grid": 4,
    }
    tokenizer = dalle.load_tokenizer()
    assert dalle.manifest()["tokenizer"] == tokenizer_facts(tokenizer)
    assert dalle.config()["model"]["net"]["text_vocab"] == tokenizer.vocab_size


def test_metrics_of_each_stage(trained):
    metrics = {stage: Run(trained / "default" / stage).manifest()["metrics"] for stage in STAGES}
    assert {"test/text_to_image_r1", "test/image_to_text_r5"} <= metrics["clip"].keys()
    assert {"test/cosine_image", "test/cosine_caption", "test/cosine_other_caption"} <= metrics[
        "prior"
    ].keys()
    assert {"test/clip_score", "test/judge/all"} <= metrics["decoder"].keys()
    assert metrics["decoder"]["test/pictures"] == metrics["dalle"]["test/pictures"] == 4
    assert any(name.startswith("test/fid") for name in metrics["decoder"])
    assert {"test/cosine_image", "test/cosine_of_codes", "test/bits_per_code"} <= metrics["ar_prior"].keys()
    codes = {"test/text_loss", "test/image_loss", "test/bits_per_code", "test/accuracy", "test/judge/all"}
    assert codes <= metrics["dalle"].keys()


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_nothing_that_runs_code(trained, stage):
    state = torch.load(trained / "default" / stage / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    frozen = ("clip", "tokenizer")
    assert not any(name in key for key in state["state_dict"] for name in frozen)


def test_weights_are_the_moving_average(logs, probe):
    seen = probe(Probe())
    run = train("prior", logs, steps=4)
    saved = weights(run)
    assert same(saved, {k: seen.ema.average[k] for k in saved})
    assert not same(saved, seen.live)


def test_an_occupied_directory_stays_as_it_is(trained):
    run = Run(trained / "default" / "prior")
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    with pytest.raises(UserError, match=r"resume=true .* name=other .* overwrite=true"):
        train("prior", trained)
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before


def test_a_finished_run_is_not_resumed(trained, capsys):
    run = Run(trained / "default" / "prior")
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    train("prior", trained, "resume=true")
    assert "is finished" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before


def test_overwrite_starts_again(trained, logs):
    run = train("prior", logs)
    (run.path / "samples").mkdir()
    (run.path / "samples" / "old").touch()
    train("prior", logs, "overwrite=true")
    assert not (run.path / "samples").exists()
    assert same(weights(run), weights(Run(trained / "default" / "prior")))  # and the seed decides everything


# Stopping and going on


@pytest.mark.parametrize("stage", [*STAGES, "vqgan", "vae", "upsampler"])
def test_stopped_and_resumed_is_as_never_stopped(logs, probe, capsys, stage):
    """The same losses and averages, though epochs begin at steps 4 and 8, and a validation runs at step 4."""
    options = ("trainer.val_check_interval=4",)
    if stage == "clip":
        shutil.rmtree(logs)
    whole = train(stage, logs, "name=default", f"paths.run='{logs}/whole'", *options, steps=10)
    probe(interrupt_in(4))
    with pytest.raises(SystemExit):
        train(stage, logs, f"paths.run='{logs}/parts'", *options, steps=10)
    parts = Run(logs / "parts")
    assert "resume=true goes on from step 5" in capsys.readouterr().out
    assert torch.load(parts.checkpoint, weights_only=True)["global_step"] == 5
    assert not parts.finished
    probe(Probe())
    train(stage, logs, f"paths.run='{logs}/parts'", "resume=true", *options, steps=10)
    assert column(parts, "train/loss") == column(whole, "train/loss")
    assert column(parts, "val/loss") == column(whole, "val/loss")
    assert same(weights(parts), weights(whole))
    assert same(*(torch.load(r.checkpoint, weights_only=True)["state_dict"] for r in (parts, whole)))
    assert parts.manifest()["metrics"] == whole.manifest()["metrics"]


def test_killed_and_resumed_goes_on_from_the_last_checkpoint(logs, probe):
    """An end without any warning, two steps after the last checkpoint."""
    whole = train("prior", logs, f"paths.run='{logs}/whole'", steps=8)
    kept = {}

    def kill(trainer):
        if trainer.global_step == 3:
            kept["ckpt"] = Path(trainer.checkpoint_callback.path).read_bytes()
        if trainer.global_step == 5:
            raise RuntimeError("killed")

    probe(Probe(kill))
    run = Run(logs / "parts")
    with pytest.raises(RuntimeError, match="killed"):
        train("prior", logs, f"paths.run='{run}'", "callbacks.checkpoint.every=2", steps=8)
    run.checkpoint.write_bytes(kept["ckpt"])
    assert torch.load(run.checkpoint, weights_only=True)["global_step"] == 2
    probe(Probe())
    train("prior", logs, f"paths.run='{run}'", "resume=true", steps=8)
    assert column(run, "train/loss") == column(whole, "train/loss")
    assert same(weights(run), weights(whole))


def test_stopped_amid_a_validation(logs, probe):
    """The checkpoint holds the live weights, not the average that is validated; that validation is lost."""
    options = ("trainer.val_check_interval=3",)
    whole = train("prior", logs, f"paths.run='{logs}/whole'", *options, steps=6)
    probe(Probe(stop_at(3), "on_validation_batch_start"))
    with pytest.raises(SystemExit):
        train("prior", logs, f"paths.run='{logs}/parts'", *options, steps=6)
    probe(Probe())
    parts = train("prior", logs, f"paths.run='{logs}/parts'", "resume=true", *options, steps=6)
    assert column(parts, "train/loss") == column(whole, "train/loss")
    assert column(parts, "val/loss").items() < column(whole, "val/loss").items()
    assert same(weights(parts), weights(whole))


def test_stopped_amid_the_test(logs, probe):
    whole = train("prior", logs, f"paths.run='{logs}/whole'")

    def stop(trainer):
        raise KeyboardInterrupt

    probe(Probe(stop, "on_test_batch_start"))
    with pytest.raises(SystemExit):
        train("prior", logs, f"paths.run='{logs}/parts'")
    assert not Run(logs / "parts").finished
    probe(Probe())
    parts = train("prior", logs, f"paths.run='{logs}/parts'", "resume=true")
    assert same(weights(parts), weights(whole))
    assert parts.manifest()["metrics"] == whole.manifest()["metrics"]


def test_a_truncated_checkpoint_is_named(logs, probe):
    probe(interrupt_in(0))
    with pytest.raises(SystemExit):
        train("prior", logs)
    path = logs / "default" / "prior" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read .* overwrite=true"):
        train("prior", logs, "resume=true")


def test_another_network_cannot_go_on(logs, probe):
    probe(interrupt_in(0))
    with pytest.raises(SystemExit):
        train("prior", logs)
    run = Run(logs / "default" / "prior")
    before = run.checkpoint.read_bytes()
    with pytest.raises(UserError, match=r"of another network .* config\.yaml"):
        train("prior", logs, "resume=true", "model.net.width=32")
    assert run.checkpoint.read_bytes() == before


# Choices


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("dit", ()),
        ("dit", ("model.net.checkpoint=true", "precision=bf16")),
        ("decoder", ("model.net.checkpoint=true",)),
        ("decoder", ("precision=bf16", "optimizer=adam", "optimizer.warmup=2")),
        ("prior", ("precision=bf16", "optimizer=sgd", "datamodule.image_embed_norm=standardized")),
        ("ar_prior", ("precision=bf16", "model.net.checkpoint=true", "datamodule.cache_items=0",
                      "datamodule.image_embed_norm=standardized")),
        ("ar_prior", ("trainer.accumulate_grad_batches=2", "datamodule.dims=3", "model.net.waves=0")),
        ("clip", ("precision=bf16", "model.net.checkpoint=true", "optimizer=adam")),
        ("dalle", ("precision=bf16", "model.net.attention=dalle", "model.net.checkpoint=true")),
        ("dalle", ("model.net.style=llama", "model.pad_loss=false", "datamodule.cache_items=0")),
        ("prior", ("trainer.accumulate_grad_batches=2", "datamodule.cache_items=0", "sampler=dpmpp")),
        (
            "decoder",
            ("model.denoiser.learned_variance=true", "model.denoiser.prediction=eps",
             "model.denoiser.schedule.name=cosine", "model.denoiser.time_sampling=uniform",
             "model.net.out_channels=6",
             "sampler=ddpm", "sampler.steps=2", "sampler.variance=learned"),
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(o.split("=")[0].split(".")[-1] for o in v) or "plain",
)  # fmt: skip
def test_choices_train(logs, stage, options):
    run = train(stage, logs, f"paths.run='{logs}/run'", *options)
    assert run.manifest()["steps"] == 2
    assert all(torch.isfinite(w).all() for w in weights(run).values())
    assert len(set(column(run, "train/loss").values())) == 2


def test_gradient_checkpointing_changes_nothing(logs):
    runs = [
        train("decoder", logs, f"paths.run='{logs}/{on}'", f"model.net.checkpoint={on}")
        for on in ("true", "false")
    ]
    assert column(runs[0], "train/loss") == column(runs[1], "train/loss")


def test_without_callbacks(logs):
    config = configure("decoder", logs, "callbacks=none", "trainer.max_steps=2")
    made = fit.make_trainer(config, Run(logs / "none")).callbacks
    assert [type(c).__name__ for c in made] == ["LastCheckpoint"]
    assert "test/loss" in train("decoder", logs, "callbacks=none").manifest()["metrics"]


@pytest.mark.compile
def test_compiled(logs):
    """A compiled network saves the same names, and comes close to the same losses."""
    runs = [train("prior", logs, f"paths.run='{logs}/{on}'", f"compile={on}") for on in ("true", "false")]
    assert weights(runs[0]).keys() == weights(runs[1]).keys()
    losses = [list(column(run, "train/loss").values()) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_fp16_composes(tmp_path):
    config = configure("decoder", tmp_path, "precision=fp16")
    assert config["trainer"]["precision"] == "16-mixed"
    assert config["optimizer"]["fused"] is False


# Debug runs, loggers, the console


@pytest.mark.parametrize("stage", STAGES)
def test_one_batch_leaves_no_finished_run(logs, stage):
    train(stage, logs, "debug=one_batch", "name=default")
    train(stage, logs, "debug=one_batch")  # again: its directory is its own
    assert not Run(logs / "debug" / stage).finished
    assert not (logs / "default" / stage / "metrics.csv").exists() or stage in ("clip", "dvae")


def test_overfit_sees_the_same_batches(logs):
    run = Run(logs / "debug" / "prior")
    loud = "datamodule.image_embed_norm=unit_times_sqrt_dim"  # a few directions are learned within 40 steps
    train("prior", logs, "debug=overfit", "trainer.log_every_n_steps=2", loud, steps=40)
    assert not run.finished
    losses = list(column(run, "train/loss").values())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert not (logs / "default" / "prior").exists()


def test_several_loggers(logs):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    run = train("decoder", logs, "logger=[csv,tensorboard]", "trainer.val_check_interval=2")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {"train/loss", "val/loss", "test/judge/all"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples", "test/verdicts_sheet"]
    assert [round(e.value, 5) for e in events.Scalars("train/loss")] == [
        round(v, 5) for v in column(run, "train/loss").values()
    ]


def test_wandb_offline(logs, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    without_account(monkeypatch, tmp_path)
    monkeypatch.delenv("WANDB_DATA_DIR")
    try:
        run = train("decoder", logs, "logger=[csv,wandb]", "trainer.val_check_interval=2", "name=default")
    finally:
        wandb.finish()
    (offline,) = (run.path / "wandb").glob("offline-run-*")
    records = wandb_records(offline)
    assert {"train/loss", "val/loss", "test/judge/all"} <= wandb_history(records).keys()
    assert len(list(offline.glob("files/media/images/samples_*.png"))) == 1

    (begun,) = [record.run for record in records if record.HasField("run")]
    assert (begun.display_name, begun.run_group, begun.job_type) == ("default-decoder", "default", "decoder")
    assert begun.tags == ["decoder"]
    config, manifest = wandb_config(records), run.manifest()
    assert config["stage"] == "decoder"
    assert config["parameters"] == manifest["parameters"]
    assert config["facts"] == {"data": manifest["data"], "upstream": {"clip": manifest["clip"]["weights"]}}
    assert config["uses"] == [f"default-clip:{manifest['clip']['weights']}"]

    logged = {record.artifact.name: record.artifact for record in records if record.HasField("artifact")}
    model = logged["default-decoder"]
    assert model.type == "model"
    assert set(model.aliases) == {"latest", manifest["weights"]}
    assert json.loads(model.metadata) == manifest
    files = {entry.path: Path(entry.local_path) for entry in model.manifest.contents}
    assert files == {name: run.path / name for name in ("manifest.json", "model.safetensors")}
    samples = {entry.path for entry in logged["default-decoder-samples"].manifest.contents}
    assert samples == {"step-0000002.png", "test.png"}

    table = json.loads((offline / "files" / wandb_history(records)["test/verdicts/path"]).read_text())
    assert table["columns"][:3] == ["prompt", "image", "colour"]
    assert len(table["data"]) == 4
    assert {row[table["columns"].index("all")] for row in table["data"]} <= {True, False}
    (verdicts,) = [artifact for artifact in logged.values() if artifact.type == "run_table"]
    kept = [Path(entry.local_path) for entry in verdicts.manifest.contents]
    assert sum(entry.path.endswith(".png") for entry in verdicts.manifest.contents) == 4
    assert all(path.is_relative_to(run.path) and path.is_file() for path in kept)


def test_metrics_csv_is_written_whatever_the_loggers(logs):
    run = train("prior", logs, "logger=[tensorboard]")
    assert len(column(run, "train/loss")) == 2


def test_samples_are_drawn_in_validation(logs):
    run = train(
        "decoder",
        logs,
        "trainer.val_check_interval=2",
        "callbacks.grid.every=4",
        "callbacks.grid.count=3",
        steps=8,
    )
    assert sorted(p.name for p in (run.path / "samples").glob("step-*")) == [
        f"step-000000{n}.png" for n in (2, 4, 8)
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_the_console_is_quiet(logs, capfd, stage):
    """No warnings and no remarks: with bars off, a run that goes well says in one line what it is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        options = ("trainer.val_check_interval=2", "trainer.log_every_n_steps=50")
        train(stage, logs, f"paths.run='{logs}/run'", *options, steps=3)
    assert [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)] == []
    out, err = capfd.readouterr()
    assert re.fullmatch(rf"{stage}: [\d,]+ parameters, 32 items, 3 steps of 8 = 0.75 epochs\n", out)
    assert "arning" not in err


def test_a_size_that_does_not_fit_is_named(logs):
    with pytest.raises(UserError, match=r"model\.net\.embed_dim=9 does not fit the data, which has 8"):
        train("prior", logs, "model.net.embed_dim=9")


def test_trainer_mistakes_are_the_users(logs):
    with pytest.raises(UserError, match="trainer"):
        train("prior", logs, "trainer.gradient_clip_algorithm=nonsense")


def test_a_clip_elsewhere_must_be_there(logs):
    config = configure("prior", logs, f"upstream.clip='{logs}/nowhere'")
    with pytest.raises(UserError, match=r"upstream\.clip=.*nowhere holds no finished clip"):
        fit.missing_runs(config)
    missing = fit.missing_runs(configure("prior", logs, "name=other"))
    assert missing == {"clip": Run(logs / "other" / "clip")}
    assert fit.missing_runs(configure("prior", logs)) == {}
    assert fit.missing_runs(configure("clip", logs, "name=other")) == {}
    config = configure("dalle", logs, "name=other")
    assert fit.missing_runs(config) == {"dvae": Run(logs / "other" / "dvae")}
    config = configure("dalle", logs, "image_tokenizer=vqgan")
    assert fit.missing_runs(config) == {"vqgan": Run(logs / "default" / "vqgan")}


def test_manifest_is_plain_json(trained):
    for stage in STAGES:
        text = (trained / "default" / stage / "manifest.json").read_text()
        assert json.loads(text)["schema"] == 1
        assert "NaN" not in text
