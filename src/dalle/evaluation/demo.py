"""What the demos end with: a table of how well pictures show what captions say.

Prompts are of `shapes`: one object, and two with their relation; of colour-shape pairs that occur in training
(seen) and that never do (unseen). The judge says which pictures are fully right; beside it stand Wilson's
95 % interval, what chance has right, the share of prompts that the training read word for word, and how many
of the others are right. Choose settings with `--split val`, whose unseen pairs are others; report the test's.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dalle.data.scenes import draw
from dalle.data.shapes import prompts
from dalle.errors import Words
from dalle.evaluation.seen_captions import captions_read
from dalle.files import write_json
from dalle.images import from_uint8, to_uint8
from dalle.machine import fast_in_bf16, settle_threads
from dalle.metrics.chance import chance
from dalle.metrics.intervals import of_share
from dalle.metrics.judge import Judge
from dalle.metrics.metric import update_all, values_of, without_marks
from dalle.pipelines.load import PRIORS, Loaded, load_dalle, load_unclip
from dalle.ranges import Seed, check_value
from dalle.run_dir import Run
from dalle.schemas import Many
from dalle.training.callbacks import usual_metrics

KINDS = {"one object": "one", "two objects, relation": "two"}


def load(runs: Path, pipeline: str, prior: str = "prior") -> Loaded:
    """The stages of a folder of runs; DALL-E's come with a CLIP, for its score, where there is one."""
    if pipeline == "unclip":
        return load_unclip(runs / "decoder", runs / prior)
    clip = runs / "clip"
    return load_dalle(runs / "dalle", clip=clip if Run(clip).finished else None)


def measure(loaded: Loaded, n: int, seed: int, batch_size: int, split: str = "test") -> dict[str, float]:
    """Samples `n` pictures of each of the four kinds of prompts and returns the table."""
    pipeline, captions, real = loaded.pipeline, [], []
    for kind in KINDS.values():
        for seen in (True, False):
            texts, scenes = prompts(kind, seen=seen, n=n, seed=seed, split=split)
            captions += texts
            real.append(draw(scenes, pipeline.image_size))
    started = time.perf_counter()
    precision = "bf16" if fast_in_bf16() else "fp32"
    images = pipeline.sample(captions, seed=seed, batch_size=batch_size, precision=precision)
    seconds = time.perf_counter() - started
    metrics = usual_metrics(pipeline.clip, judged=False)
    update_all(metrics, images, torch.cat(real), captions, range(len(images)))
    table = without_marks(values_of(metrics))
    judged = verdicts(from_uint8(to_uint8(images)).cpu(), captions, captions_read(loaded.paths))
    return {**table, **judged, "seconds_per_image": seconds / len(images)}


def verdicts(images: Tensor, captions: list[str], read: set[str]) -> dict[str, float]:
    """What the judge says of pictures of all kinds of prompts: equally many of each, in the order of KINDS,
    seen ones first. `read` are the captions of the training.
    """
    judge, table = Judge(), {}
    reading = judge.read(images)
    right, by_chance = judge.score(reading, captions)["all"], chance(captions)["all"]
    known = torch.tensor([caption in read for caption in captions])
    table = {
        "judge_residual": judge.residual(images, reading).mean().item(),
        "judge/all": right.mean().item(),
    }
    groups = [f"{label}, {which}" for label in KINDS for which in ("seen", "unseen")]
    for group, rows in zip(groups, torch.arange(len(captions)).chunk(len(groups)), strict=True):
        share, new = of_share(right[rows]), right[rows][~known[rows]]
        table |= {f"judge/{group}/all": share.value, f"judge/{group}/low": share.low}
        table |= {f"judge/{group}/high": share.high, f"judge/{group}/chance": by_chance[rows].mean().item()}
        table[f"judge/{group}/read_in_training"] = known[rows].double().mean().item()
        if len(new):
            table[f"judge/{group}/new"] = new.mean().item()
    return table


def report(table: dict[str, float], loaded: Loaded, runs: Path, grid: Path | None) -> str:
    """The table in words."""
    lines = ["", *shares(table)]
    lines.append(
        f"{'distance from clean drawings':<34}{table['judge_residual']:7.3f}   (real pictures: 0.00)"
    )
    for distance in [key for key in table if key.startswith("fid")]:
        lines.append(f"{distance:<34}{table[distance]:7.2f}   the estimate at n={table['pictures']:.0f}")
    if "clip_score" in table:
        scores = f"{table['clip_score']:7.2f}   ({table['clip_score_real']:.2f})"
        lines.append(f"{'CLIP score (of real pictures)':<34}{scores}")
    lines.append(f"{'seconds per image':<34}{table['seconds_per_image']:7.3f}")
    for stage, count in loaded.parameters.items():
        trained = Run(Path(loaded.paths[stage]))
        seconds = trained.manifest().get("seconds_training") if trained.finished else None
        took = "" if seconds is None else f"   trained in {seconds:.0f} s"
        lines.append(f"{'parameters of ' + stage:<34}{count / 1e6:6.2f}M{took}")
    if grid:
        lines.append(f"pictures: {grid}")
    return "\n".join(lines)


def shares(table: dict[str, float]) -> list[str]:
    """A line for each kind of prompts."""
    lines = [f"{'captions fully right (judge)':<41}    95 % interval   chance   read in training"]
    for group in dict.fromkeys(key.split("/")[1] for key in table if key.count("/") == 2):
        of = {key.split("/")[2]: value for key, value in table.items() if key.startswith(f"judge/{group}/")}
        new = f", of the others right {of['new']:.1%}" if of["read_in_training"] and "new" in of else ""
        lines.append(
            f"  {group:<32}{of['all']:7.1%}   {of['low']:6.1%} to {of['high']:6.1%}   {of['chance']:6.2%}   "
            f"{of['read_in_training']:.0%}{new}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Words(prog="dalle demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder with the runs of the stages, e.g. logs/demo")
    parser.add_argument("--pipeline", choices=["unclip", "dalle"], default="unclip")
    parser.add_argument("--prior", choices=PRIORS, default="prior", help="of unclip")
    parser.add_argument("--n", type=int, default=64, help="prompts of each of the four kinds")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="val: to choose by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args(arguments)
    for option, hint in {"n": Many, "seed": Seed, "batch_size": Many}.items():
        check_value(getattr(args, option), hint, f"--{option.replace('_', '-')}")
    settle_threads()
    loaded = load(args.runs, args.pipeline, args.prior)
    table = measure(loaded, args.n, args.seed, args.batch_size, args.split)
    kind = args.prior if args.pipeline == "unclip" else args.pipeline
    path = args.runs / ("report.json" if kind == "prior" else f"report-{kind}.json")
    write_json(path, {"n": args.n, "seed": args.seed, "split": args.split, **table})
    grids = sorted((args.runs / "samples").glob("*/grid.png"))
    print(report(table, loaded, args.runs, grids[-1] if grids else None))
