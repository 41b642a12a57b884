"""What an evaluation will do: how many pictures, which metrics, by whose eyes, and the protocol of it.

Whatever cannot work is refused here, before anything is made or written.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, TypedDict

import torch

from dalle.data import sources
from dalle.data.shapes import Shapes
from dalle.data.sources import Source
from dalle.errors import UserError
from dalle.evaluation.results import Result, machine
from dalle.evaluation.targets import Clip, Prior, Target, classes_of, scorer_of
from dalle.instantiate import instantiate
from dalle.metrics.clip_score import CLIPScore, ZeroShotAccuracy
from dalle.metrics.features import (
    FeatureNet,
    clip_features,
    effnet_features,
    inception_features,
    random_features,
)
from dalle.metrics.fid import (
    DISTANCES,
    FEWER,
    LARGE,
    NEIGHBOURS,
    PARTS,
    SPLITS,
    SUBSET_SIZE,
    SUBSETS,
    FrechetDistance,
    enough_for_infinity,
)
from dalle.metrics.imagined import ImaginedEmbeddings
from dalle.metrics.intervals import RESAMPLES
from dalle.metrics.judge_accuracy import JudgeAccuracy
from dalle.metrics.metric import EvaluationMetric
from dalle.metrics.reconstruction import Perceptual
from dalle.pipelines.load import PUBLIC, load_any_clip
from dalle.ranges import PositiveInt, Seed, Side, Text, check_values
from dalle.trust import composed, listed

NEEDS = {  # metric -> the fewest pictures it can be made of
    "fid": 2,
    "kid": 2,
    "fid_infinity": 2,  # and more the more dimensions features have
    "inception": 10,
    "precision_recall": 4,
    "clip_score": 1,
    "retrieval": 2,
    "hard_negatives": 1,
    "judge": 1,
    "reconstruction": 1,
    "zero_shot": 2,
    "cosines": 1,
    "speed": 1,
    "flops": 1,
}
SCORES = ("clip_score", "retrieval", "hard_negatives")
USUAL = 1000  # pictures, where nobody says how many


class Settings(TypedDict):
    """Those of conf/evaluate.yaml that belong to no group."""

    n: PositiveInt | None
    split: Literal["train", "val", "test"]
    seed: Seed
    batch_size: PositiveInt
    metrics: list[str] | None
    extra_metrics: list[dict[str, Any]] | None
    perceptual: Perceptual | None
    features: Text | None
    inception: Text | None
    download: bool
    scorer: Text | None
    image_size: Side | None
    save_pictures: bool
    overwrite: bool
    run: Text | None
    folder: Text | None
    out: Text | None
    note: Text | None
    edit: Text | None
    editing: dict[str, Any]
    upsampling: dict[str, Any]
    upsamplers: list[Text]
    paths: dict[str, Text]


def check_settings(config: dict[str, Any]) -> None:
    """Whether they are what they may be, and go together."""
    check_values({name: config[name] for name in Settings.__annotations__}, Settings)
    if not config["edit"] and any(value is not None for value in config["editing"].values()):
        raise UserError("editing is of an edit: say which with edit=")
    metrics, features = config["metrics"], config["features"]
    for name in metrics or ():
        if name not in NEEDS:
            raise UserError(f"there is no metric {name!r}; there are {', '.join(NEEDS)}")
    if features and metrics and not set(metrics) & set(DISTANCES):
        raise UserError(
            f"features={features}: none of metrics={','.join(metrics)} looks at features; leave it out, "
            f"or add one of {', '.join(DISTANCES)}"
        )


def source_of(config: dict[str, Any], target: Target) -> Source:
    """The split of real pictures, at the size of those that are compared with it."""
    node, trust = (config["data"], composed) if config.get("data") else (target.data, listed)
    if node is None:
        raise UserError(
            "pictures of a folder are compared with real ones; say which: data=folder data.root=PICTURES"
        )
    return sources.source_of({**node, "image_size": target.image_size}, "data", config["split"], trust)


# What the groups of the judge's figures are, and its other figures.
JUDGED = {
    "unseen": "captions that name colour and shape of a pair that training never shows; all others are seen",
    "seen_new": "seen captions that no stage read word for word in training",
    "chance": "the share of 50 perfect pictures of any pairs, drawn for no caption, for each caption",
    "residual": "root mean square difference from the drawing of the scene that was read, in [-1, 1]",
}


class Plan:
    """What is looked at, by whom, and the protocol of it."""

    def __init__(self, config: dict[str, Any], target: Target, source: Source) -> None:
        self.target, self.source, self.seed = target, source, config["seed"]
        self.notes = list(target.notes)
        self.made, self.real = self.numbers(config)
        self.captions = target.captions(source, self.made or self.real)
        self.wanted = self.affordable(config["metrics"])
        wanted = target.captioned or config["features"] in (None, "clip")
        self.scorer = scorer_of(config, target) if wanted else None
        self.metrics = list(self.choose_metrics(config))
        self.result = Result(
            target.facts,
            self.protocol(config),
            self.wanted,
            notes=self.notes,
            parameters=dict(target.parameters),
        )

    def numbers(self, config: dict[str, Any]) -> tuple[int, int]:
        """How many pictures are made, and how many real ones they are compared with."""
        there, asked, name = len(self.source), config["n"], config["split"]
        if self.target.pictures is not None:
            if asked and asked > self.target.pictures:
                raise UserError(f"n={asked}, but the folder holds {self.target.pictures} pictures")
            made = asked or self.target.pictures
            return made, min(made, there)
        if asked and asked > there:
            raise UserError(
                f"n={asked}, but the split {name} has {there} items; give n={there}, or another split"
            )
        n = asked or min(USUAL, there)
        if not n:
            raise UserError(f"the split {name} has no items; give another one with split=")
        return (n if self.target.makes else 0), n

    def affordable(self, asked: list[str] | None) -> list[str]:
        """The metrics asked for; without a list, all that so many pictures allow."""
        fewest, kept = min(self.made or self.real, self.real), []
        for name in asked or self.target.metrics:
            if name not in self.target.metrics:
                raise UserError(
                    f"{name} cannot be measured of this {self.target.facts['kind']}; "
                    f"it has {', '.join(self.target.metrics)}"
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

    def choose_metrics(self, config: dict[str, Any]) -> Iterator[EvaluationMetric]:
        """Those that can be had. A metric that was asked for by name and cannot is refused."""
        asked, lacking = config["metrics"] or (), {}
        fewest = min(self.made or self.real, self.real)
        shapes, captioned = isinstance(self.source, Shapes), self.target.captioned
        if isinstance(self.target, Clip):
            assert self.scorer is not None
            classes = classes_of(self.source, range(self.real))
            if classes is None:
                lacking["zero_shot"] = "the data have no classes (data=imagefolder and data=idx have)"
            yield ZeroShotAccuracy(self.scorer, self.wanted, classes)
        if isinstance(self.target, Prior):
            assert self.target.clip is not None
            imagine = partial(self.target.imagine, seed=self.seed)
            key = [self.target.facts[k] for k in ("weights", "options", "precision", "batch_size")]
            yield ImaginedEmbeddings(self.target.clip, imagine, [*key, self.seed, machine()], self.wanted)
        distances = [m for m in DISTANCES if m in self.wanted]
        network = self.features(config) if distances else None
        if network is None:
            reason = (
                "there is no feature network: give inception=FILE, scorer=RUN, features=effnet or "
                "features=open_clip/NAME/TAG"
            )
            lacking |= dict.fromkeys(distances, reason)
        else:
            if fewest < (needed := enough_for_infinity(network.facts["dimension"])):
                lacking["fid_infinity"] = (
                    f"features of {network.facts['dimension']} dimensions need {needed} pictures of either "
                    f"kind, there are {fewest}"
                )
            if network.head is None:
                lacking["inception"] = (
                    "it reads the logits of Inception: give its weights with inception=FILE"
                )
            there = [metric for metric in distances if metric not in lacking]
            yield FrechetDistance(network, there, self.target.prefix)
        scores = [m for m in SCORES if m in self.wanted and self.target.makes]
        if "hard_negatives" in scores and not shapes:
            scores.remove("hard_negatives")
            lacking["hard_negatives"] = (
                "it swaps words of the captions of data=shapes; retrieval takes any captions (R-precision)"
            )
        if scores and self.scorer and captioned:
            yield CLIPScore(self.scorer, scores)
        elif scores:
            reason = "there is no CLIP: give scorer=RUN" if captioned else "not every picture has a caption"
            lacking |= dict.fromkeys(scores, reason)
        if "judge" in self.wanted and shapes and captioned:
            yield JudgeAccuracy(self.target.captions_read)
        elif "judge" in self.wanted:
            lacking["judge"] = "it reads captioned pictures of data=shapes only"
        for name, reason in lacking.items():
            if name in asked:
                raise UserError(f"{name} cannot be measured here: {reason}")
        self.wanted = [name for name in self.wanted if name not in lacking]
        yield from extra_metrics(config["extra_metrics"] or [])

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
        if name in ("random", "effnet"):
            return random_features() if name == "random" else effnet_features()
        if name in (None, "clip"):
            if name and not self.scorer:
                raise UserError("features=clip, but there is no CLIP beside the runs; give scorer=RUN")
            clip, name = self.scorer, config["scorer"] or "clip"
            return clip_features(clip, short(name)) if clip else None
        return clip_features(load_any_clip(name), short(name))

    def protocol(self, config: dict[str, Any]) -> dict[str, Any]:
        """Everything but the target that figures depend on."""
        own = {key: config[key] for key in ("extra_metrics", "perceptual") if config[key]}
        return own | {
            "pictures": self.made,
            "real_pictures": self.real,
            "split": config["split"],
            "data": {"source": type(self.source).__name__, "fingerprint": self.source.fingerprint()},
            "image_size": self.target.image_size,
            "captions": "the first of each item",
            "seed": self.seed,
            "quantised": "8 bit, rounded",
            "resize_of_real": "none, drawn at this size"
            if isinstance(self.source, Shapes)
            else "bicubic with antialiasing (Pillow), middle square",
            "constants": {
                "kid": f"{SUBSETS} subsets of {SUBSET_SIZE}",
                "inception_score": f"{SPLITS} splits",
                "precision_recall": f"{NEIGHBOURS} neighbours, features centred, float64",
                "fid_infinity": f"a line through 1 to {PARTS} parts of both sets",
            },
            "features": next((m.reference for m in self.metrics if isinstance(m, FrechetDistance)), None),
            "judge": JUDGED if any(isinstance(m, JudgeAccuracy) for m in self.metrics) else None,
            "scorer": next((m.reference for m in self.metrics if isinstance(m, CLIPScore)), None),
            "interval": "95 %: of shares Wilson's; of FID at infinity a jackknife of ten groups; of others "
            f"{RESAMPLES} resamples of the pictures ({FEWER} for FID of more than {LARGE} features), so that "
            "of FID is of the estimate at this many pictures",
            "time": "wall clock of the sampling alone, mean over batches, the first of several left out",
            "memory": "peak allocated on the GPU"
            if torch.cuda.is_available()
            else "peak of the whole process",
            "machine": machine(),
            "processes": config["trainer"]["devices"],
        }


def extra_metrics(nodes: list[dict[str, Any]]) -> list[EvaluationMetric]:
    """Those of your own, named by the configuration."""
    made = [instantiate(node, f"extra_metrics[{k}]") for k, node in enumerate(nodes)]
    for k, metric in enumerate(made):
        if not isinstance(metric, EvaluationMetric):
            raise UserError(f"extra_metrics[{k}] must be an EvaluationMetric, got {type(metric).__name__}")
    return made


def short(name: str) -> str:
    """A figure's suffix: open_clip/ViT-B-32/openai -> ViT-B-32-openai, a run -> clip."""
    return name.removeprefix(PUBLIC).replace("/", "-") if name.startswith(PUBLIC) else "clip"
