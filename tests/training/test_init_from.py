"""A decoder that learns to inpaint: begins as the decoder it is made of, trains, is stopped and resumed."""

from pathlib import Path

import pytest
import torch
from conftest import untrained
from tiny import train, weights

from dalle.errors import UserError
from dalle.run_dir import Run, load_stage


@pytest.fixture
def logs(tmp_path) -> Path:
    untrained("clip", tmp_path)
    return tmp_path


def learn(logs: Path, where: str, *words: str, net: str = "decoder", steps: int = 2) -> Run:
    return train(net, logs, "inpaint=true", f"paths.run='{logs / where}'", *words, steps=steps)


@pytest.mark.parametrize("net", ["decoder", "dit"])
def test_it_begins_as_the_decoder_and_learns_to_look_at_what_is_known(logs, net):
    plain = untrained(net, logs)
    slow = ("optimizer=adamw", "optimizer.lr=1e-9")
    before = weights(plain)
    after = weights(learn(logs, "slow", f"init_from='{plain.path}'", *slow, net=net))
    assert after.keys() - before.keys() == {"conv_known.weight"}
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before)
    assert after["conv_known.weight"].abs().max() < 1e-6

    run = learn(logs, "run", f"init_from='{plain.path}'", net=net, steps=3)
    stage = load_stage(run.path)[0]
    known, nothing = torch.ones(2, 4, 16, 16), torch.zeros(2, 4, 16, 16)
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(2, stage.net.embed_dim, generator=generator)
    text = {"text_embed": embed, "text_hidden": torch.randn(2, 3, stage.net.text_width, generator=generator)}
    x = torch.randn(2, 3, 16, 16, generator=generator)
    ones = {"text_mask": torch.ones(2, 3, dtype=torch.bool), "image_embed": embed}

    def drawn(known: torch.Tensor | None) -> torch.Tensor:
        return stage.net(x, torch.full((2,), 0.5), **text, **ones, known=known)

    assert stage.inpaint
    assert not torch.equal(drawn(known), drawn(None))
    assert torch.equal(drawn(nothing), drawn(None))


def test_a_run_that_is_resumed_has_what_one_has_that_was_not_stopped(logs):
    plain = untrained("decoder", logs)
    words = (f"init_from='{plain.path}'", "callbacks.checkpoint.every=2", "optimizer.decay=constant")
    whole = learn(logs, "whole", *words, steps=4)
    parts = learn(logs, "parts", *words)
    for name in ("manifest.json", "model.safetensors"):
        (parts.path / name).unlink()
    parts = learn(logs, "parts", *words, "resume=true", steps=4)
    found = weights(parts)
    assert all(torch.equal(value, found[key]) for key, value in weights(whole).items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("init_from={logs}/none", r"none holds no finished run"),
        ("init_from={logs}/default/clip", r"clip is a clip, not a decoder; give one"),
        ("init_from={plain} model.net.blocks=[2,1]", r"of another network \(.* is None there, \(.*\) here\)"),
        ("init_from={plain} model.net.width=32", r"of another network \(.* is \(.*\) there, .* here\)"),
    ],
)
def test_mistakes_are_one_line(logs, words, message):
    plain = untrained("decoder", logs)
    with pytest.raises(UserError, match=message):
        learn(logs, "other", *words.format(logs=logs, plain=plain.path).split())
