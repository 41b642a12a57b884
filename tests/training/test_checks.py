# ruff: noqa: E501
"""Settings that cannot be are one line, before anything is claimed, made or started."""

from pathlib import Path

import pytest
from conftest import files_below
from tiny import ROOT, configure, mistake, overrides

from dalle.cli import entry
from dalle.errors import UserError
from dalle.training.checks import check_config

WHOLE = "must be a whole number"


@pytest.mark.parametrize(
    ("model", "setting", "line"),
    [
        ("clip", "+foo=1", "there is no setting foo"),
        ("clip", "name=[a]", "name must be text that is not empty, got ['a']"),
        ("clip", "name=''", "name must be text that is not empty, got ''"),
        ("clip", "stage=null", "stage must be text that is not empty, got None"),
        ("clip", "stage=prior", "stage=prior does not go with model._target_=dalle.stages.clip.ClipStage"),
        ("clip", "seed=-1", f"seed {WHOLE} of at least 0 and below 4294967296, got -1"),
        ("clip", "callbacks.ema=5", "callbacks.ema must be Callback, got 5"),
        ("clip", "datamodule=null", "datamodule must be a group of settings, got None"),
        ("clip", "model.optimizer=null", "model.optimizer=null trains nothing"),
        ("clip", "model._target_=5", "_target_ must be the name of a class, got '5'"),
        ("clip", "model._target_=null", "_target_ must be the name of a class, got 'None'"),
        ("clip", "logger.csv._target_=torch.nn.Identity", "logger.csv must be Logger, got an object of Identity"),
        ("clip", "~optimizer", "optimizer"),
        ("clip", "~resume", "resume is needed: do not take it away"),
        ("prior", "~trainer.max_steps", "trainer.max_steps is needed: do not take it away"),
        ("clip", "~trainer.devices", "trainer.devices is needed: do not take it away"),
        ("clip", "optimizer.lr=-1", "optimizer.lr must be a number above 0 and at most 1000, got -1"),
        ("clip", "optimizer.lr=nan", "optimizer.lr must be a number, got nan"),
        ("clip", "optimizer.lr=1e30", "optimizer.lr must be a number above 0 and at most 1000, got 1e+30"),
        ("clip", "optimizer.weight_decay=-1", "optimizer.weight_decay must be a number of at least 0, got -1"),
        ("clip", "optimizer.warmup=-5", f"optimizer.warmup {WHOLE} of at least 0, got -5"),
        ("clip", "optimizer.decay_start=5", "optimizer.decay_start must be a number from 0 to 1, got 5"),
        ("clip", "optimizer.decay_end=0.2", "decay_start=0.5 comes after optimizer.decay_end=0.2"),
        ("clip", "optimizer.betas=[2,3]", "optimizer.betas[0] must be a number of at least 0 and below 1, got 2"),
        ("clip", "optimizer.betas=[0.9]", "optimizer.betas must be a list of 2, got [0.9]"),
        ("clip", "optimizer.betas=[nan,0.9]", "optimizer.betas[0] must be a number, got nan"),
        ("clip", "optimizer.eps=-1", "optimizer.eps must be a number of at least 0, got -1"),
        ("clip", "+optimizer.beta=0.9", "optimizer.beta is an option of no optimizer here"),
        ("clip", "trainer.max_epochs=0", f"trainer.max_epochs {WHOLE} of at least 1 or -1 or null, got 0"),
        ("clip", "trainer.gradient_clip_val=nan", "trainer.gradient_clip_val must be a number"),
        ("clip", "trainer.accumulate_grad_batches=-2", f"trainer.accumulate_grad_batches {WHOLE} of at least 1"),
        ("clip", "trainer.limit_train_batches=0", f"trainer.limit_train_batches {WHOLE} of at least 1 or a number"),
        ("clip", "trainer.val_check_interval=0", f"trainer.val_check_interval {WHOLE} of at least 1 or a number"),
        ("clip", "trainer.log_every_n_steps=-1", f"trainer.log_every_n_steps {WHOLE} of at least 0, got -1"),
        ("clip", "trainer.max_time=00:00:00:00", "trainer.max_time must be DD:HH:MM:SS, such as 00:12:00:00"),
        ("clip", "trainer.max_time=soon", "trainer.max_time must be DD:HH:MM:SS, such as 00:12:00:00"),
        ("clip", "callbacks.ema.decay=1.5", "callbacks.ema.decay must be a number of at least 0 and below 1"),
        ("clip", "callbacks.ema.decay=nan", "callbacks.ema.decay must be a number, got nan"),
        ("clip", "callbacks.checkpoint.every=-1", f"callbacks.checkpoint.every {WHOLE} of at least 1, got -1"),
        ("clip", "datamodule.num_workers=-1", f"datamodule.num_workers {WHOLE} from 0 to 1024 or auto, got -1"),
        ("clip", "datamodule.val_items=0", f"datamodule.val_items {WHOLE} of at least 1 or null, got 0"),
        ("clip", "data.image_size=0", f"data.image_size {WHOLE} from 1 to 8192, got 0"),
        ("clip", "data.image_size=100000", f"data.image_size {WHOLE} from 1 to 8192, got 100000"),
        ("clip", "data.seed=99999999999999999999", "of 64 bits, got 99999999999999999999"),
        ("clip", "model.net.text_heads=0", f"model.net.text_heads {WHOLE} of at least 1"),
        ("clip", "model.net.text_heads=3", "3 heads do not divide text_width"),
        ("prior", "model.text_dropout=2", "model.text_dropout must be a number from 0 to 1, got 2"),
        ("prior", "model.candidates=0", f"model.candidates {WHOLE} from 1 to 1000, got 0"),
        ("prior", "model.guidance=nan", "model.guidance must be a number, got nan"),
        ("prior", "model.net.heads=3", "3 heads do not divide width 16"),
        ("prior", "model.net.width=15", "2 heads do not divide width 15"),
        ("prior", "model.net.dropout=2", "model.net.dropout must be a number of at least 0 and below 1, got 2"),
        ("prior", "model.net.width=0", f"model.net.width {WHOLE} from 1 to 1048576, got 0"),
        ("prior", "sampler.steps=5000", "5000 sampling steps, but the noise schedule has only 1000 levels"),
        ("prior", "model.net.depth=1000000000", f"model.net.depth {WHOLE} from 1 to 1000"),
        ("prior", "model.net.width=1000000", "GiB of memory: make it smaller"),
        ("prior", "datamodule.cache_items=-1", f"datamodule.cache_items {WHOLE} of at least 0, got -1"),
        ("ar_prior", "datamodule.kept_variance=2", "datamodule.kept_variance must be a number above 0 and at most 1"),
        ("ar_prior", "datamodule.dims=0", f"datamodule.dims {WHOLE} of at least 1 or null, got 0"),
        ("ar_prior", "datamodule.buckets=1", f"datamodule.buckets {WHOLE} from 2 to 1048576, got 1"),
        ("ar_prior", "model.dot_quantile=1.5", "model.dot_quantile must be a number from 0 to 1, got 1.5"),
        ("ar_prior", "model.top_p=0", "model.top_p must be a number above 0 and at most 1 or null, got 0"),
        ("ar_prior", "model.top_k=2000", "top_k is 1 to 1024, the codes there are, not 2000"),
        ("ar_prior", "model.net.heads=3", "3 heads do not divide width 16"),
        ("ar_prior", "model.net.waves=2000", "2000 waves are more than the 1024 buckets"),
        ("decoder", "callbacks.grid.count=0", f"callbacks.grid.count {WHOLE} of at least 1, got 0"),
        ("decoder", "callbacks.generation.items=-5", f"callbacks.generation.items {WHOLE} of at least 1, got -5"),
        ("decoder", "callbacks.generation.inception=/nowhere", "must be a file that exists or null, got '/nowhere'"),
        ("decoder", "model.thresholding=foo", "model.thresholding must be one of none, static, dynamic, got 'foo'"),
        ("decoder", "model.denoiser.prediction=foo", "unknown prediction 'foo'"),
        ("dvae", "model.temperature.end=0", "model.temperature.end must be above 0"),
        ("dvae", "model.temperature.start=-1", "model.temperature.start must be a number of at least 0, got -1"),
        ("vqgan", "model.net.vocab_size=1", f"model.net.vocab_size {WHOLE} from 2 to 1048576, got 1"),
        ("vqgan", "model.disc_start=-1", f"model.disc_start {WHOLE} of at least 0, got -1"),
        ("vqgan", "model.discriminator.layers=9", "pictures of 16 px are too small for model.discriminator"),
        ("vqgan", "model.perceptual.weights=/nowhere.pth", "must be a file that exists or null"),
        ("gan", "model.beta1=2", "model.beta1 must be a number of at least 0 and below 1, got 2"),
        ("vae", "model.net.latent_dim=0", f"model.net.latent_dim {WHOLE} from 1 to 1048576, got 0"),
        ("vae", "model.kl_weight=nan", "model.kl_weight must be a number, got nan"),
        ("dalle", "model.top_k=0", f"model.top_k {WHOLE} of at least 1 or null, got 0"),
        ("dalle", "model.top_k=500000", "the codes there are, not 500000"),
        ("dalle", "model.top_p=0", "model.top_p must be a number above 0 and at most 1 or null, got 0"),
        ("dalle", "datamodule.bpe_dropout=2", "datamodule.bpe_dropout must be a number from 0 to 1, got 2"),
    ],
    ids=lambda value: value if "=" in value or value.startswith("~") else "",
)  # fmt: skip
def test_settings_that_cannot_be(model, setting, line):
    with pytest.raises(Exception) as raised:  # noqa: PT011
        check_config(configure(model, Path("logs"), setting))
    said = entry.said(raised.value)
    assert line in said
    assert entry.BUG not in said


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("callbacks=null", "callbacks=null: choose one of default, none"),
        ("logger=null", "logger=null: choose one of csv, tensorboard, wandb"),
        ("paths=null", "paths=null: choose one of default"),
        ("tokenizer=", "tokenizer=: choose one of bpe, clip"),
        (
            "optimizer=[adamw,sgd]",
            "optimizer is one of adam, adamw, adamw_8bit, muon, sgd, not several at once",
        ),
        ("model.net={}", "model.net={} leaves model.net as it is"),
    ],
)
def test_words_that_do_not_do_what_they_say(command, no_training, tmp_path, word, line):
    assert line in command("train.py", *overrides("clip", Path("logs")), word).error
    assert files_below(tmp_path) == {}


def test_an_unknown_debug_shows_no_traceback(command, no_training):
    assert "there is no debug=foo; there are" in command("train.py", "model=clip", "debug=foo").error


def test_no_logger_is_a_choice():
    config = configure("clip", Path("logs"), "logger=[]")
    assert "logger" not in config
    with pytest.raises(UserError, match="logger is needed"):  # training puts an empty one there
        check_config(config)


def test_a_name_may_be_a_number():
    assert entry.quoted("name=20240101") == "name='20240101'"
    assert entry.quoted("name=1,a2,1e5") == "name='1',a2,'1e5'"
    assert entry.quoted("name=emoji") == "name=emoji"
    assert isinstance(mistake("name='20240101'", "nosuch=1"), Exception)


def test_the_choices_are_those_of_the_configuration():
    choices = entry.groups(ROOT / "conf")
    assert choices["trainer"] == ["auto", "cpu", "ddp", "ddp_cpu", "fsdp", "gpu", "slurm"]
    assert {"unet", "dit"} < set(choices["model/net"])
