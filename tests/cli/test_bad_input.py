"""A user's mistakes: one line that says what to do, exit code 1, nothing overwritten or half written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Ended, files_below, untrained
from PIL import Image
from tiny import ROOT, overrides

from dalle.cli import entry
from dalle.errors import UserError
from dalle.launch.processes import REASON

SWEEP = ("-m", "hydra=sweep", "model=clip")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model=pirior"], "there is no model=pirior; did you mean model=prior?"),
        (["optimizer=adma"], "did you mean optimizer=adam"),
        (["-m", "model=clip,pirior"], "there is no model=pirior"),
        (["modle=prior"], "there is no setting modle; did you mean model?"),
        (["optimizer.lrr=1"], "there is no setting optimizer.lrr; did you mean optimizer.lr?"),
        (["model.optimizer.lrr=1"], "there is no setting model.optimizer.lrr; did you mean optimizer.lr?"),
        (["datamodule.source.sise=9"], "no setting datamodule.source.sise; did you mean data.size?"),
        (["optimizer.lr"], "'optimizer.lr' cannot be read; write key=value"),
        (["data=folder"], "data.root is needed: give it as data.root=VALUE"),
        (["optimizer.lr=fast"], "optimizer.lr must be a number above 0 and at most 1000, got 'fast'"),
        (["batch_size=ten"], "batch_size must be a whole number of at least 1 or auto, got 'ten'"),
        (
            ["trainer.max_steps=many"],
            "trainer.max_steps must be a whole number of at least 1 or -1, got 'many'",
        ),
        (["model.net.width=wide"], "model.net.width must be a whole number from 1 to 1048576, got 'wide'"),
        (["model=decoder", "model.net.attention=8"], "model.net.attention must be a list, got 8"),
        (
            ["callbacks.ema.decay=slow"],
            "callbacks.ema.decay must be a number of at least 0 and below 1, got 'slow'",
        ),
        (["+model.net.colour=3"], "model.net.colour is not an option of Prior; it takes embed_dim"),
        (["optimizer=[adam]"], "optimizer is one of adam, "),
        (
            ["data.filters=[1]", "data=folder"],
            "data.filters is a group of settings; give each as data.filters.NAME=",
        ),
        (["data=mixture", "data.weights=5"], "data.weights must be a group of settings or null, got 5"),
        (
            ["data=webdataset", "data.shards=[]"],
            "data.shards must be text that is not empty or Path or a list that ",
        ),
        (["resume=maybe"], "resume must be true or false, got 'maybe'"),
        (["preflight=soon"], "preflight must be true or false, got 'soon'"),
        (["preflight=true"], "holds no finished clip, and preflight trains none: train it first, or see"),
        (["preflight=true", "model=clip", "batch_size=33"], "batch_size=33 is larger than the training set"),
        (
            ["hparams_search=optuna", "search.trials=few"],
            "search.trials must be a whole number of at least 1, got 'few'",
        ),
        (
            ["hparams_search=optuna", "search.direction=up"],
            "search.direction must be one of minimize, maximize",
        ),
        (["hparams_search=optuna", "search.space=3"], "search.space"),
        (
            ["hparams_search=optuna", "++search.space.batch_size={low:3}"],
            "is neither a list nor low and high",
        ),
        (["hparams_search=optuan"], "there is no hparams_search=optuan; did you mean hparams_search=optuna?"),
        (["-m", "model=clip", "seed=0,1", "hydra/launcher=joblib"], "hydra/launcher is for -m hydra=sweep"),
        ([*SWEEP, "seed=0,1", "sweep=null"], "sweep must be a group of settings, got None"),
        ([*SWEEP, "seed=0,1", "sweep.folder=/proc/x"], "/proc/x cannot be written"),
        ([*SWEEP, "optimizer.lr=glob(*)"], "there is nothing to do: glob(...) matches no choice"),
        ([*SWEEP, "optimizer.lr=interval(0,1)"], "interval(...) is for searches; give the values"),
        (["hparams_search=optuna", "search=null"], "search=null: give what is to be searched"),
        (["resume=true", "overwrite=true"], "contradict each other"),
        (["sampler.steps=0"], "sampler.steps must be a whole number from 1 to 100000, got 0"),
        (["+sampler.churn=1"], "sampler ddim has no option 'churn': its options are: eta"),
        (["~optimizer.lr"], "optimizer needs lr"),
        (
            ["upstream.clip=nowhere"],
            "upstream.clip=nowhere holds no finished clip run; train one with model=clip",
        ),
        (["model=clip", "batch_size=0"], "batch_size must be a whole number of at least 1 or auto, got 0"),
        (["model=clip", "batch_size=33"], "batch_size=33 is larger than the training set of 32 items"),
        (
            ["model=clip", "data=folder", "data.root=nowhere"],
            "data.root=nowhere does not exist; give a folder",
        ),
        (["model=clip", "tokenizer.vocab_size=10"], "vocab_size 10 is too small: 259 at least"),
        (
            ["model=clip", "model.net.image_size=24"],
            "model.net.image_size=24 does not fit the data, which has 16",
        ),
        (
            ["model=dalle", "upstream.dvae=nowhere"],
            "upstream.dvae=nowhere holds no finished dvae run; train one with model=dvae",
        ),
        (["model=dalle", "image_tokenizer=dvea"], "there is no image_tokenizer=dvea; did you mean"),
        (
            ["callbacks.checkpoint.directory=/elsewhere"],
            "checkpoints are in the run's own, logs/",
        ),
        (["callbacks.grid.directory=/proc/nowhere"], "/proc/nowhere cannot be written"),
        (
            ["callbacks.checkpoint.best=''"],
            "callbacks.checkpoint.best must be text that is not empty",
        ),
        (["model=clip", "trainer.strategy=fast"], "trainer: You selected an invalid strategy"),
        (["model=clip", "trainer.devices=0"], "trainer.devices must be a whole number from 1 to 1024 or -1"),
        (
            ["model=clip", "trainer=ddp_cpu", "trainer.num_nodes=2"],
            "trainer.num_nodes=2, but nothing has started this command on the other machines",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train(command, no_training, tmp_path, arguments, line):
    model = next(
        (a.removeprefix("model=") for a in arguments if a in ("model=clip", "model=decoder")), "prior"
    )
    data = any("data=" in a for a in arguments)
    usual = [o for o in overrides(model, Path("logs"), net=False) if not (data and o == "data.size=32")]
    given = {a.lstrip("+~").split("=")[0] for a in arguments}
    ended = command("train.py", *(o for o in usual if o.split("=")[0] not in given), *arguments)
    assert line in ended.error
    assert files_below(tmp_path).keys() <= {"logs/.multirun/multirun.yaml"}


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            "model.net.attention=diagonal",
            "attention is one of full, row, column, conv, dalle, not 'diagonal'",
        ),
        ("model.net.image_vocab=512", "model.net.image_vocab=512 does not fit the data, which has 32"),
        ("model.net.text_vocab=512", "model.net.text_vocab=512 does not fit the data, which has 419"),
        ("model.net.grid=8", "model.net.grid=8 does not fit the data, which has 4"),
        (
            "data.image_size=32",
            "pictures of 32 px do not fit the image tokenizer, which was trained at 16 px",
        ),
        (
            "tokenizer=clip datamodule.bpe_dropout=0.1",
            "CLIP's own tokenizer knows no dropout; set datamodule.bpe_dropout=0",
        ),
    ],
)
def test_a_transformer_that_does_not_fit_its_tokenizers(
    command, no_training, untrained_stages, tmp_path, setting, line
):
    shutil.copytree(untrained_stages / "default" / "dvae", tmp_path / "logs" / "default" / "dvae")
    before = files_below(tmp_path)
    usual = [o for o in overrides("dalle", Path("logs")) if o.split("=")[0] != setting.split("=")[0]]
    assert line in command("train.py", *usual, *setting.split()).error
    assert files_below(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(command, no_training, tmp_path):
    assert "PyTorch sees none; use trainer=" in command("train.py", "trainer=gpu").error
    assert files_below(tmp_path) == {}


def captioned(folder: Path, pictures: int, captions: bool = True) -> Path:
    folder.mkdir()
    for k in range(pictures):
        Image.new("RGB", (20, 20), (60 * k, 0, 0)).save(folder / f"{k}.png")
        if captions:
            (folder / f"{k}.txt").write_text("a picture\n")
    return folder


@pytest.mark.parametrize(
    ("pictures", "captions", "line"),
    [
        (0, True, "has no usable picture. Looked for .png, .jpg"),
        (3, False, "3 without a readable caption (0.png, 1.png, 2.png)"),
        (6, True, "batch_size=8 is larger than the training set of 4 items; set a batch size of at most 4"),
    ],
)
@pytest.mark.parametrize("overwrite", ["overwrite=true", "overwrite=false"])
def test_pictures_that_will_not_do(
    command, no_training, untrained_stages, tmp_path, pictures, captions, line, overwrite
):
    root = captioned(tmp_path / "pictures", pictures, captions)
    name = {"overwrite=true": "default", "overwrite=false": "new"}[overwrite]
    shutil.copytree(untrained_stages, tmp_path / "logs")
    before = files_below(tmp_path)
    usual = [o for o in overrides("clip", Path("logs"), net=False) if not o.startswith("data.")]
    settings = ["data=folder", f"data.root='{root}'", "data.image_size=16", f"name={name}", overwrite]
    assert line in command("train.py", *usual, *settings).error
    assert files_below(tmp_path) == before


def test_an_occupied_directory_is_not_overwritten(command, no_training, untrained_stages, tmp_path):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    before = files_below(tmp_path)
    error = command("train.py", *overrides("prior", Path("logs"))).error
    assert "logs/default/prior already holds a run" in error
    assert all(way in error for way in ("resume=true", "name=other", "overwrite=true"))
    assert files_below(tmp_path) == before


def test_a_finished_run_with_resume_ends_well(command, no_training, untrained_stages, tmp_path):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    before = files_below(tmp_path)
    ended = command("train.py", *overrides("prior", Path("logs")), "resume=true")
    assert ended == Ended(
        0, "logs/default/prior is finished; nothing to resume (overwrite=true trains it again)\n", ""
    )
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    "mistake", ["optimizer.lr=fast", "batch_size=64", "upstream.clip=nowhere", "trainer.devices=0"]
)
def test_overwrite_deletes_nothing_when_nothing_can_be_trained(
    command, no_training, untrained_stages, tmp_path, mistake
):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    before = files_below(tmp_path)
    assert command("train.py", *overrides("prior", Path("logs")), "overwrite=true", mistake).error
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a checkpoint"])
def test_a_truncated_checkpoint(command, no_training, untrained_stages, tmp_path, content):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    run = tmp_path / "logs" / "default" / "prior"
    (run / "manifest.json").unlink()
    (run / "last.ckpt").write_bytes(content)
    before = files_below(tmp_path)
    error = command("train.py", *overrides("prior", Path("logs")), "resume=true").error
    assert "last.ckpt cannot be read" in error
    assert "delete it, or start again with overwrite=true" in error
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "line"),
    [("model.safetensors", "cannot be read"), ("tokenizer.json", "cannot be read"), ("config.yaml", "")],
)
def test_a_damaged_clip(command, no_training, untrained_stages, tmp_path, name, line):
    shutil.copytree(untrained_stages / "default" / "clip", tmp_path / "logs" / "default" / "clip")
    path = tmp_path / "logs" / "default" / "clip" / name
    path.write_bytes(path.read_bytes()[:40])
    before = files_below(tmp_path)
    error = command("train.py", *overrides("prior", Path("logs"))).error
    assert line in error
    assert name in error
    assert files_below(tmp_path) == before


def sample(command, *arguments: str) -> Ended:
    return command("sample.py", "steps=2", "pipeline.prior_sampler.steps=2", "precision=fp32", *arguments)


def test_sample_works_as_a_command(command, untrained_stages):
    ended = sample(
        command, f"paths.logs='{untrained_stages}'", "out=out", "prompt=a red circle, or [two] 'rings'"
    )
    assert ended.code == 0
    assert "1 pictures in out" in ended.out
    assert yaml.safe_load(Path("out/recipe.yaml").read_text())["prompts"] == [
        "a red circle, or [two] 'rings'"
    ]


def test_nothing_is_trained_yet(command, tmp_path):
    assert "logs/default/decoder holds no finished run" in sample(command, "prompt=x").error
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give a prompt: prompt="),
        (["prompt=" + "a red circle and " * 60], "is too long: CLIP reads"),
        (["prompt=x", "sampler=dimm"], "there is no sampler=dimm; did you mean sampler=ddim?"),
        (["prompt=x", "sampler.eta=much"], "sampler ddim: eta must be a number from 0 to 1, got 'much'"),
        (
            ["prompt=x", "sampler=dpmpp", "sampler.eta=1"],
            "there is no setting sampler.eta; there are method, spa",
        ),
        (["prompt=x", "steps=0"], "steps must be a whole number from 1 to 100000 or null, got 0"),
        (["prompt=x", "n=ten"], "n must be a whole number from 1 to 1048576, got 'ten'"),
        (["prompt=x", "promt=y"], "there is no setting promt; did you mean prompt"),
        (["prompt=x", "precision=fp8"], "there is no precision=fp8; "),
        (["recipe=broken.yaml"], "broken.yaml"),
        (["recipe=nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["prompt=x", "out=full"], "full is not empty; give another folder with out="),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_sample(command, untrained_stages, tmp_path, arguments, line):
    (tmp_path / "broken.yaml").write_text("prompts: [a\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "grid.png").write_bytes(b"mine")
    before = files_below(tmp_path)
    out = [] if "out=full" in arguments else ["out=new"]
    assert line in sample(command, f"paths.logs='{untrained_stages}'", *out, *arguments).error
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "config.yaml"])
def test_damaged_stages(command, untrained_stages, tmp_path, name):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    path = tmp_path / "logs" / "default" / "decoder" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    error = sample(command, "prompt=x", "out=new").error
    assert "decoder" in error
    assert not (tmp_path / "new").exists()


def test_stages_that_do_not_fit_together(command, untrained_stages, tmp_path):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    shutil.rmtree(tmp_path / "logs" / "default" / "clip")
    untrained("clip", tmp_path / "logs", seed=9)
    assert (
        "clip and decoder do not fit together: the CLIP (hash of its weights)"
        in sample(command, "prompt=x").error
    )


def shell(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    line = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "words",
    [["train.py", "model=pirior"], ["train.py", "-m", "model=clip", "optimizer.lr=fast"], ["sample.py"]],
)
def test_in_a_shell(tmp_path, words):
    """The same from outside: in particular, a job of `-m` that fails says so once."""
    ended = shell(*words, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert not ended.stdout


def test_debug_shows_the_traceback(command, no_training, tmp_path):
    with pytest.raises(UserError, match=r"optimizer.lr must be a number"):  # as Python shows it
        command("train.py", "model=clip", "optimizer.lr=fast", "debug=true")
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_names_that_no_record_could_hold(command, no_training, tmp_path, script):
    """Bytes that are no UTF-8 could be written into config.yaml, but never read again."""
    odd = os.fsdecode(b"data.root=a\xff")
    assert r"data.root=a\udcff: this is no text in UTF-8" in command(script, odd).error
    assert files_below(tmp_path) == {}


def test_why_a_job_failed_is_noted_whatever_bytes_are_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv(REASON, str(tmp_path / "why"))

    def fail(_: list[str]) -> None:
        raise UserError(os.fsdecode(b"a\xff is broken"))

    with pytest.raises(SystemExit):
        entry.run(fail, [])
    assert (tmp_path / "why").read_text() == r"a\udcff is broken"


def test_hydras_own_report_is_never_asked_for(command, no_training, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert "there is no model=pirior" in command("train.py", "model=pirior").error
