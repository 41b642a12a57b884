"""CLIP's stage: its loss against known values and open_clip's, on one rank or two; the temperature."""

import json
import math
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from dalle.metrics.retrieval import Retrieval
from dalle.nets.clip import CLIP
from dalle.optim.factory import OptimizerFactory
from dalle.stages.clip import (
    ClipStage,
    bag_of_words,
    caption_keys,
    classification_loss,
    contrastive_loss,
)
from dalle.training.memory import Saved

IMAGE = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 1]])
TEXT = torch.tensor([[2.0, 0.5, 0], [0, 1, 1], [1, 0.5, 1]])


def loss_of(
    image: torch.Tensor, text: torch.Tensor, scale: float, right: torch.Tensor | None = None
) -> torch.Tensor:
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    right = torch.eye(len(image), dtype=torch.bool) if right is None else right
    return contrastive_loss(image, text, image, text, torch.tensor(scale), right)


def pairs(number: int, captions: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(number, 3, 16, 16, generator=generator) * 2 - 1
    text = torch.randint(1, 30, (captions, 6), generator=generator)
    text[:, -1] = 31
    return [{"image": image[i], "text": text[i % captions], "index": i} for i in range(number)]


def make_net() -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        image_size=16, patch_size=8, vision_width=32, vision_layers=1, text_width=32, text_layers=1,
        context_length=6, vocab_size=32, embed_dim=16, text_heads=None, vision="vit",
    )  # fmt: skip


def trainer(tmp_path: Path, **options) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "default_root_dir": tmp_path,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(**(defaults | quiet | options))


def sgd(lr: float) -> OptimizerFactory:
    return OptimizerFactory(torch.optim.SGD, lr=lr, weight_decay=0.0, warmup=0, decay="constant")


@pytest.mark.parametrize(("scale", "expected"), [(1 / 0.07, 0.3243309809136014), (1.0, 0.8582987277040255)])
def test_known_values(scale, expected):
    assert loss_of(IMAGE, TEXT, scale).item() == pytest.approx(expected, abs=1e-6)


def test_equal_embeddings_cost_log_n():
    assert loss_of(torch.ones(37, 4), torch.ones(37, 4), 14.0).item() == pytest.approx(math.log(37), abs=1e-5)


@given(seed=st.integers(0, 1000), batch=st.integers(1, 40), scale=st.floats(0.1, 100))
@settings(max_examples=25, deadline=None)
def test_distinct_captions_give_exactly_the_standard_loss(seed, batch, scale):
    torch.manual_seed(seed)
    image, text = F.normalize(torch.randn(batch, 8), dim=1), F.normalize(torch.randn(batch, 8), dim=1)
    logits, labels = scale * image @ text.T, torch.arange(batch)
    other = scale * text @ image.T
    standard = (F.cross_entropy(logits, labels) + F.cross_entropy(other, labels)) / 2
    assert loss_of(image, text, scale).item() == pytest.approx(standard.item(), rel=1e-6, abs=1e-7)


def test_equals_open_clip():
    losses = pytest.importorskip("open_clip.loss")
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(20, 8), dim=1), F.normalize(torch.randn(20, 8), dim=1)
    theirs = losses.ClipLoss()(image, text, torch.tensor(20.0))
    torch.testing.assert_close(loss_of(image, text, 20.0), theirs, rtol=1e-6, atol=1e-6)


