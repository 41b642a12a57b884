"""What is worth looking at in a run, stage by stage: the dashboards of W&B, TensorBoard and
`dalle.evaluation.dashboard` are all made from this, and the tests hold it against what stages really log.

A star stands for any letters, as in file names. Metrics of ``test/`` are numbers, all others are curves.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

Panels = dict[str, tuple[str, ...]]  # title -> metrics

ALWAYS: Panels = {
    "Loss": ("train/loss", "val/loss"),
    "Learning rate": ("lr-*",),
    "Samples per second": ("train/samples_per_second",),
    "Processor cores kept busy": ("train/cpu_cores",),
}
ON_A_GPU: Panels = {"GPU memory, GB at most": ("train/gpu_memory_gb",)}

_TIMES: Panels = {"Loss by diffusion time": ("train/loss_t*",)}
_JUDGE: Panels = {
    "All that captions say": ("test/judge/all", "test/judge/seen/all", "test/judge/unseen/all"),
    "The judge, by attribute": (
        "test/judge/colour", "test/judge/shape", "test/judge/size", "test/judge/position",
        "test/judge/relation", "test/judge/background", "test/judge/count", "test/judge/sound",
    ),
}  # fmt: skip
_MADE: Panels = {
    **_JUDGE,
    "Distance to real pictures": ("test/fid*",),
    "CLIP score": ("test/clip_score", "test/clip_score_real"),
}
_REBUILT: Panels = {
    "Likeness: PSNR": ("val/psnr",),
    "Likeness: SSIM": ("val/ssim",),
    "Distance of reconstructions": ("val/rfid*",),
}
_CODES: Panels = {
    "Code use": ("val/codes_used", "val/codes_dead"),
    "Code perplexity": ("val/code_perplexity",),
}
_LIKELIHOOD: Panels = {"Likelihood": ("train/nll", "val/nll"), "Divergence": ("train/kl", "val/kl")}
STAGES: dict[str, Panels] = {
    "clip": {
        "Captions found for pictures": ("val/image_to_text_r*",),
        "Pictures found for captions": ("val/text_to_image_r*",),
        "Scale of the logits": ("train/scale",),
    },
    "ar_prior": {
        "Bits per code": ("train/bits_per_code", "val/bits_per_code"),
        "Cosine similarities": ("val/cosine_*",),
    },
    "prior": {**_TIMES, "Cosine similarities": ("val/cosine_*",)},
    "decoder": {**_TIMES, **_MADE},
    "dvae": {
        **_REBUILT,
        **_CODES,
        **_LIKELIHOOD,
        "Temperature": ("train/temperature",),
        "Weight of the divergence": ("train/kl_weight",),
    },
    "vqgan": {
        **_REBUILT,
        **_CODES,
        "Difference of pixels and of features": ("train/l1", "train/perceptual"),
        "Commitment": ("train/commitment",),
        "Against the discriminator": ("train/adversarial", "train/loss_d"),
        "Weight of the discriminator": ("train/adaptive_weight",),
        "Gradient norms": ("train/grad_norm", "train/grad_norm_d"),
    },
    "dalle": {
        "Loss of text": ("train/text_loss", "val/text_loss"),
        "Loss of codes": ("train/image_loss", "val/image_loss"),
        "Bits per code": ("train/bits_per_code", "val/bits_per_code"),
        "Accuracy": ("train/accuracy", "val/accuracy"),
        **_JUDGE,
    },
    "gan": {
        "Losses of both": ("train/loss_d", "train/loss_g"),
        "Ratio of the losses": ("train/loss_ratio",),
        "Share told right": ("train/accuracy_real", "train/accuracy_fake"),
        "Gradient norms": ("train/grad_norm_d", "train/grad_norm_g"),
        "Gradient penalty": ("train/r1",),
        **_MADE,
    },
    "vae": {**_REBUILT, **_LIKELIHOOD},
    "upsampler": {
        **_TIMES,
        "Likeness: PSNR": ("val/psnr", "val/bicubic_psnr"),
        "Likeness: SSIM": ("val/ssim", "val/bicubic_ssim"),
        "Difference from the small pictures": ("val/consistency", "val/bicubic_consistency"),
        **_JUDGE,
    },
}
# And pictures, by the names under which loggers get them
PICTURES: dict[str, tuple[str, ...]] = {
    "clip": (),
    "ar_prior": (),
    "prior": (),
    "decoder": ("samples", "test/verdicts_sheet"),
    "dvae": ("reconstructions",),
    "vqgan": ("reconstructions",),
    "dalle": ("samples", "test/verdicts_sheet"),
    "gan": ("samples", "test/verdicts_sheet"),
    "vae": ("reconstructions", "samples", "test/verdicts_sheet"),
    "upsampler": ("samples", "upsampled", "test/verdicts_sheet"),
}


def panels(stage: str) -> Panels:
    """All of a stage; a stage of your own has what every stage has."""
    return {**ALWAYS, **ON_A_GPU, **STAGES.get(stage, {})}


def is_curve(metrics: Sequence[str]) -> bool:
    return not metrics[0].startswith("test/")


def pattern(metric: str) -> str:
    """A name with stars as a regular expression."""
    return f"^{re.escape(metric).replace(re.escape('*'), '.*')}$"


def matching(metric: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if re.match(pattern(metric), name))


def tensorboard_layout(stage: str) -> dict[str, dict[str, list[Any]]]:
    """For `SummaryWriter.add_custom_scalars`: a category with a chart for each panel, whose tags are regular
    expressions.
    """
    return {stage: {t: ["Multiline", [pattern(m) for m in metrics]] for t, metrics in panels(stage).items()}}
