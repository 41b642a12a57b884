"""The GAN's stage: losses, penalty, two optimizers of their own pace, augmentations, and whole runs."""

import math
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from conftest import untrained
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import column, configure, train, weights
from torch import Tensor
from two_ranks import watch

from dalle.data.batch import text_of
from dalle.diffusion.noise import per_sample
from dalle.errors import UserError
from dalle.nets.gan import Discriminator, Generator
from dalle.optim.factory import OptimizerFactory
from dalle.run_dir import Run, load_stage
from dalle.stages import gan
from dalle.stages.gan import GanStage
from dalle.training import fit

SIZES: dict[str, Any] = {"width": 16, "multipliers": [1, 2], "patch": 2}


def make_stage(**options) -> GanStage:
    torch.manual_seed(0)
    net = Generator(
        image_size=16, latent_dim=7, blocks=1, attention=[4], head_dim=16, condition_width=24,
        embed_dim=6, text_width=5, **SIZES,
    )  # fmt: skip
    return GanStage(net, partial(Discriminator, features=10, **SIZES), **options)


def make_batch(b: int = 3, length: int = 4) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(b, 3, 16, 16, generator=generator) * 2 - 1,
        "text_embed": torch.randn(b, 6, generator=generator),
        "text_hidden": torch.randn(b, length, 5, generator=generator),
        "text_mask": torch.arange(length) < torch.randint(1, length + 1, (b, 1), generator=generator),
    }


def logits(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


class TestLosses:
    def test_known_values(self):
        """softplus(-2) = 0.1269280110429725, softplus(2) = 2.1269280110429727."""
        assert gan.nonsaturating_g(logits(2)).item() == pytest.approx(0.12692801, abs=1e-7)
        assert gan.nonsaturating_g(logits(-2)).item() == pytest.approx(2.12692801, abs=1e-6)
        assert gan.nonsaturating_d(logits(2), logits(2)).item() == pytest.approx(2.25385602, abs=1e-6)
        assert gan.nonsaturating_d(logits(2), logits(-2)).item() == pytest.approx(0.25385602, abs=1e-7)

    def test_hinge(self):
        assert gan.hinge_d(logits(0.5, 2), logits(-0.5, -3)).item() == 0.5
        assert gan.hinge_g(logits(1, 4)).item() == -2.5

    def test_no_loss_is_left_where_the_discriminator_is_sure(self):
        assert gan.nonsaturating_d(logits(200), logits(-200)).item() == 0
        assert gan.hinge_d(logits(1), logits(-1)).item() == 0

    @pytest.mark.parametrize("name", list(gan.LOSSES))
    def test_wrong_pairs_are_half_of_the_fakes(self, name):
        loss = gan.LOSSES[name][1]
        real, fake, wrong = logits(0.3, 0.1), logits(-0.2, 0.4), logits(0.7, -2)
        expected = (loss(real, fake) + loss(real, wrong)) / 2
        torch.testing.assert_close(loss(real, fake, wrong), expected)

    def test_a_generator_that_deceives_pays_log_4(self):
        """D = 1/2 everywhere: Goodfellow et al. 2014, theorem 1."""
        assert gan.nonsaturating_d(logits(0), logits(0)).item() == pytest.approx(math.log(4))


class TestPenalty:
    def test_of_a_linear_discriminator(self):
        """D(x) = <w, x>: gamma / 2 |w|^2 whatever x, and its gradient is gamma w."""
        torch.manual_seed(0)
        w, image = torch.randn(3, 4, 4, requires_grad=True), torch.randn(5, 3, 4, 4, requires_grad=True)
        penalty = gan.r1((image * w).sum((1, 2, 3)), image, gamma=10)
        torch.testing.assert_close(penalty, 5 * w.square().sum())
        torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], 10 * w)

    def test_of_a_quadratic_discriminator(self):
        """D(x) = a |x|^2 / 2: summed over pixels, mean over pictures."""
        image, a = torch.randn(5, 3, 4, 4, requires_grad=True), torch.tensor(3.0, requires_grad=True)
        penalty = gan.r1(a * image.square().sum((1, 2, 3)) / 2, image, gamma=2)
        expected = a**2 * image.square().sum((1, 2, 3)).mean()
        torch.testing.assert_close(penalty, expected)
        torch.testing.assert_close(torch.autograd.grad(penalty, a)[0], 2 * expected.detach() / a.detach())

    def test_is_that_of_the_real_network(self):
        """Against differences of D along a direction, in double precision."""
        d, batch = make_stage().discriminator.double(), make_batch(1)
        text = {k: v.double() if v.is_floating_point() else v for k, v in text_of(batch).items()}
        image = batch["image"].double().requires_grad_()
        penalty = gan.r1(torch_sum(d, image, text), image, gamma=2)
        (gradient,) = torch.autograd.grad(torch_sum(d, image, text).sum(), image)
        step = 1e-6 * gradient / gradient.norm()
        slope = (torch_sum(d, image + step, text) - torch_sum(d, image - step, text)) / 2e-6
        assert penalty.item() == pytest.approx(slope.item() ** 2, rel=1e-3)


