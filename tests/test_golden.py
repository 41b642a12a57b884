"""The first training losses of every stage. A change that only tidies up may not move them; one that is
meant to says so:

``GOLDEN=write pytest tests/test_golden.py`` writes them anew.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tiny import column, train

from dalle.run_dir import Run

GOLDEN = Path(__file__).parent / "golden"
STEPS = 5
# All that presets tune is set here, so that only code can move a loss; eps is large, lest AdamW turn the
# rounding errors of another processor into whole steps.
TUNED = (
    "optimizer=adamw", "optimizer.lr=1e-3", "optimizer.weight_decay=0.05", "optimizer.betas=[0.9,0.99]",
    "optimizer.eps=1e-4", "optimizer.decay_start=0.5", "trainer.gradient_clip_val=1.0", "seed=0",
)  # fmt: skip
CLIP = ("model.classification_weight=0",)
DECODER = (
    "model.image_dropout=0.1", "model.text_dropout=0.5", "model.denoiser.prediction=velocity",
    "model.denoiser.time_sampling=logit_normal", "model.denoiser.weighting=none",
    "model.denoiser.schedule.name=flow", "model.denoiser.schedule.shift=1.0",
    "model.denoiser.frequency_weight=0", "datamodule.image_embed_norm=unit_times_sqrt_dim",
)  # fmt: skip
PRIOR = (
    "datamodule.image_embed_norm=unit_times_sqrt_dim", "model.text_dropout=0.1", "model.net.text_layers=0",
    "model.denoiser.prediction=x0", "model.denoiser.schedule.name=cosine",
)  # fmt: skip
AR_PRIOR = ("model.text_dropout=0.1", "datamodule.kept_variance=0.95")
DALLE = ("model.text_dropout=0.1", "datamodule.bpe_dropout=0.1", "model.net.shift=false")
DVAE = (
    "model.likelihood=laplace", "model.ln_b=null", "model.temperature.steps=10", "model.kl_weight.end=1.0",
    "model.kl_weight.steps=4", "model.net.logit_gain=2.0", "model.net.gain=0.5",
)  # fmt: skip
VQGAN = ("model.perceptual_weight=1.0", "model.adversarial_weight=0.8", "model.disc_start=2")
VAE = ("model.likelihood=gaussian", "model.kl_weight=1.0")
UPSAMPLER = (
    "model.noise_max=0.2", "model.denoiser.prediction=x0", "model.denoiser.weighting=velocity_damped",
    "model.denoiser.time_sampling=logit_normal", "model.denoiser.schedule.name=flow",
    "model.denoiser.schedule.shift=1.0", "datamodule.crop=0.5", "datamodule.degradation=blur",
    "model.net.residual=true", "model.net.patch=2", "model.net.blocks=1",
)  # fmt: skip
GAN = (
    "model.loss=nonsaturating", "model.conditioning=matching", "model.r1_gamma=1.0", "model.r1_every=2",
    "model.d_steps=1", "model.d_lr=1.0", "model.beta1=0.5", "model.augment=[translation]",
)  # fmt: skip
OF_STAGE = {
    "clip": CLIP, "prior": PRIOR, "ar_prior": AR_PRIOR, "decoder": DECODER, "dit": DECODER,
    "inpaint": ("inpaint=true", "model.all_hidden=0.25", *DECODER),
    "dvae": DVAE, "vqgan": VQGAN, "vae": VAE, "gan": GAN, "dalle": DALLE,
    "upsampler": UPSAMPLER,
}  # fmt: skip


UPSTREAM = {
    "prior": "clip", "ar_prior": "clip", "decoder": "clip", "dit": "clip", "inpaint": "clip", "gan": "clip",
    "dalle": "dvae",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Run]:
    """Trains a stage and, before it, the one whose network its losses depend on; each at most once."""
    logs = tmp_path_factory.mktemp("logs")

    @cache
    def first_steps(model: str) -> Run:
        if model in UPSTREAM:
            first_steps(UPSTREAM[model])
        name = {"inpaint": "decoder"}.get(model, model)
        return train(name, logs, "overwrite=true", *TUNED, *OF_STAGE[model], steps=STEPS)

    return first_steps


@pytest.mark.parametrize("model", OF_STAGE)
def test_first_losses(model, trained):
    run = trained(model)
    losses = list(column(run, "train/loss").values())
    path = GOLDEN / f"{model}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{loss:.7g}\n" for loss in losses))
    golden = [float(line) for line in path.read_text().split()]
    assert len(golden) == STEPS
    assert losses == pytest.approx(golden, rel=1e-4)  # other processors add in another order
