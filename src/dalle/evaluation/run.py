"""One evaluation: from a resolved config to a result.json with its pictures.

The order is: refuse what cannot work, look whether it has been done before, make and look at pictures under
the Trainer (each rank every world-th one), pool the rows of all ranks, and only then compute figures.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.flop_counter import FlopCounterMode

from dalle.errors import UserError
from dalle.evaluation.edited import Edited
from dalle.evaluation.evaluator import Evaluator, keep_rows
from dalle.evaluation.plan import Plan, check_settings, source_of
from dalle.evaluation.results import FILE, find, publish, workplace
from dalle.evaluation.targets import target_of
from dalle.files import check_writable, explained, to_json, write_text
from dalle.images import from_uint8, grid, save_png
from dalle.instantiate import instantiate
from dalle.machine import is_main_process
from dalle.metrics.intervals import Figure, exact, of_mean
from dalle.run_lock import check_name, locked
from dalle.training.fit import check_machine, quiet
from dalle.trust import set_trusted

TRAINER = ("accelerator", "strategy", "devices", "num_nodes", "plugins", "deterministic", "benchmark")


def evaluate(config: dict[str, Any]) -> Path | None:
    """Evaluates what `config` asks for and gives the folder of the result (None on all ranks but the first).

    Raises:
        UserError: a wrong setting, runs or pictures that are missing or unusable, too few pictures.
    """
    check_settings(config)
    set_trusted(config.get("trust"))
    check_name(str(config["name"]), "name")
    if config["out"] and is_main_process():
        check_writable(Path(config["out"]), "folder with out=")
    if config["note"] and is_main_process():
        check_note(Path(config["note"]))
    check_machine(config)
    quiet()
    warnings.filterwarnings("ignore", ".*predict returned None.*")  # on purpose: see `Evaluator`

    target = Edited(config) if config["edit"] else target_of(config)
    source = source_of(config, target)
    plan = Plan(config, target, source)
    home = Path(config["out"] or target.home / "evaluations")
    if is_main_process():
        check_writable(home, "out")
        check_writable(Path(config["paths"]["cache"]), "paths.cache")
    taken = find(home, plan.result)
    if taken and not config["overwrite"]:
        if not is_main_process():
            return None
        print(f"this was evaluated before: {taken / FILE} (overwrite=true does it again)")
        return noted(config, taken)
    work = workplace(home, plan.result)
    with alone(work) if is_main_process() else contextlib.nullcontext():
        return look_and_publish(config, plan, home, work, taken)


def check_note(path: Path) -> None:
    """Refuses to add a line to what holds no such lines.

    Raises:
        UserError: naming the file.
    """
    check_writable(path.parent, "note")
    if path.is_dir():
        raise UserError(f"note={path} is a folder; give a file")
    if path.exists() and not path.is_file():
        raise UserError(f"note={path} is no file (a pipe, a device); give a file")
    if path.exists() and path.stat().st_size:
        with explained(path), path.open("rb") as file:
            file.seek(-min(path.stat().st_size, 2**13), os.SEEK_END)
            last = file.read().splitlines()[-1].decode(errors="replace")
        if not Path(last).name.isdecimal():  # a folder of `publish`
            raise UserError(f"note={path} is there and holds something else; give a new file")


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """Takes the folder in which an evaluation is made, which nobody else may be making."""
    lock = work.with_suffix(".lock")
    with explained(work):
        work.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock) as free:
        if free is None:
            raise UserError(f"another process makes this very evaluation, in {work.parent}; wait for it")
        try:
            with explained(work):
                shutil.rmtree(work, ignore_errors=True)  # of an evaluation that was stopped
                work.mkdir()
            yield
        finally:
            shutil.rmtree(work, ignore_errors=True)
            lock.unlink(missing_ok=True)


def look_and_publish(
    config: dict[str, Any], plan: Plan, home: Path, work: Path, taken: Path | None
) -> Path | None:
    """The part of all ranks; gives the folder of the result, on the first."""
    looking = Evaluator(
        plan, Path(config["paths"]["cache"]), work, config["batch_size"], config["save_pictures"]
    )
    trainer = make_trainer(config)
    try:
        trainer.predict(looking, return_predictions=False)
    except SystemExit as left:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from left
    pooled = looking.pool()
    if not trainer.is_global_zero:
        return None
    finish(plan, looking, pooled, work)
    return noted(config, publish(work, home, taken))


def noted(config: dict[str, Any], folder: Path) -> Path:
    """Tells who started this process where the result is."""
    if config["note"]:
        with Path(config["note"]).open("a", encoding="utf-8") as file:
            file.write(f"{folder}\n")
    return folder


def make_trainer(config: dict[str, Any]) -> lightning.Trainer:
    """Networks decide on their precision themselves: features are always float32."""
    if str(config["trainer"]["strategy"]).startswith("fsdp"):
        raise UserError("trainer=fsdp shards what is trained; evaluate with trainer=ddp, or on one device")
    chosen = {key: config["trainer"][key] for key in TRAINER}
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False,
           "enable_model_summary": False, "use_distributed_sampler": False}  # fmt: skip
    try:
        return instantiate(
            {"_target_": "lightning.Trainer", **chosen, **off, "precision": "32-true"}, "trainer"
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from error


def finish(plan: Plan, looking: Evaluator, pooled: dict[str, Any], work: Path) -> None:
    """Computes the figures and writes everything into `work`."""
    result = plan.result
    for k, (metric, (made, real)) in enumerate(zip(plan.metrics, pooled["metrics"], strict=True)):
        if k in looking.kept:
            real = looking.kept[k]
        else:
            keep_rows(looking.reference_path(metric), real)
        result.figures |= metric.figures(made, real, plan.captions)
        result.notes += metric.notes
    if pooled["extra"]:
        result.figures |= plan.target.figures(pooled["extra"])
    if "speed" in plan.wanted:
        result.figures |= speed(pooled["seconds"], pooled["memory"])
    if "flops" in plan.wanted:
        result.figures["gflops_per_image"] = exact(flops(plan) / 1e9)
    if result.parameters:
        result.figures["parameters"] = exact(sum(result.parameters.values()))
    if plan.target.skipped:
        result.figures["broken_pictures"] = exact(plan.target.skipped)
    if shown := pooled["shown"]:
        images = torch.stack([from_uint8(shown[item]) for item in sorted(shown)])
        captions = plan.captions[: len(images)] or [""] * len(images)
        save_png(grid(images, captions), work / "grid.png")
    if looking.save_pictures and plan.captions:
        lines = [
            to_json({"file_name": f"{item:06d}.png", "text": text}, indent=None)
            for item, text in enumerate(plan.captions[: plan.made])
        ]
        write_text(work / "pictures" / "metadata.jsonl", "".join(lines))
    write_text(work / FILE, result.to_json())


def speed(ranks: list[list[tuple[float, int]]], memory: int) -> dict[str, Figure]:
    """Seconds per picture on one device, pictures per second on all, peak memory of the hungriest process."""
    timed = [batch for batches in ranks for batch in (batches[1:] or batches)]
    each = of_mean(torch.tensor([seconds / count for seconds, count in timed]))
    return {
        "seconds_per_image": each,
        "images_per_second": Figure(*(len(ranks) / s for s in (each.value, each.high, each.low))),
        "peak_memory_gb": exact(memory / 2**30),
    }


def flops(plan: Plan) -> int:
    """Floating point operations of the first picture, by the products that PyTorch counts."""
    plan.target.as_written()
    with FlopCounterMode(display=False) as counter:
        plan.target.make(plan.source, [0], plan.captions[:1])
    return counter.get_total_flops()
