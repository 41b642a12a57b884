"""One evaluation: from a resolved config to a result.json with its pictures.

The order is: refuse what cannot work, look whether it has been done before, make and look at pictures under
the Trainer (each rank every world-th one), pool the rows of all ranks, and only then compute figures.
"""

import json
import resource
import shutil
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dalle.build import build, check_arguments
from dalle.data.cache import BrokenCache, cache_key, open_or_build, read_meta
from dalle.data.shapes import Shapes
from dalle.data.sources import Source, as_it_is, captions_of
from dalle.errors import UserError
from dalle.evaluation.meters import NEEDS, Distances, Meter, Rows, Scores, Verdicts, ZeroShot
from dalle.evaluation.results import FILE, Result, find, machine, publish, workplace
from dalle.evaluation.subjects import Clip, Subject, classes_of, groups_of, scorer_of, subject_of
from dalle.metrics.bootstrap import RESAMPLES, Figure, exact, of_mean
from dalle.metrics.features import FeatureNet, clip_features, inception_features, random_features
from dalle.pictures import from_uint8, grid, save_png, to_pil, to_uint8
from dalle.pipelines.load import PUBLIC, load_any_clip
from dalle.runs import write_aside
from dalle.training import check_machine, is_main_process, quiet

USUAL = 1000  # pictures, where nobody says how many
SHOWN = 16  # in the grid
TRAINER = ("accelerator", "strategy", "devices", "num_nodes", "plugins", "deterministic", "benchmark")


def check_settings(
    n: int | None,
    split: str,
    seed: int,
    batch_size: int,
    metrics: list[str] | None,
    features: str | None,
    inception: str | None,
    download: bool,
    scorer: str | None,
    image_size: int | None,
    save_pictures: bool,
    overwrite: bool,
    run: str | None,
    folder: str | None,
    out: str | None,
    note: str | None,
) -> None:
    """The settings of conf/evaluate.yaml that belong to no group; their types are checked by these hints."""
    if (n is not None and n < 1) or batch_size < 1:
        raise UserError(f"n={n} and batch_size={batch_size} must be at least 1")
    if split not in ("train", "val", "test"):
        raise UserError(f"split must be train, val or test, got {split!r}")
    for name in metrics or ():
        if name not in NEEDS:
            raise UserError(f"there is no metric {name!r}; there are {', '.join(NEEDS)}")


def evaluate(config: dict[str, Any]) -> Path | None:
    """Evaluates what `config` asks for and gives the folder of the result (None on all ranks but the first).

    Raises:
        UserError: a wrong setting, runs or pictures that are missing or unusable, too few pictures.
    """
    settings = {key: config[key] for key in check_settings.__annotations__ if key != "return"}
    check_arguments(check_settings, settings, "", partial_call=False)
    check_settings(**settings)
    check_machine(config)
    quiet()
    warnings.filterwarnings("ignore", ".*predict returned None.*")  # on purpose: see `Looking`
    torch.set_float32_matmul_precision("high")

    subject = subject_of(config)
    source = source_of(config, subject)
    job = Job(config, subject, source)
    home = Path(config["out"] or subject.home / "evaluations")
    taken = find(home, job.result)
    if taken and not config["overwrite"] and is_main_process():
        print(f"this was evaluated before: {taken / FILE} (overwrite=true does it again)")
        return noted(config, taken)
    work = workplace(home, job.result)
    if is_main_process():
        shutil.rmtree(work, ignore_errors=True)  # of an evaluation that was stopped
        work.mkdir(parents=True)

    looking = Looking(
        job, Path(config["paths"]["cache"]), work, config["batch_size"], config["save_pictures"]
    )
    trainer = make_trainer(config)
    try:
        trainer.predict(looking, return_predictions=False)
        pooled = Rank(looking).pool()
        if not trainer.is_global_zero:
            return None
        finish(job, looking, pooled, work)
        return noted(config, publish(work, home, taken))
    finally:
        if trainer.is_global_zero:
            shutil.rmtree(work, ignore_errors=True)


