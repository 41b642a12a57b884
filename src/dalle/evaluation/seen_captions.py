"""Which captions a training has read: those of the grammar of `shapes` are few enough to come again word for
word, and what is said of such captions is no measure of what was learned beyond them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle import trust
from dalle.data.shapes import Shapes
from dalle.data.sources import EpochSampler, source_of
from dalle.run_dir import Run

AT_ONCE = 20_000


def captions_read(paths: Mapping[str, str]) -> set[str]:
    """Every caption of `shapes` that the trainings of a pipeline's stages read; runs on other data add none.

    The items are those that the sampler drew in as many steps as the manifest says; where a step has several
    optimizers it is an upper bound. A second for 20,000 of them, or less.

    Args:
        paths: the run of each stage. An image tokenizer reads no captions, and DALL-E's CLIP only chooses.
    """
    drawn: dict[str, tuple[Shapes, np.ndarray]] = {}
    for stage, path in paths.items():
        run = Run(Path(path))
        if stage == "image_tokenizer" or (stage == "clip" and "dalle" in paths) or not run.finished:
            continue
        if run.source() is None:
            continue
        node = run.config("datamodule.source")["datamodule"]
        if node["source"].get("_target_") != "dalle.data.shapes.Shapes":
            continue
        source: Any = source_of(node["source"], "data", "train", trust.listed)
        _, there = drawn.setdefault(source.fingerprint(), (source, np.zeros(len(source), dtype=bool)))
        there |= items_drawn(run, len(source))
    captions = set[str]()
    for source, there in drawn.values():
        items = there.nonzero()[0]
        for start in range(0, len(items), AT_ONCE):
            captions.update(source.captions_of(items[start : start + AT_ONCE].tolist()))
    return captions


def items_drawn(run: Run, n: int) -> np.ndarray:
    """Which of a split's n items a training saw."""
    config, left = run.config("datamodule.batch_size", "datamodule.seed"), run.manifest().get("steps", 0)
    node, trainer = config["datamodule"], config.get("trainer") or {}
    batch = node["batch_size"] * (trainer.get("accumulate_grad_batches") or 1)
    for many in (trainer.get("devices"), trainer.get("num_nodes")):
        batch *= many if isinstance(many, int) and many > 0 else 1
    sampler = EpochSampler(
        n, batch, shuffle=True, drop_last=True, seed=node["seed"], limit=node.get("train_items")
    )
    seen, epoch = np.zeros(n, dtype=bool), 0
    while left > 0 and len(sampler) and not seen[: sampler.used].all():
        sampler.set_epoch(epoch)
        for items in [items for _, items in zip(range(left), sampler, strict=False)]:
            seen[[item % n for item in items]] = True
        left, epoch = left - len(sampler), epoch + 1
    return seen
