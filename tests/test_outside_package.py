"""Somebody's own package, outside of ours: a network, stage, metric, source, sampler, callback, logger and
tokenizer train, sample and evaluate with ``trust=[mylab]``, and nothing of it is imported without.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import untrained
from tiny import COMMON

from dalle.cli.train import upstream
from dalle.data.tokenizers import load_tokenizer, save_tokenizer
from dalle.diffusion.samplers import METHODS
from dalle.errors import UserError
from dalle.run_dir import Run, load_stage
from dalle.trust import listed, set_trusted

CODE = '''
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import Logger
from torch import nn
from torchmetrics import MeanMetric

from dalle.diffusion.samplers import register
from dalle.stages.decoder import DecoderStage


class Net(nn.Module):
    """Fits `dalle.nets.interfaces.DecoderNet`."""

    channels = 3

    def __init__(self, image_size: int, embed_dim: int, width: int = 4):
        super().__init__()
        self.image_size, self.embed_dim = image_size, embed_dim
        self.conv_in, self.conv_out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.condition = nn.Linear(embed_dim, width)

    def forward(self, x, t, *, image_embed, text_embed, **cond):
        shift = self.condition(image_embed + text_embed) * t[:, None]
        return self.conv_out(torch.relu(self.conv_in(x) + shift[:, :, None, None]))


class Stage(DecoderStage):
    def __init__(self, net, denoiser, sampler, metric: nn.Module, optimizer=None, **options):
        super().__init__(net, denoiser, sampler, optimizer, **options)
        self.metric = metric

    def test_step(self, batch, batch_idx):
        self.metric.update(batch["image"])
        self.log("test/brightness", self.metric)
        return super().test_step(batch, batch_idx)


class Brightness(MeanMetric):
    """A metric."""


class Bands:
    """A source: a dark and a bright half."""

    fixed = True

    def __init__(self, split: str, image_size: int, size: int):
        self.image_size, self.size = image_size, size

    def __len__(self):
        return self.size

    def captions(self, item):
        return [f"a band at {item}"]

    def images(self, items, epoch=0):
        at = torch.arange(self.image_size)
        rows = [torch.where(at < i % self.image_size, -1.0, 1.0) for i in items]
        return torch.stack(rows)[:, None, :, None].expand(-1, 3, -1, self.image_size).contiguous()

    def fingerprint(self):
        return f"bands-{self.image_size}-{self.size}"


@register
def jump(denoise, x, levels, blend: float = 1.0, randn=torch.randn_like, on_step=None):
    """A sampler of one step."""
    _, first, _ = next(iter(levels.steps()))
    return blend * denoise(x, torch.full((len(x),), first.t))


class Watch(lightning.Callback):
    def __init__(self, path: str):
        self.path = Path(path)

    def on_train_end(self, trainer, stage):
        self.path.write_text(type(stage).__name__)


class Lines(Logger):
    name, version = "lines", ""

    def __init__(self, path: str):
        super().__init__()
        self.path = Path(path)

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        with self.path.open("a") as file:
            file.write(f"{sorted(metrics)}\\n")


class Words:
    """A tokenizer: a letter is an id."""

    vocab_size, context_length, pad_id, start_id, end_id = 258, 16, 0, 1, 257

    def __call__(self, captions):
        ids = [[1, *(letter + 2 for letter in text.encode()[:14])] for text in captions]
        return torch.tensor([[*some, 257, *[0] * (15 - len(some))] for some in ids])

    def too_long(self, caption):
        return len(caption.encode()) > 14

    def to_dict(self):
        return {"kind": "mylab.Words", "context_length": 16}

    @classmethod
    def from_dict(cls, state):
        return cls()


def hook(path: str = ""):
    """A function that no file may call."""
    Path(path).touch()
'''
CONF = {
    "data/bands.yaml": {"_target_": "mylab.Bands", "_partial_": True, "image_size": 16, "size": 32},
    "model/net/own.yaml": {"_target_": "mylab.Net", "image_size": "auto", "embed_dim": "auto"},
    "sampler/jump.yaml": {
        "_target_": "dalle.diffusion.samplers.Sampler", "method": "jump", "steps": 2, "blend": 0.5,
    },
}  # fmt: skip


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    """Puts the package on the path, and a user's own configuration beside it."""
    (tmp_path / "lab" / "mylab").mkdir(parents=True)
    (tmp_path / "lab" / "mylab" / "__init__.py").write_text(CODE)
    for name, node in CONF.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(node))
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    monkeypatch.setattr("dalle.trust._trusted", ())
    monkeypatch.setattr("dalle.diffusion.samplers.METHODS", {**METHODS})
    yield tmp_path
    sys.modules.pop("mylab", None)