def noted(config: dict[str, Any], folder: Path) -> Path:
    """Tells who started this process where the result is."""
    if config["note"]:
        with Path(config["note"]).open("a", encoding="utf-8") as file:
            file.write(f"{folder}\n")
    return folder


def make_trainer(config: dict[str, Any]) -> lightning.Trainer:
    """Networks decide on their precision themselves: features are always float32."""
    chosen = {key: config["trainer"][key] for key in TRAINER}
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False,
           "enable_model_summary": False, "use_distributed_sampler": False}  # fmt: skip
    try:
        return build({"_target_": "lightning.Trainer", **chosen, **off, "precision": "32-true"}, "trainer")
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from error


def source_of(config: dict[str, Any], subject: Subject) -> Source:
    """The split of real pictures, at the size of those that are compared with it."""
    node = config.get("data") or subject.data
    if node is None:
        raise UserError(
            "pictures of a folder are compared with real ones; say which: data=folder data.root=PICTURES"
        )
    node = {**node, "image_size": subject.image_size, "_partial_": True}
    return build(node, "data")(split=config["split"])


class Job:
    """What is looked at, by whom, and the protocol of it."""

    def __init__(self, config: dict[str, Any], subject: Subject, source: Source) -> None:
        self.subject, self.source, self.seed = subject, source, config["seed"]
        self.notes = list(subject.notes)
        self.made, self.real = self.numbers(config)
        self.captions = subject.captions(source, self.made or self.real)
        self.metrics = self.affordable(config["metrics"])
        wanted = subject.captioned or config["features"] in (None, "clip")
        self.scorer = scorer_of(config, subject) if wanted else None
        self.meters = list(self.choose_meters(config))
        self.result = Result(
            subject.facts,
            self.protocol(config),
            self.metrics,
            notes=self.notes,
            parameters=dict(subject.parameters),
        )

    def numbers(self, config: dict[str, Any]) -> tuple[int, int]:
        """How many pictures are made, and how many real ones they are compared with."""
        there, asked, name = len(self.source), config["n"], config["split"]
        if self.subject.pictures is not None:
            if asked and asked > self.subject.pictures:
                raise UserError(f"n={asked}, but the folder holds {self.subject.pictures} pictures")
            made = asked or self.subject.pictures
            return made, min(made, there)
        if asked and asked > there:
            raise UserError(
                f"n={asked}, but the split {name} has {there} items; give n={there}, or another split"
            )
        n = asked or min(USUAL, there)
        if not n:
            raise UserError(f"the split {name} has no items; give another one with split=")
        return (n if self.subject.makes else 0), n

    def affordable(self, asked: list[str] | None) -> list[str]:
        """The metrics asked for; without a list, all that so many pictures allow."""
        fewest, kept = min(self.made or self.real, self.real), []
        for name in asked or self.subject.metrics:
            if name not in self.subject.metrics:
                raise UserError(
                    f"{name} cannot be measured of this {self.subject.facts['kind']}; "
                    f"it has {', '.join(self.subject.metrics)}"
                )
            if fewest >= NEEDS[name]:
                kept.append(name)
            elif asked:
                raise UserError(
                    f"{name} needs at least {NEEDS[name]} pictures, there are {fewest}; give more"
                )
            else:
                self.notes.append(f"{name} is left out: it needs {NEEDS[name]} pictures, there are {fewest}")
        return kept

    def choose_meters(self, config: dict[str, Any]) -> Iterator[Meter]:
        """Those that can be had. A metric that was asked for by name and cannot is refused."""
        asked, lacking = config["metrics"] or (), {}
        shapes, captioned = isinstance(self.source, Shapes), self.subject.captioned
        if isinstance(self.subject, Clip):
            assert self.scorer is not None
            classes = classes_of(self.source, range(self.real))
            if classes is None:
                lacking["zero_shot"] = "the data have no classes (data=imagefolder has)"
            yield ZeroShot(self.metrics, self.scorer, classes)
        distances = [m for m in ("fid", "kid", "inception", "precision_recall") if m in self.metrics]
        network = self.features(config) if distances else None
        if network is None:
            reason = (
                "there is no feature network: give inception=FILE, scorer=RUN or features=open_clip/NAME/TAG"
            )
            lacking |= dict.fromkeys(distances, reason)
        else:
            if network.head is None:
                lacking["inception"] = (
                    "it reads the logits of Inception: give its weights with inception=FILE"
                )
            yield Distances(distances, network, self.subject.prefix)
        scores = [m for m in ("clip_score", "retrieval") if m in self.metrics and self.subject.makes]
        if scores and self.scorer and captioned:
            yield Scores(scores, self.scorer)
        elif scores:
            reason = "there is no CLIP: give scorer=RUN" if captioned else "not every picture has a caption"
            lacking |= dict.fromkeys(scores, reason)
        if "judge" in self.metrics and shapes and captioned:
            yield Verdicts(["judge"], self.group if self.subject.pictures is None else None)
        elif "judge" in self.metrics:
            lacking["judge"] = "it reads captioned pictures of data=shapes only"
        for name, reason in lacking.items():
            if name in asked:
                raise UserError(f"{name} cannot be measured here: {reason}")
        self.metrics = [name for name in self.metrics if name not in lacking]

    def group(self, items: list[int]) -> list[str]:
        return groups_of(self.source, items)

    def features(self, config: dict[str, Any]) -> FeatureNet | None:
        """The feature network that is named; without a name Inception where it is here, else a CLIP."""
        name = config["features"]
        if name in (None, "inception"):
            found = inception_features(config["inception"], config["download"])
            if found or name:
                if not found:
                    raise UserError(
                        "features=inception, but its weights are not on this machine; "
                        "give inception=FILE, or download=true"
                    )
                return found
        if name == "random":
            return random_features()
        if name in (None, "clip"):
            if name and not self.scorer:
                raise UserError("features=clip, but there is no CLIP beside the runs; give scorer=RUN")
            clip, name = self.scorer, config["scorer"] or "clip"
            return clip_features(clip, short(name)) if clip else None
        return clip_features(load_any_clip(name), short(name))

    def protocol(self, config: dict[str, Any]) -> dict[str, Any]:
        """Everything but the subject that figures depend on."""
        return {
            "pictures": self.made,
            "real_pictures": self.real,
            "split": config["split"],
            "data": {"source": type(self.source).__name__, "fingerprint": self.source.fingerprint()},
            "image_size": self.subject.image_size,
            "seed": self.seed,
            "quantised": "8 bit, rounded",
            "resize_of_real": "none, drawn at this size"
            if isinstance(self.source, Shapes)
            else "bicubic with antialiasing (Pillow), middle square",
            "features": next((m.key for m in self.meters if isinstance(m, Distances)), None),
            "scorer": next((m.key for m in self.meters if isinstance(m, Scores)), None),
            "interval": f"95 %, {RESAMPLES} resamples of the pictures",
            "time": "wall clock of the sampling alone, the first batch of several left out",
            "memory": "peak allocated on the GPU"
            if torch.cuda.is_available()
            else "peak of the whole process",
            "machine": machine(),
            "processes": config["trainer"]["devices"],
        }


