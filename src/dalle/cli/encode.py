"""What frozen networks make of data, written once: `dalle encode clip data=folder data.root=X out=FOLDER`.

`clip` writes embeddings and text states, `codes` an image tokenizer's codes, `latents` a VAE's means. Several
processes, here or on other machines with the same disk, share the work; one that was killed is started again.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import MinLen

from dalle.cli.compose import compose
from dalle.errors import UserError, instead
from dalle.ranges import Text, check_values

KINDS = ("clip", "codes", "latents")
PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16"}  # Lightning's names
UNUSED = ("seed", "stage", "tokenizer", "trainer", "debug")  # that its groups put there
PLACES = ("root", "path", "shards", "val_shards", "test_shards")  # settings of sources that are paths


class Settings(TypedDict):
    """conf/encode.yaml; what of it an encoder takes is said by its `Options`."""

    kind: Literal["clip", "codes", "latents"]
    out: Text
    name: Text
    splits: Annotated[list[Literal["train", "val", "test"]], MinLen(1)]
    device: Literal["auto", "cpu", "cuda"]
    upstream: dict[str, Text]
    paths: dict[str, Text]
    data: dict[str, Any]
    clip: dict[str, Any]
    image_tokenizer: dict[str, Any]
    precision: Any
    trust: Any
    shard_items: Any
    batch_size: Any
    num_workers: Any
    dtype: Any
    text_states: Any


def main(arguments: list[str]) -> None:
    kind, *words = arguments or [""]
    if kind in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nusage: dalle encode {'|'.join(KINDS)} SETTING=VALUE ...")
        raise SystemExit(0)
    if kind not in KINDS:
        raise UserError(f"dalle encode {kind}: give one of {', '.join(KINDS)}{instead(kind, KINDS, '')}")
    for job in compose("encode", [f"kind={kind}", *words]):
        encode(job.config)


def encode(config: dict[str, Any]) -> None:
    import torch

    from dalle.data.encoding import Encoder, Options
    from dalle.data.encoding import encode as write
    from dalle.data.sources import source_of
    from dalle.files import check_writable
    from dalle.instantiate import check_arguments
    from dalle.machine import check_ranks, pick_device, settle_threads
    from dalle.trust import set_trusted

    check_ranks()
    set_trusted(config.get("trust"))
    if not config.get("out"):
        raise UserError("out is needed: give it as out=FOLDER")
    check_values({key: value for key, value in config.items() if key not in UNUSED}, Settings)
    for key in sorted(Settings.__required_keys__ - config.keys()):
        raise UserError(f"{key} is needed: do not take it away")
    names = ("shard_items", "batch_size", "num_workers", "dtype", "text_states")
    precision = PRECISIONS.get(config["precision"])
    if precision is None:
        raise UserError(f"precision={config['precision']}: give fp32 or bf16")
    values = {**{name: config[name] for name in names}, "precision": precision}
    check_arguments(Options, values, "", partial_call=False)
    options = Options(**values)
    out = Path(config["out"])
    check_writable(out, "out")
    encoder = Encoder(config["kind"], network(config), options)
    settle_threads()
    device = pick_device(config["device"])
    local = f":{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else ""
    encoder.net.to(torch.device(device + local))
    sources = {split: source_of(config["data"], "data", split) for split in config["splits"]}
    sources = {split: source for split, source in sources.items() if len(source)}
    if not sources:
        raise UserError(f"there is nothing in {', '.join(config['splits'])}; give other splits=")
    needed = encoder.net.image_size
    there = next(iter(sources.values())).image_size
    if config["kind"] != "clip" and there != needed:
        raise UserError(
            f"pictures of {there} px do not fit a network of {needed} px; set data.image_size={needed}"
        )
    try:
        written, whole, of = write(encoder, sources, {"node": with_places(config["data"])}, out)
    except KeyboardInterrupt:
        print(f"\n{out}: whole shards are kept; the same command goes on with the others", flush=True)
        raise
    done = f"{whole} of {of} shards are whole, {written} of them written now"
    more = f"data=encoded data.path={out} reads them" if whole == of else "the others are still at work"
    print(f"{out}: {done}; {more}")


def network(config: dict[str, Any]) -> Any:
    """The frozen network that encodes."""
    from dalle.data.frozen import Frozen
    from dalle.instantiate import instantiate
    from dalle.run_dir import Run, load_stage

    if config["kind"] == "latents":
        stage, _ = load_stage(Run(Path(config["upstream"]["vae"])).path, "vae")
        return Frozen(stage.net)
    key = "clip" if config["kind"] == "clip" else "image_tokenizer"
    return instantiate(config[key], key)


def with_places(node: Any) -> Any:
    """The settings of a source, or of several in a mixture, with paths as they are from any folder."""
    if not isinstance(node, dict):
        return node
    return {key: absolute(value) if key in PLACES else with_places(value) for key, value in node.items()}


def absolute(value: Any) -> Any:
    """A path as it is from any folder; addresses and names at the hub stay."""
    if isinstance(value, list):
        return [absolute(one) for one in value]
    if not isinstance(value, str) or "://" in value:
        return value
    place = os.path.abspath(os.path.expanduser(value))
    return place if os.path.exists(place) or "{" in value or "*" in value else value