def torch_sum(d, image, text) -> Tensor:
    """D's logit without the cast to single precision."""
    picture = d.picture(image)
    return d.psi(picture).squeeze(1) + (d.caption(**text) * picture).sum(1)


class TestLazy:
    def test_keeps_the_pace(self):
        """StyleGAN2's numbers for every 16th step: 16 / 17."""
        recipe = OptimizerFactory(torch.optim.Adam, lr=2e-3, betas=[0.0, 0.99], eps=1e-8)
        made = gan.lazy(recipe, 16)
        assert made.lr == pytest.approx(0.0018823529411764706)
        assert made.options["betas"] == pytest.approx([0.0, 0.990586281])
        assert made.options["eps"] == 1e-8
        assert (recipe.lr, recipe.options["betas"]) == (2e-3, (0.0, 0.99))  # the generator's own

    def test_of_an_optimizer_without_betas(self):
        assert gan.lazy(OptimizerFactory(torch.optim.SGD, lr=0.3, momentum=0.9), 2).lr == pytest.approx(0.2)


class TestStep:
    @pytest.mark.parametrize("conditioning", ["projection", "matching"])
    @pytest.mark.parametrize("loss", list(gan.LOSSES))
    def test_both_losses(self, loss, conditioning):
        stage, batch = make_stage(loss=loss, conditioning=conditioning), make_batch()
        torch.manual_seed(3)
        out = stage.step(batch)
        torch.manual_seed(3)
        text = text_of(batch)
        fake = stage.net(torch.randn(3, 7), **text)
        neighbour = {key: value.roll(1, 0) for key, value in text.items()}
        d, (loss_g, loss_d) = stage.discriminator, gan.LOSSES[loss]
        wrong = d(batch["image"], **neighbour) if conditioning == "matching" else None
        real, drawn = d(batch["image"], **text), d(fake, **text)
        torch.testing.assert_close(out["loss_d"], loss_d(real, drawn, wrong))
        torch.testing.assert_close(out["loss_g"], loss_g(drawn))
        torch.testing.assert_close(out["loss"], out["loss_d"] + out["loss_g"])
        assert out["accuracy_real"] == (real > 0).sum() / 3
        assert out["accuracy_fake"] == (drawn < 0).sum() / 3

    def test_the_discriminator_sees_augmented_pictures_of_both_kinds(self):
        stage, batch, seen = make_stage(), make_batch(), []
        stage.augment = [lambda image: (seen.append(image), image)[1]]
        stage.step(batch)
        assert [torch.equal(image, batch["image"]) for image in seen] == [True, False, False]


class TestSample:
    def test_is_the_generator_on_given_noise(self):
        stage, batch = make_stage(), make_batch()
        made = stage.sample(batch, randn=per_sample([4, 5, 6]))
        z = per_sample([4, 5, 6]).initial((7,))
        torch.testing.assert_close(made, stage.net(z, **text_of(batch)))

    def test_a_picture_does_not_depend_on_its_batch(self):
        stage, batch = make_stage(), make_batch()
        alone = stage.sample({k: v[1:2] for k, v in batch.items()}, randn=per_sample([5]))
        together = stage.sample(batch, randn=per_sample([4, 5, 6]))
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