def short(name: str) -> str:
    """A figure's suffix: open_clip/ViT-B-32/openai -> ViT-B-32-openai, a run -> clip."""
    return name.removeprefix(PUBLIC).replace("/", "-") if name.startswith(PUBLIC) else "clip"


class Looking(lightning.LightningModule):
    """Makes this rank's pictures, looks at them, and keeps the rows."""

    def __init__(self, job: Job, cache: Path, work: Path, batch_size: int, save_pictures: bool) -> None:
        super().__init__()
        self.job, self.cache, self.work = job, cache, work
        self.batch_size, self.save_pictures = batch_size, save_pictures
        nets = [meter.network.owner for meter in job.meters if isinstance(meter, Distances)]
        self.parts = nn.ModuleList([job.subject.module, *nets, *([job.scorer] if job.scorer else [])])
        self.rows: dict[str, list[Rows]] = defaultdict(list)
        self.seconds: list[tuple[float, int]] = []
        self.shown: dict[int, Tensor] = {}
        self.bar = tqdm(disable=True)
        self.kept = {
            k: kept for k, meter in enumerate(job.meters) if (kept := self.reference(meter)) is not None
        }

    def reference(self, meter: Meter) -> Rows | None:
        """The rows of the real pictures, where they are kept; nothing where none are needed."""
        path = self.reference_path(meter)
        return ({} if meter.key is None else None) if path is None or not path.exists() else read_rows(path)

    def reference_path(self, meter: Meter) -> Path | None:
        source = self.job.source
        facts = [meter.key, source.fingerprint(), source.image_size, self.job.real]
        return None if meter.key is None else self.cache / cache_key("real pictures", *facts)

    def predict_dataloader(self) -> DataLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        real = self.job.real if len(self.kept) < len(self.job.meters) else 0
        made, real = (range(n)[rank::world] for n in (self.job.made, real))
        self.bar = tqdm(
            total=len(made) + len(real), desc="evaluating", unit="image", disable=None if not rank else True
        )
        batches: Any = [
            (look, list(items[start : start + self.batch_size]))
            for look, items in (("made", made), ("real", real))
            for start in range(0, len(items), self.batch_size)
        ]
        return DataLoader(batches, batch_size=None, collate_fn=as_it_is)

    def transfer_batch_to_device(
        self, batch: tuple[str, list[int]], device: torch.device, dataloader_idx: int
    ) -> tuple[str, list[int]]:
        return batch

    def predict_step(self, batch: tuple[str, list[int]], batch_idx: int) -> None:
        look, items = batch
        self.look_at_made(items) if look == "made" else self.look_at_real(items)
        self.bar.update(len(items))

    def look_at_made(self, items: list[int]) -> None:
        job = self.job
        captions = [job.captions[item] for item in items] if job.captions else []
        started = time.perf_counter()
        made, extra = job.subject.make(job.source, items, captions)
        self.seconds.append((time.perf_counter() - started, len(items)))
        if bad := int((~made.isfinite().flatten(1).all(1)).sum()):
            raise UserError(
                f"{bad} of {len(made)} pictures hold values that are not finite; "
                "try precision=fp32, and look whether the training ended well"
            )
        image = to_uint8(made).to(self.device)
        self.note("extra", items, extra)
        for k, meter in enumerate(job.meters):
            self.note(f"made {k}", items, meter.rows(image, captions, items))
        for item, picture in zip(items, image.cpu(), strict=True):
            if item < SHOWN:
                self.shown[item] = picture
            if self.save_pictures:
                save_png(to_pil(from_uint8(picture)), self.work / "pictures" / f"{item:06d}.png")

    def look_at_real(self, items: list[int]) -> None:
        image = to_uint8(self.job.source.images(items)).to(self.device)
        captions = [some[0] for some in captions_of(self.job.source, items)]
        for k, meter in enumerate(self.job.meters):
            if k not in self.kept:
                self.note(f"real {k}", items, meter.rows(image, captions, items))

    def note(self, name: str, items: list[int], rows: Rows) -> None:
        self.rows[name].append(
            {"item": torch.tensor(items), **{k: v.detach().cpu() for k, v in rows.items()}}
        )