def test_everything_from_outside_trains_samples_and_evaluates(mylab, command):
    logs = mylab / "logs"
    untrained("clip", logs)
    trust, own = "trust=[mylab]", f"--config-dir={mylab / 'conf'}"
    settings = (
        "model=decoder", *COMMON, f"paths.logs='{logs}'", "data=bands", "model/net=own", "sampler=jump",
        "optimizer=adamw", "model._target_=mylab.Stage",
        "+model.metric._target_=mylab.Brightness", "trainer.max_steps=2",
        "callbacks.generation.items=4", "+callbacks.watch._target_=mylab.Watch",
        f"+callbacks.watch.path='{mylab / 'watched'}'", "+logger.lines._target_=mylab.Lines",
        f"+logger.lines.path='{mylab / 'lines'}'",
    )  # fmt: skip
    assert re.search(
        r"mylab.*refusing to import it; trust=\[mylab\]", command("train.py", own, *settings).error
    )
    assert "mylab" not in sys.modules
    trained = command("train.py", own, trust, *settings)
    assert trained.code == 0, trained
    assert (mylab / "watched").read_text() == "Stage"
    assert "test/brightness" in (mylab / "lines").read_text()

    where = (f"paths.logs='{logs}'", "pipeline.prior=null", "sampler=jump", "precision=fp32")
    out = mylab / "pictures"
    sample = (own, *where, 'prompt="a band at 3"', "device=cpu", f"out='{out}'")
    assert (
        "trust=[mylab]" in command("sample.py", *sample[:2], *sample[2:]).error
    )  # whatever the run's own says
    assert command("sample.py", trust, *sample).code == 0
    assert (out / "000-00.png").exists()
    recipe = (
        "sample.py",
        f"recipe='{out / 'recipe.yaml'}'",
        f"out='{mylab / 'again'}'",
        f"paths.logs='{logs}'",
    )
    assert "trust=[mylab]" in command(*recipe).error
    assert command(*recipe, trust).code == 0
    assert (mylab / "again" / "000-00.png").read_bytes() == (out / "000-00.png").read_bytes()

    evaluate = (
        own,
        *where,
        "trainer=cpu",
        "n=8",
        "metrics=[fid]",
        "features=random",
        f"paths.cache='{mylab}/c'",
    )
    assert "trust=[mylab]" in command("evaluate.py", *evaluate).error
    evaluated = command("evaluate.py", trust, *evaluate)
    assert evaluated.code == 0, evaluated
    assert "fid" in evaluated.out


def test_a_run_does_not_extend_trust_and_calls_no_function(mylab):
    run = untrained("clip", mylab / "logs")
    path = run.path / "config.yaml"
    config = yaml.safe_load(path.read_text())
    ran = mylab / "RAN"
    for target in ("mylab.hook", "mylab.Words.from_dict", "mylab.Path", "mylab.nn.Linear", "mylab.Watch"):
        node = {"_target_": target, "path": str(ran)}
        path.write_text(
            yaml.safe_dump({**config, "trust": ["mylab"], "model": {**config["model"], "net": node}})
        )
        for trusted in ([], ["mylab"]):
            set_trusted(trusted)
            with pytest.raises(UserError, match="refusing to use it") as error:
                load_stage(run.path)
            assert "\n" not in str(error.value)
    assert not ran.exists()


def test_a_tokenizer_comes_back_where_it_is_trusted(mylab):
    set_trusted(["mylab"])
    words = listed("mylab.Words")()
    save_tokenizer(words, path := mylab / "tokenizer.json")
    assert load_tokenizer(path)(["ab"]).tolist() == words(["ab"]).tolist()
    set_trusted([])
    with pytest.raises(UserError, match=r"trust=\[mylab\]"):
        load_tokenizer(path)
    path.write_text(json.dumps({"kind": "os.system", "context_length": 16}))
    with pytest.raises(UserError, match="refusing"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "package",
    ["os", "builtins", "subprocess", "torch", "torch.utils", "dalle", "mylab..x", "..", "/tmp", "", 5],
)  # fmt: skip
def test_what_cannot_be_trusted(mylab, package):
    with pytest.raises(UserError, match=r"trust=.*give .*package") as error:
        set_trusted([package])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="refusing"):
        listed("os.system")


def test_trust_that_is_not_there_or_no_list(mylab):
    with pytest.raises(UserError, match="there is no package nowhere_lab"):
        set_trusted(["nowhere_lab"])
    with pytest.raises(UserError, match=r"as trust=\[mylab\]"):
        set_trusted("mylab")


def test_what_a_command_starts_is_given_its_trust():
    words = upstream(["trust=[mylab]", "model=decoder", "model.net.width=8"], "clip", Run(Path("logs/clip")))
    assert words[0] == "trust=[mylab]"