class TestAugmentations:
    @pytest.mark.parametrize("name", list(gan.AUGMENTATIONS))
    def test_gradients_pass_and_every_picture_has_its_own(self, name):
        torch.manual_seed(0)
        image = torch.randn(1, 3, 16, 24).expand(8, -1, -1, -1).clone().requires_grad_()
        seen = gan.AUGMENTATIONS[name](image)
        assert seen.shape == image.shape
        assert len({tuple(x.flatten().tolist()) for x in seen}) > 1
        seen.sum().backward()
        assert image.grad is not None
        assert (image.grad.flatten(1).abs().sum(1) > 0).all()

    def test_a_translation_moves_by_up_to_an_eighth(self):
        torch.manual_seed(0)
        image = torch.randn(64, 3, 16, 24)
        offsets = set()
        for before, after in zip(F.pad(image, (3, 3, 2, 2)), gan.translation(image), strict=True):
            window = [(y, x) for y in range(5) for x in range(7)]
            found = [(y, x) for y, x in window if torch.equal(before[:, y : y + 16, x : x + 24], after)]
            assert len(found) == 1
            offsets.add(found[0])
        assert {y for y, _ in offsets} == set(range(5))
        assert {x for _, x in offsets} == set(range(7))

    def test_a_cutout_is_a_square_of_half_the_side_or_its_part_within(self):
        torch.manual_seed(0)
        holes = gan.cutout(torch.ones(200, 3, 16, 16)) == 0
        assert torch.equal(holes[:, 0], holes.all(1))
        rows, columns = holes[:, 0].any(2).sum(1), holes[:, 0].any(1).sum(1)
        assert torch.equal(holes[:, 0].sum((1, 2)), rows * columns)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 8, 4, 8)

    def test_colour_changes_what_it_says(self, monkeypatch):
        image = torch.tensor([0.2, 0.5, -0.1]).view(1, 3, 1, 1).expand(-1, -1, 2, 2).clone()
        image[..., 0] += 0.4

        def drawn(brightness, saturation, contrast):
            values = torch.tensor([brightness, saturation, contrast]).view(3, 1, 1, 1, 1)
            monkeypatch.setattr(torch, "rand", lambda *a, **k: values)
            return gan.colour(image)

        torch.testing.assert_close(drawn(0.5, 0.5, 0.5), image)
        torch.testing.assert_close(drawn(1.0, 0.5, 0.5), image + 0.5)
        grey = drawn(0.5, 0.0, 0.5)
        torch.testing.assert_close(grey, image.mean(1, keepdim=True).expand_as(image))
        torch.testing.assert_close(drawn(0.5, 0.5, 0.0), image.mean() + (image - image.mean()) / 2)


# Whole runs


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """logs/ with a tiny CLIP."""
    logs = tmp_path_factory.mktemp("logs")
    untrained("clip", logs)
    return logs


@pytest.fixture
def probe(monkeypatch):
    """Puts a callback into the next run."""
    made = fit.make_trainer

    def put(callback):
        def make_trainer(config, run):
            trainer = made(config, run)
            trainer.callbacks.insert(len(trainer.callbacks) - 1, callback)
            return trainer

        monkeypatch.setattr(fit, "make_trainer", make_trainer)

    return put


def run_of(logs: Path, name: str, *options: str, steps: int = 4) -> Run:
    return train("gan", logs, f"paths.run='{logs / name}'", *options, steps=steps)


def checkpoint(run: Run) -> dict[str, Any]:
    return torch.load(run.checkpoint, weights_only=True)