class Rank:
    """The rows, times and pictures of this rank; `pool` gives those of all, on every rank."""

    def __init__(self, looking: Looking) -> None:
        merged = {name: {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
                  for name, parts in looking.rows.items()}  # fmt: skip
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.own = {"rows": merged, "seconds": looking.seconds, "shown": looking.shown, "memory": memory}

    def pool(self) -> dict[str, Any]:
        ranks: list[Any] = [self.own]
        if distributed.is_available() and distributed.is_initialized():
            ranks = [None] * distributed.get_world_size()
            distributed.all_gather_object(ranks, self.own)
        rows: dict[str, Rows] = {}
        for name in {name for rank in ranks for name in rank["rows"]}:
            parts = [rank["rows"][name] for rank in ranks if name in rank["rows"]]
            order = torch.cat([part["item"] for part in parts]).argsort()
            keys = [key for key in parts[0] if key != "item"]
            rows[name] = {key: torch.cat([part[key] for part in parts])[order] for key in keys}
        return {
            "rows": rows,
            "seconds": [rank["seconds"] for rank in ranks],
            "shown": {item: picture for rank in ranks for item, picture in rank["shown"].items()},
            "memory": max(rank["memory"] for rank in ranks),
        }


def finish(job: Job, looking: Looking, pooled: dict[str, Any], work: Path) -> None:
    """Computes the figures and writes everything into `work`."""
    result, rows = job.result, pooled["rows"]
    for k, meter in enumerate(job.meters):
        real = looking.kept.get(k)
        if real is None:
            real = rows[f"real {k}"]
            keep_rows(looking.reference_path(meter), real)
        result.figures |= meter.figures(rows.get(f"made {k}", {}), real, job.captions)
        result.notes += meter.notes
    if rows.get("extra"):
        result.figures |= job.subject.figures(rows["extra"])
    if "speed" in job.metrics:
        result.figures |= speed(pooled["seconds"], pooled["memory"])
    if "flops" in job.metrics:
        result.figures["gflops_per_image"] = exact(flops(job) / 1e9)
    if result.parameters:
        result.figures["parameters"] = exact(sum(result.parameters.values()))
    if job.subject.skipped:
        result.figures["broken_pictures"] = exact(job.subject.skipped)
    if shown := pooled["shown"]:
        images = torch.stack([from_uint8(shown[item]) for item in sorted(shown)])
        captions = job.captions[: len(images)] or [""] * len(images)
        save_png(grid(images, captions), work / "grid.png")
    if looking.save_pictures and job.captions:
        lines = [
            json.dumps({"file_name": f"{item:06d}.png", "text": text}, ensure_ascii=False)
            for item, text in enumerate(job.captions[: job.made])
        ]
        write_aside(work / "pictures" / "metadata.jsonl", "\n".join(lines) + "\n")
    write_aside(work / FILE, result.to_json())


def speed(ranks: list[list[tuple[float, int]]], memory: int) -> dict[str, Figure]:
    """Seconds per picture on one device, pictures per second on all, peak memory of the hungriest process."""
    timed = [batch for batches in ranks for batch in (batches[1:] or batches)]
    each = of_mean(torch.tensor([seconds / count for seconds, count in timed for _ in range(count)]))
    if len(timed) > 1:  # batches, not pictures, were timed
        each = of_mean(torch.tensor([seconds / count for seconds, count in timed]))
    return {
        "seconds_per_image": each,
        "images_per_second": Figure(*(len(ranks) / s for s in (each.value, each.high, each.low))),
        "peak_memory_gb": exact(memory / 2**30),
    }


def flops(job: Job) -> int:
    """Floating point operations of the first picture, by the products that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        job.subject.make(job.source, [0], job.captions[:1])
    return counter.get_total_flops()


def keep_rows(path: Path | None, rows: Rows) -> None:
    if path is None:
        return

    def save(folder: Path) -> dict[str, Any]:
        for name, values in rows.items():
            np.save(folder / f"{name}.npy", values.numpy())
        return {}

    open_or_build(path, lambda found, _: found, save, "features of real pictures", verify=False)


def read_rows(path: Path) -> Rows | None:
    """None where a file is missing or has changed: then they are computed again."""
    try:
        meta = read_meta(path, verify=True)
        return {Path(name).stem: torch.from_numpy(np.load(path / name)) for name in meta["files"]}
    except (BrokenCache, OSError, ValueError, KeyError):
        if is_main_process():
            shutil.rmtree(path, ignore_errors=True)
        return None
