"""DALL-E's stage: the paper's weighing of the two losses, what counts in them, and how codes are drawn."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.autoregressive.sampling import generate
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.nets.dalle import DALLE
from dalle.stages.dalle import DalleStage

B, T, V, GRID, K = 4, 6, 10, 3, 7
N = GRID**2


def tiny(**options) -> DalleStage:
    torch.manual_seed(0)
    net = DALLE(
        text_vocab=V, text_length=T, image_vocab=K, image_levels=None, grid=GRID, width=16, depth=2, heads=2
    )
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return DalleStage(net, **({"temperature": 1.0, "guidance": 1.0} | options)).eval()


def batch() -> dict:
    text = torch.tensor([[1, 4, 5, 9, 0, 0], [1, 9, 0, 0, 0, 0], [1, 2, 3, 4, 5, 9], [1, 7, 7, 9, 0, 0]])
    generator = torch.Generator().manual_seed(1)
    return {"text": text, "codes": torch.randint(K, (B, N), generator=generator), "caption": list("abcd")}


class Uniform(nn.Module):
    """Knows nothing: each cross entropy is the logarithm of its number of choices, scaled as asked."""

    text_vocab, image_vocab, codes = V, K, 0
    prefill = step = lambda self, *_: None

    def __init__(self, text_ce: float, image_ce: float):
        super().__init__()
        self.ce, self.kept = (text_ce, image_ce), None

    def padded(self, text, keep_text=None):
        position = torch.arange(T)
        real = position <= text.argmax(dim=1, keepdim=True)
        return torch.where(real & keep_text[:, None], text, V + position)

    def forward(self, text, codes, keep_text):
        self.kept = keep_text
        targets = (self.padded(text, keep_text)[:, 1:], codes)
        return tuple(self.logits(t, n, ce) for t, n, ce in zip(targets, (V + T, K), self.ce, strict=True))

    def logits(self, target, choices, ce):
        """With the right one ahead so that its cross entropy is `ce`."""
        ahead = math.log((choices - 1) / (math.exp(ce) - 1))
        return F.one_hot(target, choices) * ahead


def test_the_loss_is_an_eighth_text_and_seven_eighths_picture():
    """The facts sheet's example: 3.2 and 5.7 nats make 5.3875."""
    out = DalleStage(Uniform(3.2, 5.7)).step(batch())
    assert out["text_loss"].item() == pytest.approx(3.2, abs=1e-5)
    assert out["image_loss"].item() == pytest.approx(5.7, abs=1e-5)
    assert out["loss"].item() == pytest.approx(5.3875, abs=1e-5)
    assert out["bits_per_code"].item() == pytest.approx(5.7 / math.log(2), abs=1e-5)
    other = DalleStage(Uniform(3.2, 5.7), text_weight=1, image_weight=2).step(batch())
    assert other["loss"].item() == pytest.approx(14.6, abs=1e-4)


def test_accuracy_counts_codes():
    assert DalleStage(Uniform(0.1, 0.1)).step(batch())["accuracy"] == 1
    assert DalleStage(Uniform(0.1, 6.0)).step(batch())["accuracy"] == 0


@pytest.mark.parametrize("pad_loss", [True, False])
def test_paddings_count_where_asked(pad_loss):
    stage = tiny(pad_loss=pad_loss, text_dropout=0.0)
    data = batch()
    logits, _ = stage.net(data["text"], data["codes"], None)
    target = stage.net.padded(data["text"])[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    counts = torch.ones(B * (T - 1), dtype=torch.bool) if pad_loss else (data["text"][:, 1:] > 0).flatten()
    torch.testing.assert_close(stage.step(data)["text_loss"], losses[counts].mean())
    assert 0 < (data["text"][:, 1:] > 0).sum() < B * (T - 1)


def test_a_batch_without_any_caption_has_no_text_loss():
    out = tiny(pad_loss=False, text_dropout=1.0).step(batch())
    assert out["text_loss"] == 0
    assert out["loss"].isfinite()


def test_captions_are_dropped_as_often_as_asked():
    kept = []
    for _ in range(400):
        stage = DalleStage(Uniform(1.0, 1.0), text_dropout=0.3)
        stage.step(batch())
        kept.append(stage.net.kept)
    assert 1 - torch.cat(kept).float().mean().item() == pytest.approx(0.3, abs=0.05)
    stage = tiny(text_dropout=1.0)
    data = batch()
    other = {**data, "text": data["text"].roll(1, 0)}
    assert torch.equal(stage.step(data)["image_loss"], stage.step(other)["image_loss"])


def test_all_parameters_learn():
    """DDP waits for the gradient of each."""
    stage = tiny()
    stage.step(batch())["loss"].backward()
    assert not [name for name, p in stage.named_parameters() if p.grad is None]


def test_learns_codes_that_follow_from_the_caption():
    stage = tiny(text_dropout=0.0)
    data = batch()
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-2)
    for _ in range(150):
        loss = stage.step(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(stage.sample(data, temperature=0), data["codes"])


def test_equal_noise_gives_equal_codes_in_any_company():
    stage, data = tiny(), batch()
    codes = stage.sample(data, randn=per_sample([0, 1, 2, 3]))
    assert codes.shape == (B, N)
    assert torch.equal(codes, stage.sample(data, randn=per_sample([0, 1, 2, 3])))
    assert not torch.equal(codes, stage.sample(data, randn=per_sample([4, 5, 6, 7])))
    alone = {key: value[2:3] for key, value in data.items()}
    assert torch.equal(stage.sample(alone, randn=per_sample([2])), codes[2:3])


def test_normal_noise_becomes_uniform():
    """What is drawn has the network's own distribution: here that of the first code."""
    stage = tiny()
    data = {key: value[:1] for key, value in batch().items()}
    many = {"text": data["text"].expand(4000, -1)}
    first = stage.sample(many, randn=per_sample(range(4000)))[:, 0]
    with torch.no_grad():
        expected = stage.net.prefill(data["text"])[0].softmax(1)[0]
    torch.testing.assert_close(first.bincount(minlength=K) / 4000, expected, atol=0.03, rtol=0)


def test_extreme_noise_is_never_infinite():
    codes = tiny().sample(batch(), randn=lambda like: torch.full_like(like, 30.0))
    assert torch.equal(codes, tiny().sample(batch(), temperature=0))  # equal noise everywhere: the likeliest


def test_options_are_those_of_the_stage_unless_told():
    data, randn = batch(), lambda: per_sample([0, 1, 2, 3])
    told = tiny().sample(data, temperature=0.5, top_k=3, top_p=0.9, guidance=2.0, randn=randn())
    own = tiny(temperature=0.5, top_k=3, top_p=0.9, guidance=2.0).sample(data, randn=randn())
    assert torch.equal(told, own)
    assert torch.equal(tiny(temperature=0).sample(data), generate(tiny().net, data["text"], temperature=0))
    for option in ({"temperature": 3.0}, {"top_k": 1}, {"top_p": 0.2}, {"guidance": 8.0}):
        assert not torch.equal(
            tiny().sample(data, **option, randn=randn()), tiny().sample(data, randn=randn())
        )


def test_first_codes_are_kept_and_steps_are_shown():
    prefix, seen = torch.full((B, 4), 5), []
    codes = tiny().sample(batch(), prefix=prefix, on_step=lambda done, _: seen.append(done))
    assert torch.equal(codes[:, :4], prefix)
    assert seen == [5, 6, 7, 8, 9]


def test_top_k_above_the_vocabulary_is_the_users_mistake():
    with pytest.raises(UserError, match=r"top_k.*7.*8"):
        tiny().sample(batch(), top_k=8)