def test_each_optimizer_has_its_own_steps(logs):
    """Eight steps against pictures, three down the penalty (after 0, 3, 6), while the generator takes 4."""
    options = ("model.d_steps=2", "model.r1_every=3", "model.d_lr=2", "optimizer.betas=[0.8,0.9]")
    run = run_of(logs, "pace", *options, "model.beta1=0.5", "optimizer.lr=1e-3")
    state = checkpoint(run)
    generator, discriminator = state["optimizer_states"]
    assert {s["step"].item() for s in generator["state"].values()} == {4}
    assert {s["step"].item() for s in discriminator["state"].values()} == {11}
    assert [s["last_epoch"] for s in state["lr_schedulers"]] == [4, 11]
    assert [s["base_lrs"][0] for s in state["lr_schedulers"]] == pytest.approx([1e-3, 1.5e-3])
    assert discriminator["param_groups"][0]["betas"] == pytest.approx([0.5**0.75, 0.9**0.75])
    assert state["global_step"] == run.manifest()["steps"] == 4
    assert list(column(run, "train/loss")) == [0, 1, 2, 3]
    assert column(run, "lr-AdamW/pg1")[3] > 0


def test_without_a_penalty_nothing_is_lazy(logs):
    run = run_of(logs, "none", "model.r1_gamma=0", "model.beta1=0.5", "optimizer.betas=[0.8,0.9]")
    _, discriminator = checkpoint(run)["optimizer_states"]
    assert list(discriminator["param_groups"][0]["betas"]) == [0.5, 0.9]
    assert {s["step"].item() for s in discriminator["state"].values()} == {4}
    assert set(column(run, "train/r1").values()) == {0}


def test_what_a_run_leaves_behind(logs):
    run = run_of(logs, "files")
    stage, manifest = load_stage(run.path, "gan")
    assert set(weights(run)) == set(stage.net.state_dict())  # the discriminator is in the checkpoint alone
    assert any(key.startswith("discriminator.") for key in checkpoint(run)["state_dict"])
    assert manifest["parameters"] == sum(p.numel() for p in stage.net.parameters())
    assert {"test/loss_d", "test/loss_g", "test/judge/all", "test/clip_score"} <= manifest["metrics"].keys()
    for name in ("loss_d", "loss_g", "loss_ratio", "grad_norm_d", "grad_norm_g", "r1", "accuracy_real"):
        assert len(column(run, f"train/{name}")) == 4, name
    ratio, d, g = (column(run, f"train/{name}") for name in ("loss_ratio", "loss_d", "loss_g"))
    assert list(ratio.values()) == pytest.approx([d[i] / g[i] for i in range(4)])


@pytest.mark.parametrize("options", [(), ("model.d_steps=2", "model.r1_every=3", "model.augment=[cutout]")])
def test_stopped_and_resumed_is_as_never_stopped(logs, tmp_path, probe, options):
    options = (*options, "trainer.val_check_interval=2")
    whole = run_of(logs, f"whole{len(options)}", *options, steps=6)

    class Stop(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)  # takes effect when the step is done

    probe(Stop())
    name = f"parts{len(options)}"
    with pytest.raises(SystemExit):
        run_of(logs, name, *options, steps=6)
    assert checkpoint(Run(logs / name))["global_step"] == 3
    probe(lightning.Callback())
    parts = run_of(logs, name, *options, "resume=true", steps=6)
    for key in ("train/loss_d", "train/loss_g", "train/r1", "train/grad_norm_d", "val/loss_d", "val/loss_g"):
        assert column(parts, key) == column(whole, key)
    for a, b in ((weights(parts), weights(whole)), [checkpoint(r)["state_dict"] for r in (parts, whole)]):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert parts.manifest()["metrics"] == whole.manifest()["metrics"]


