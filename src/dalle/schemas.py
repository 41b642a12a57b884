"""What the files of runs, sweeps and gates hold, each as a type; `dalle.reading` holds files to them.

Keys that later versions may add are let through, and those that not every run has are not required: whoever
needs one asks for it (`Run.manifest("steps")`). Recipes and results are classes of their own.
"""

from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Le, Lt, MinLen
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from dalle.ranges import Length, NonNegative, NonNegativeInt, Side, Text, Vocabulary, Width

Many = Annotated[int, Ge(1), Le(2**20)]  # pictures
Items = Annotated[int, Ge(0), Le(2**40)]  # of data
LOOSE = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


@with_config(LOOSE)
class ClipFacts(TypedDict):
    weights: Text
    embed_dim: Width


@with_config(LOOSE)
class CodesFacts(TypedDict):
    """Of an image tokenizer."""

    weights: Text
    vocab_size: Vocabulary
    grid: Side


@with_config(LOOSE)
class TokenizerFacts(TypedDict):
    vocab_size: Vocabulary
    context_length: Length
    hash: Text


@with_config(LOOSE)
class Norm(TypedDict):
    """Of image embeddings: see `EmbedNorm`."""

    kind: Literal["none", "unit", "unit_times_sqrt_dim", "unit_variance", "standardized", "whitened"]
    mean: NotRequired[list[float] | None]
    std: NotRequired[list[float] | None]
    components: NotRequired[list[list[float]] | None]


@with_config(LOOSE)
class DataFacts(TypedDict):
    source: Text
    fingerprint: dict[str, str]
    items: dict[str, NonNegativeInt]


@with_config(LOOSE)
class Origin(TypedDict):
    """Of imported weights: see `dalle.weights`."""

    layout: Text
    path: Text
    files: dict[str, str]  # SHA-256 by name
    licence: str | None


@with_config(LOOSE)
class Manifest(TypedDict):
    """manifest.json of a finished run."""

    schema: int
    stage: NotRequired[Text]
    weights: NotRequired[Text]
    parameters: NotRequired[NonNegativeInt]
    steps: NotRequired[NonNegativeInt]
    seconds_training: NotRequired[NonNegative]
    metrics: NotRequired[dict[str, float | None]]
    data: NotRequired[DataFacts]
    image_size: NotRequired[Side]
    clip: NotRequired[ClipFacts]
    image_tokenizer: NotRequired[CodesFacts]
    tokenizer: NotRequired[TokenizerFacts]
    image_embed_norm: NotRequired[Norm]
    versions: NotRequired[dict[str, str]]
    origin: NotRequired[Origin]


@with_config(LOOSE)
class Node(TypedDict):
    """Something to be built (dalle.instantiate)."""

    _target_: Text


@with_config(LOOSE)
class EncodedData(TypedDict):
    node: Node  # the settings of the source


@with_config(LOOSE)
class EncodedManifest(TypedDict):
    """manifest.json of a folder of encoded data: see `dalle.data.encoding`."""

    schema: int
    kind: Literal["clip", "codes", "latents"]
    weights: Text
    network: dict[str, int]
    image_size: Side
    precision: Text
    dtype: Text
    text_states: bool
    shard_items: Annotated[Items, Ge(1)]
    fingerprint: dict[str, str]
    items: dict[str, Items]
    difference: NotRequired[dict[str, float]]
    data: EncodedData


@with_config(LOOSE)
class Data(TypedDict):
    source: NotRequired[Node]


@with_config(LOOSE)
class RunConfig(TypedDict):
    """config.yaml of a run: everything it was told."""

    model: Node
    stage: NotRequired[Text]
    command: NotRequired[Text]
    datamodule: NotRequired[Data]
    clip: NotRequired[Node | None]
    image_tokenizer: NotRequired[Node | None]
    origin: NotRequired[Origin]


@with_config(LOOSE)
class TokenizerFile(TypedDict):
    """tokenizer.json; `kind` is captions, clip, or the name of a class of a trusted package, whose
    `from_dict` reads the file; `bpe`, of a BPE of one's own captions, the file of the package `tokenizers`.
    """

    kind: Text
    context_length: Length
    bpe: NotRequired[Text]


@with_config(LOOSE)
class StageFacts(TypedDict):
    """Of a stage in a recipe: where its run was, and the hash of its weights."""

    path: Text
    weights: Text


@with_config(STRICT)
class PictureFacts(TypedDict):
    """Of a picture that is edited, or its mask."""

    path: Text
    digest: Text


@with_config(STRICT)
class EditFacts(TypedDict):
    kind: Text
    files: dict[Literal["image", "mask", "other"], PictureFacts]
    settings: dict[str, Any]


@with_config(STRICT)
class SampleRecipe(TypedDict):
    """recipe.yaml beside sampled pictures: see `dalle.pipelines.recipe`."""

    prompts: Annotated[list[str], MinLen(1)]
    n: Many
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)]
    stages: dict[str, StageFacts]
    options: dict[str, dict[str, Any]]
    batch_size: Many
    precision: Literal["fp32", "bf16"]
    device: Literal["cpu", "cuda"]
    pipeline: NotRequired[Text]
    truncate: NotRequired[bool]
    progress_strip: NotRequired[bool]
    compile: NotRequired[Literal["none", "graphs", "full"]]
    edit: NotRequired[EditFacts]
    made_with: NotRequired[dict[str, Any]]
    schema: int


@with_config(LOOSE)
class EditReport(TypedDict):
    """edit.json beside edited pictures: see `dalle.pipelines.edit_report`."""

    edit: Text
    prompt: str
    figures: dict[str, float]
    means: dict[str, float]
    pictures: dict[str, dict[str, float]]


@with_config(LOOSE)
class Job(TypedDict):
    """A job of a sweep or a search, beside its run."""

    state: Literal["running", "finished", "stopped", "failed"]
    reason: str
    seconds: NonNegative
    overrides: list[str]


@with_config(LOOSE)
class Interval(TypedDict):
    value: float | None
    low: float | None
    high: float | None


@with_config(LOOSE)
class Target(TypedDict):
    """What was evaluated."""

    kind: Text
    paths: dict[str, str]
    weights: NotRequired[dict[str, str]]
    options: NotRequired[dict[str, dict[str, Any]]]


@with_config(LOOSE)
class Protocol(TypedDict):
    """How it was measured."""

    pictures: NonNegativeInt
    real_pictures: NonNegativeInt


@with_config(LOOSE)
class Result(TypedDict):
    """result.json of an evaluation: see `dalle.evaluation.results`."""

    schema: int
    id: Text
    target: Target
    protocol: Protocol
    metrics: list[str]
    figures: dict[str, Interval]
    notes: list[str]
    parameters: dict[str, NonNegativeInt]
    environment: dict[str, str]


@with_config(LOOSE)
class Gate(TypedDict):
    """Recorded figures: see `dalle.evaluation.gate`."""

    settings: list[Text]
    weights: dict[str, str]
    protocol: dict[str, Any]
    figures: dict[str, Interval]
