"""Adapters: they alone learn, and what they have learned ends in an ordinary run."""

import json
import shutil

import pytest
import torch
from tiny import configure, weights

from dalle.errors import UserError
from dalle.run_dir import Run, load_stage
from dalle.training import fit

pytest.importorskip("peft", reason="adapters need pip install -e '.[lora]'")


@pytest.fixture
def logs(untrained_stages, tmp_path):
    shutil.copytree(untrained_stages, tmp_path / "logs")
    return tmp_path / "logs"


def learn(model: str, logs, *words: str, steps: int = 40, name: str = "more") -> Run:
    begun = logs / "default" / model
    upstream = [f"upstream.{one}='{logs / 'default' / one}'" for one in ("clip", "dvae")]
    settings = (f"init_from='{begun}'", *upstream, f"name={name}", f"trainer.max_steps={steps}", *words)
    fit.train(configure(model, logs, *settings))
    return Run(logs / name / model)


@pytest.mark.parametrize("model", ["prior", "decoder", "dalle"])
def test_adapters_gain_on_a_few_pictures(logs, model, capsys):
    run = learn(model, logs, "lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2", "callbacks.ema.decay=0.5")
    assert "numbers beside" in capsys.readouterr().out
    still = learn(model, logs, "optimizer.lr=1e-30", steps=1, name="still")  # the same noise and times
    assert run.manifest()["metrics"]["test/loss"] < 0.97 * still.manifest()["metrics"]["test/loss"]
    before, after = weights(Run(logs / "default" / model)), weights(run)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    for name in moved:  # products of rank 4 beside linear layers
        change = after[name].double() - before[name].double()
        assert change.ndim == 2
        sizes = torch.linalg.svdvals(change)
        assert len(sizes) <= 4 or sizes[4] < 1e-4 * sizes[0]
    stage, manifest = load_stage(run.path, model)  # an ordinary run
    assert manifest["parameters"] == sum(p.numel() for p in stage.net.parameters())


def test_a_run_with_adapters_is_resumed(logs):
    whole = weights(learn("prior", logs, "lora.rank=2", steps=4))
    shutil.rmtree(logs / "more")
    steps = ("lora.rank=2", "callbacks.checkpoint.every=2", "optimizer.decay=constant")
    run = learn("prior", logs, *steps, steps=2)
    (run.path / "manifest.json").unlink()  # as if it had been stopped there
    learn("prior", logs, *steps, "resume=true", steps=4)
    resumed = weights(run)
    shutil.rmtree(logs / "more")
    straight = weights(learn("prior", logs, *steps, steps=4))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert whole.keys() == resumed.keys()


def test_some_layers(logs):
    run = learn("prior", logs, "lora.rank=2", "lora.layers=[attention]", "optimizer.lr=1e-2", steps=3)
    before, after = weights(Run(logs / "default" / "prior")), weights(run)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        n for n in before if ".attention." in n and n.endswith("weight")
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("lora.rank=2", "init_from=null"), "adapts the weights of a run; give it as init_from=RUN"),
        (("lora.rank=2", "lora.layers=[nothing]"), "those there are called"),
        (("lora.rank=-1",), "lora.rank must be"),
        (("lora.rank=9000000000000000000",), "lora.rank must be a whole number from 0 to 65536"),
        (("+lora.rnk=1",), "there is no setting lora.rnk; did you mean lora.rank"),
    ],
)
def test_what_is_refused(logs, words, line):
    with pytest.raises(UserError, match=line):
        learn("prior", logs, *words, steps=1)
    assert json.loads((logs / "default" / "prior" / "manifest.json").read_text())["stage"] == "prior"