def test_a_step_moves_one_network_and_is_clipped(logs, monkeypatch):
    """SGD's steps are as long as its gradients: each is at most lr * trainer.gradient_clip_val."""
    manual_step, moved = GanStage.manual_step, []

    def watched(self, loss, net, which):
        nets = (self.net, self.discriminator)
        before = [torch.cat([p.detach().flatten() for p in n.parameters()]) for n in nets]
        norm = manual_step(self, loss, net, which)
        after = [torch.cat([p.detach().flatten() for p in n.parameters()]) for n in nets]
        moved.append((which, norm, *[(b - a).norm() for a, b in zip(before, after, strict=True)]))
        return norm

    monkeypatch.setattr(GanStage, "manual_step", watched)
    sgd = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.warmup=0")
    options = (*sgd, "optimizer.lr=0.1", "optimizer.decay=constant", "model.r1_gamma=0")
    run_of(logs, "clipped", *options, "trainer.gradient_clip_val=0.05", steps=2)
    assert [which for which, *_ in moved] == [1, 0, 1, 0]
    for which, norm, *lengths in moved:
        assert norm > 0.05
        assert lengths[1 - which] == 0
        assert lengths[which].item() == pytest.approx(0.1 * 0.05, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        ("precision=bf16", "model.loss=hinge"),
        ("model.conditioning=projection", "model.augment=[colour,translation,cutout]"),
        ("model.discriminator.spectral_norm=true", "optimizer=adam", "optimizer.warmup=2"),
        ("model.r1_every=1", "optimizer=sgd", "optimizer.warmup=2", "trainer.gradient_clip_val=null"),
    ],
)
def test_choices_train(logs, tmp_path, options):
    run = run_of(logs, f"choice-{abs(hash(options))}", *options, steps=2)
    assert all(torch.isfinite(w).all() for w in weights(run).values())
    assert len(set(column(run, "train/loss").values())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("trainer.accumulate_grad_batches=2",), "trainer.accumulate_grad_batches does not go with"),
        (("trainer.gradient_clip_algorithm=value",), "trainer.gradient_clip_algorithm=value does not go"),
        (("model.r1_every=0",), "model.r1_every must be a whole number of at least 1, got 0"),
        (("model.d_steps=0",), "model.d_steps must be a whole number from 1 to 1000, got 0"),
        (("model.r1_gamma=-1",), "model.r1_gamma must be a number from 0 to 1000000, got -1"),
        (("model.net.image_size=24",), "model.net.image_size=24 does not fit the data, which has 16"),
        (("model.net.multipliers=[1,2,2,2,2]",), "folded by patch 2 and then halved 4 times"),
        (("model.discriminator.multipliers=[1,2,2,2,2]",), "image_size=16 cannot be folded by patch 2"),
        (("model.loss=wasserstein",), "model.loss must be one of nonsaturating, hinge, got 'wasserstein'"),
        (("model.conditioning=no",), "model.conditioning must be one of projection, matching"),
        (("model.augment=[flip]",), r"augment\[0\] must be one of colour, translation, cutout, got 'flip'"),
        (("+model.discriminator.widht=3",), "model.discriminator.widht is not an option of Discriminator"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(logs, options, message):
    config = configure(
        "gan", logs, f"paths.run='{logs / 'wrong'}'", "overwrite=true", "trainer.max_steps=1", *options
    )
    with pytest.raises(UserError, match=message):
        fit.train(config)


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("precision=fp16", {"precision": "16-mixed"}),
        ("trainer=fsdp", {"strategy": ModelParallelStrategy()}),
    ],
)
def test_what_needs_a_gpu_is_refused_too(setting, changes):
    """A CPU has neither, so this trainer is a picture of one."""
    plain = {"accumulate_grad_batches": 1, "gradient_clip_algorithm": "norm", "precision": "32-true"}
    stage: Any = make_stage()
    stage._trainer = SimpleNamespace(**plain, strategy=None, gradient_clip_val=1.0)
    assert stage.configure_callbacks() == []
    assert (stage.clip, stage.trainer.gradient_clip_val) == (1.0, None)
    vars(stage._trainer).update(changes)
    with pytest.raises(UserError, match=f"{setting} does not go with a stage of several optimizers"):
        stage.check_trainer(stage.trainer)


@pytest.mark.slow
def test_ranks_agree_on_both_networks(logs, tmp_path):
    """Each rank has pictures and noise of its own; gradients are averaged, or the weights would part."""
    seen = watch(2, logs, tmp_path, "gan", "trainer.max_steps=3", "model.r1_every=2")
    assert torch.equal(*seen["weights"][-1])
    assert (seen["losses"][:, 0] != seen["losses"][:, 1]).all()
    assert Run(tmp_path / "2").manifest()["steps"] == 3
