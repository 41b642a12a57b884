"""What the demos end with: a table of how well pictures show what captions say (`python -m dalle.demo RUNS`).

Prompts come from the test split of `shapes`: one object, and two with their relation; of colour-shape pairs
that occur in training (seen) and that never do (unseen). The judge says which pictures are fully right.
"""

import argparse
import time
from pathlib import Path

import torch

from dalle.cli import run
from dalle.data.scenes import draw
from dalle.data.shapes import prompts
from dalle.files import write_json
from dalle.metrics.generation import GenerationMetrics
from dalle.metrics.judge import Judge
from dalle.pipelines.load import Loaded, load_dalle, load_unclip
from dalle.runs import Run
from dalle.training import fast_in_bf16

KINDS = {"one object": "one", "two objects, relation": "two"}


def load(runs: Path, pipeline: str) -> Loaded:
    """The stages of a folder of runs; DALL-E's come with a CLIP, for its score, where there is one."""
    if pipeline == "unclip":
        return load_unclip(runs / "decoder", runs / "prior")
    clip = runs / "clip"
    return load_dalle(runs / "dalle", clip=clip if Run(clip).finished else None)


def measure(loaded: Loaded, n: int, seed: int, batch_size: int) -> dict[str, float]:
    """Samples `n` pictures of each of the four kinds of prompts and returns the table."""
    pipeline = loaded.pipeline
    metrics = GenerationMetrics(pipeline.clip, Judge())
    captions, real, groups = [], [], []
    for label, kind in KINDS.items():
        for seen in (True, False):
            texts, scenes = prompts(kind, seen=seen, n=n, seed=seed)
            captions += texts
            real.append(draw(scenes, pipeline.image_size))
            groups += [f"{label}, {'seen' if seen else 'unseen'}"] * n
    started = time.perf_counter()
    precision = "bf16" if fast_in_bf16() else "fp32"
    images = pipeline.sample(captions, seed=seed, batch_size=batch_size, precision=precision)
    seconds = time.perf_counter() - started
    metrics.update(images, torch.cat(real), captions, groups)
    table = {
        key: value for key, value in metrics.compute().items() if key.count("/") == 0 or key.endswith("/all")
    }
    return {**table, "seconds_per_image": seconds / len(images)}


def report(table: dict[str, float], loaded: Loaded, runs: Path, grid: Path | None) -> str:
    """The table in words."""
    lines = ["", "captions fully right (judge)"]
    lines += [f"  {key.split('/')[1]:<32}{value:7.1%}" for key, value in table.items() if key.count("/") == 2]
    for distance in [key for key in table if key.startswith("fid")]:
        lines.append(f"{distance:<34}{table[distance]:7.2f}   over {table['pictures']:.0f} pictures")
    if "clip_score" in table:
        scores = f"{table['clip_score']:7.2f}   ({table['clip_score_real']:.2f})"
        lines.append(f"{'CLIP score (of real pictures)':<34}{scores}")
    lines.append(f"{'seconds per image':<34}{table['seconds_per_image']:7.3f}")
    for stage, count in loaded.parameters.items():
        trained = Run(runs / stage)
        seconds = f"   trained in {trained.manifest()['seconds_training']:.0f} s" if trained.finished else ""
        lines.append(f"{'parameters of ' + stage:<34}{count / 1e6:6.2f}M{seconds}")
    if grid:
        lines.append(f"pictures: {grid}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder with the runs of the stages, e.g. logs/demo")
    parser.add_argument("--pipeline", choices=["unclip", "dalle"], default="unclip")
    parser.add_argument("--n", type=int, default=64, help="prompts of each of the four kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    loaded = load(args.runs, args.pipeline)
    table = measure(loaded, args.n, args.seed, args.batch_size)
    path = args.runs / ("report.json" if args.pipeline == "unclip" else f"report-{args.pipeline}.json")
    write_json(path, {"n": args.n, "seed": args.seed, **table})
    grids = sorted((args.runs / "samples").glob("*/grid.png"))
    print(report(table, loaded, args.runs, grids[-1] if grids else None))


if __name__ == "__main__":
    run(main)