def test_equal_captions_share_the_target():
    """Two images of one caption: the best there is, both found evenly, costs log 2 for each of the two."""
    embed = torch.eye(3)[[0, 0, 1, 2]]
    right = torch.eye(4, dtype=torch.bool)
    assert loss_of(embed, embed, 100.0).item() == pytest.approx(math.log(2) / 2, abs=1e-5)
    right[:2, :2] = True
    best = loss_of(embed, embed, 100.0, right)
    assert best.item() == pytest.approx(math.log(2) / 2, abs=1e-5)
    apart = torch.tensor([[1.0, 0.9, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert loss_of(apart, embed, 100.0, right) > best


def test_the_stage_sees_equal_captions():
    batch = torch.utils.data.default_collate(pairs(8, captions=4))
    net = make_net()
    image, text, scale = net(batch["image"], batch["text"])
    same = torch.arange(8)[:, None] % 4 == torch.arange(8) % 4
    for share, right in ((True, same), (False, torch.eye(8, dtype=torch.bool))):
        out = ClipStage(net, share_equal_captions=share).step(batch)
        contrastive = contrastive_loss(image, text, image, text, scale, right)
        torch.testing.assert_close(out["contrastive"], contrastive)
    assert out["scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_classification_is_cross_entropy_with_inverse_document_frequencies():
    text = torch.tensor(
        [[1, 3, 2, 5, 0], [1, 3, 4, 4, 5], [1, 2, 5, 0, 0], [1, 4, 5, 0, 0]]
    )  # 5 ends, 0 pads
    words = bag_of_words(text, vocab_size=6)
    assert words.nonzero()[:, 1].tolist() == [1, 2, 3, 5, 1, 3, 4, 5, 1, 2, 5, 1, 4, 5]
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    found = classification_loss(logits, words, words.double().mean(0).float())
    # 1 and 5 are in all captions; 2, 3 and 4 in two of four each, so they count alike
    named = [[2, 3], [3, 4], [2], [4]]
    expected = [-logits[i].log_softmax(0)[ids].mean() for i, ids in enumerate(named)]
    torch.testing.assert_close(found, torch.stack(expected).mean())
    rare = torch.tensor([1.0, 1.0, 0.25, 0.5, 0.5, 1.0])  # -ln: ln 4 and ln 2, so two to one
    logp = logits[0].log_softmax(0)
    torch.testing.assert_close(classification_loss(logits[:1], words[:1], rare), -(2 * logp[2] + logp[3]) / 3)
    same = torch.ones(2, 6, dtype=torch.bool)
    assert classification_loss(logits[:2], same, same.float().mean(0)).item() == 0


def test_without_classification_the_loss_is_the_papers():
    batch = torch.utils.data.default_collate(pairs(8, captions=8))
    out = ClipStage(make_net(), classification_weight=0.0).step(batch)
    assert "classification" not in out
    assert out["loss"] is out["contrastive"]
    torch.manual_seed(0)
    both = ClipStage(make_net(), classification_weight=2.0).step(batch)
    torch.testing.assert_close(both["loss"], both["contrastive"] + 2 * both["classification"])


@given(st.lists(st.lists(st.integers(0, 49407), min_size=5, max_size=5), min_size=2, max_size=20))
@settings(max_examples=50, deadline=None)
def test_keys_are_equal_where_captions_are(rows):
    keys = caption_keys(torch.tensor(rows))
    assert [[a == b for b in rows] for a in rows] == (keys[:, None] == keys).tolist()


def test_autocast_does_not_round_the_logits():
    torch.manual_seed(0)
    embed = F.normalize(torch.randn(64, 32), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(embed, embed.flip(0), 100.0)
    assert torch.equal(rounded, loss_of(embed, embed.flip(0), 100.0))


class PushUp(nn.Module):
    """All it learns is the temperature, in either direction."""

    image_size = embed_dim = text_width = context_length = vocab_size = 4
    encode_image = encode_text = lambda self, _: None

    def __init__(self, direction: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.6))
        self.direction = direction

    def forward(self, image, text):
        embed = F.normalize(image.flatten(1)[:, :4], dim=1)
        return embed, self.direction * embed, self.logit_scale.exp()


class Watch(lightning.Callback):
    """What a moving average would see: callbacks run before the stage's own hook."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(pl_module.net.logit_scale.item())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("direction", "bound"), [(1.0, math.log(100)), (-1.0, 0.0)])
def test_logit_scale_stays_in_bounds(tmp_path, direction, bound, accumulate):
    stage = ClipStage(PushUp(direction), sgd(lr=1e4), classification_weight=0.0)
    watch = Watch()
    loader = DataLoader(pairs(16, captions=16), batch_size=4)
    trainer(tmp_path, callbacks=[watch], accumulate_grad_batches=accumulate).fit(stage, loader)
    steps = [torch.tensor(2.6).item()] * (accumulate - 1) + [pytest.approx(bound, abs=0.01)] * (
        5 - accumulate
    )
    assert watch.seen == steps
    assert 0 <= min(watch.seen) <= max(watch.seen) <= 4.605171


def test_validation_measures_retrieval_and_training_learns(tmp_path):
    stage = ClipStage(
        make_net(),
        OptimizerFactory(torch.optim.AdamW, lr=3e-3, weight_decay=0.0, warmup=0),
        Retrieval(ks=(1,)),
    )
    data = pairs(12, captions=6)
    fit = trainer(tmp_path, max_epochs=40, check_val_every_n_epoch=40)
    before = fit.validate(stage, DataLoader(data, batch_size=5), verbose=False)[0]
    fit.fit(stage, DataLoader(data, batch_size=12), DataLoader(data, batch_size=5))
    after = fit.test(stage, DataLoader(data, batch_size=5), verbose=False)[0]
    recalls = {"val/image_to_text_r1", "val/text_to_image_r1"}
    assert set(before) == {"val/loss", "val/scale", "val/classification"} | recalls
    assert before["val/image_to_text_r1"] < 0.7
    assert after["test/image_to_text_r1"] == after["test/text_to_image_r1"] == 1
    assert fit.callback_metrics["test/image_to_text_r1"] == 1
    assert not any(name.startswith("retrieval") for name in stage.state_dict())


def measured(tmp_path: Path, data: list, batch_size: int, share: bool) -> float:
    stage = ClipStage(make_net(), share_equal_captions=share)
    loader = DataLoader(data, batch_size=batch_size)
    return trainer(tmp_path).test(stage, loader, verbose=False)[0]["test/loss"]


@pytest.mark.parametrize("share", [True, False])
def test_the_loss_of_a_test_is_the_same_in_any_batches(tmp_path, share):
    data = pairs(16, captions=11)
    whole = measured(tmp_path, data, 16, share)
    with torch.no_grad():
        batch = {k: torch.stack([torch.as_tensor(item[k]) for item in data]) for k in data[0]}
        assert whole == pytest.approx(
            ClipStage(make_net(), share_equal_captions=share).step(batch)["contrastive"].item()
        )
    for found in (measured(tmp_path, data, size, share) for size in (1, 4, 8)):
        assert found == pytest.approx(whole, abs=1e-5)
    assert measured(tmp_path, data[::-1], 8, share) == pytest.approx(whole, abs=1e-5)
    assert measured(tmp_path, data + data[:3], 8, share) == pytest.approx(
        whole, abs=1e-5
    )  # as ranks are filled up


def test_one_more_item_hardly_changes_the_loss_of_a_test(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.stages.clip.CANDIDATES", 8)
    data = pairs(17, captions=17)
    fewer, more = (measured(tmp_path, data[:n], 8, share=False) for n in (16, 17))
    assert more == pytest.approx(fewer, abs=0.06)  # a batch of one costs nothing: .15 less


class BothLosses(ClipStage):
    """One start of two processes is dear: tests both ways to treat equal captions at once."""

    def step(self, batch):
        self.share_equal_captions = False
        apart = super().step(batch)["loss"]
        self.share_equal_captions = True
        out = super().step(batch)
        return out | {"loss": out["loss"] + apart}


def gradients(micro_batch: int | None, batch: dict[str, torch.Tensor]) -> tuple[dict, int]:
    """Of all weights, and the most bytes that were kept for the backward pass."""
    torch.manual_seed(0)
    stage = ClipStage(make_net(), micro_batch=micro_batch)
    saved = Saved({p.untyped_storage().data_ptr() for p in stage.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        stage.step(batch)["loss"].backward()
    return {name: p.grad for name, p in stage.named_parameters()}, saved.peak


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 40])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch):
    """24 pairs: parts that divide the batch, that do not, and one that is larger."""
    batch = next(iter(DataLoader(pairs(24, captions=17), batch_size=24)))
    whole, most = gradients(None, batch)
    parts, peak = gradients(micro_batch, batch)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6 * largest, msg=name)
    assert micro_batch > 3 or peak < most / 3


def test_micro_batches_draw_the_same_dropout_twice():
    """Or the gradient would be of another network than the embeddings."""
    batch = next(iter(DataLoader(pairs(6, captions=6), batch_size=6)))
    drawn = []
    stage = ClipStage(make_net(), micro_batch=2, classification_weight=0.0)
    stage.net.visual.register_forward_hook(lambda *_: drawn.append(torch.rand(1).item()))
    stage.step(batch)["loss"].backward()
    assert len(drawn) == 6
    assert sorted(drawn[:3]) == sorted(drawn[3:])


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_two_ranks_take_the_step_of_one(tmp_path, micro_batch):
    """Each rank has the rows of its own pairs only, of all columns; with gradient caching on top, too."""
    data, states = pairs(8, captions=5), []
    for devices, strategy in ((1, "auto"), (2, "ddp_spawn")):
        parts = micro_batch if devices > 1 else None
        stage = BothLosses(make_net(), sgd(lr=0.5), Retrieval(), micro_batch=parts)
        loader = DataLoader(data, batch_size=8 // devices)
        fit = trainer(tmp_path, devices=devices, strategy=strategy, num_sanity_val_steps=0)
        fit.fit(stage, loader, DataLoader(data, batch_size=4))
        states.append((stage.net.state_dict(), {k: float(v) for k, v in fit.callback_metrics.items()}))
    (one, metrics), (two, other) = states
    assert not torch.equal(one["visual.proj"], make_net().visual.proj)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    for name in ("val/loss", "val/image_to_text_r1", "val/text_to_image_r5"):
        assert other[name] == pytest.approx(metrics[name])


def test_constants_are_those_of_the_reference():
    path = Path(__file__).parents[3] / "shared/reference/known_values.json"
    if not path.exists():
        pytest.skip("no reference values beside this checkout")
    known = json.loads(path.read_text())["clip"]
    assert make_net().logit_scale.item() == pytest.approx(known["logit_scale_init"], abs=1e-6)
    assert math.log(100) == known["logit_scale_max"]
