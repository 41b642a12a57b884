"""Looks at data before anything is trained: `dalle data check PATH [data.image_column=NAME ...]`.

Says which format it is, how many pictures, captions and splits there are, how large and long they are, what
is left out and why, what is there twice, and the settings that read it, having read it by them.
"""

import argparse
import contextlib
import os
import re
import shlex
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dalle.cli.compose import compose
from dalle.errors import UserError, printable
from dalle.launch.overrides import quote

CHECKED = 100_000  # captions that are measured in tokens
PATIENCE = 2  # seconds after which a progress bar is shown
SHEET = 36  # pictures on the contact sheet
NAMED = 5  # of each kind that is left out
SPLITS = ("train", "val", "test")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dalle data", description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True, metavar="check")
    check = actions.add_parser("check", help="what is at a path, and which settings read it")
    check.add_argument(
        "path", help="a folder or file of pictures with captions, or a data set's name at the hub"
    )
    check.add_argument("settings", nargs="*", metavar="data.SETTING=VALUE", help="as of dalle train")
    check.add_argument("--quick", action="store_true", help="do not decode every picture")
    check.add_argument(
        "--sheet", type=Path, help="where the contact sheet goes; else logs/data_check/NAME.png"
    )
    args = parser.parse_args(arguments)
    words, module = find(args.path, args.settings)
    for line in report(args.path, words, module, args.quick, args.sheet):
        print(printable(line), flush=True)


def find(path: str, given: Sequence[str]) -> tuple[list[str], Any]:
    """The settings that read a path, and the DataModule of a CLIP that they make."""
    from dalle.data.guess import guesses

    if chosen := [word for word in given if word.startswith("data=")]:
        kind = chosen[-1].partition("=")[2]
        places = {"hf": "path", "table": "path", "webdataset": "shards"}
        tried = [{"data": kind, f"data.{places.get(kind, 'root')}": path}]
        given = [word for word in given if word not in chosen]
    else:
        tried = guesses(path)
    failed: list[UserError] = []
    for settings in tried:
        words = [f"{key}={_value(value)}" for key, value in settings.items()] + list(given)
        try:
            return words, _module(words)
        except UserError as error:
            failed.append(error)
    raise failed[0]


def _value(text: str) -> str:
    """As Hydra takes it, with quotes only where it needs them."""
    return (
        text
        if re.fullmatch(r"(?!(?i:true|false|null|nan|inf)$)[A-Za-z/._~][\w./+*?-]*", text)
        else quote(text)
    )


def _for_shell(word: str) -> str:
    return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


def _module(words: Sequence[str]) -> Any:
    from dalle.instantiate import instantiate

    config = compose("train", ["model=clip", "batch_size=1", *words])[0].config
    module = instantiate(config["datamodule"], "datamodule")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out is said below
        module.split("train")
    return module


def report(path: str, words: Sequence[str], module: Any, quick: bool, sheet: Path | None) -> Iterator[str]:
    """What there is, line by line."""
    from dalle.data.pictures import Pictures

    splits = {name: module.split(name) for name in SPLITS}
    spoilt: dict[str, list[str]] = {}
    train = splits["train"]
    yield row("format", f"{words[0]} ({type(train).__name__})")
    sizes = ", ".join(f"{name} {len(source):,}" for name, source in splits.items())
    yield row("pictures", f"{len(set(chain(*(s.names for s in splits.values())))):,} ({sizes})"
              if isinstance(train, Pictures) else sizes)  # fmt: skip
    if isinstance(train, Pictures):
        yield from pictures(train)
    yield from captions(splits, module.tokenizer)
    if isinstance(train, Pictures):
        spoilt = {} if quick else broken(train)
        yield from left_out(train, spoilt)
        yield from duplicates(splits)
    bad = set(chain(*spoilt.values()))
    yield row("contact sheet", contact_sheet(path, splits, bad, sheet))
    line = " ".join(map(_for_shell, words))
    yield row("settings", line)
    yield f"\npython train.py -m model=clip,prior,decoder {line} name=mine"


def row(name: str, text: object) -> str:
    return f"{name:<15}{text}"


def spread(values: Sequence[float] | np.ndarray, unit: str = "") -> str:
    """The smallest, the middle and the largest of some numbers."""
    low, middle, high = np.percentile(np.asarray(values), (0, 50, 100), method="nearest")
    return f"{low:g} to {high:g}{unit}, median {middle:g}"


def pictures(source: Any) -> Iterator[str]:
    looks = list(source.scan.looks.values())
    short = np.array([min(look.width, look.height) for look in looks])
    long = np.array([max(look.width, look.height) for look in looks])
    yield row("shorter side", spread(short, " px"))
    yield row("long : short", spread((long / short).round(2)))
    if small := int((short < source.image_size).sum()):
        yield row("", f"{small:,} are smaller than data.image_size={source.image_size} and are enlarged")
    if source.fit == "crop" and source.scan.cropped:
        share = source.scan.cropped / len(looks)
        yield row("", f"{source.scan.cropped:,} ({share:.0%}) lose more than a third to the square crop: "
                  "data.fit=pad keeps the whole")  # fmt: skip


def captions(splits: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    from tqdm import tqdm

    from dalle.data.sources import captions_of

    some = [captions_of(source, range(min(len(source), CHECKED))) for source in splits.values()]
    found = list(chain(*some))
    texts = list(chain(*found))
    yield row("captions", f"{len(texts):,}, {len(texts) / len(found):.1f} a picture")
    yield row("words", spread([len(text.split()) for text in texts]))
    texts = texts[:CHECKED]
    bar = tqdm(texts, desc="Measuring captions", unit="", delay=PATIENCE)
    cut = [text for text in bar if tokenizer.too_long(text)]
    room = tokenizer.context_length
    share = f"{len(cut):,} of {len(texts):,} ({len(cut) / len(texts):.0%})"
    more = "; tokenizer.context_length=... makes room" if cut else ""
    yield row("tokens", f"{share} are longer than the {room} tokens of the text and would be cut{more}")
    if cut:
        yield row("", f"the longest: {max(cut, key=len)[:100]!r} ...")


def broken(source: Any) -> dict[str, list[str]]:
    """Pictures that cannot be decoded to their end, by what is wrong with them."""
    from tqdm import tqdm

    from dalle.data.image_files import BadPicture, read

    def decoded(name: str) -> str | None:
        try:
            read(source.collection.content(name), source.image_size, 1, source.max_pixels, source.fit)
        except BadPicture as error:
            return str(error)
        return None

    found: dict[str, list[str]] = defaultdict(list)
    names = list(source.scan.captions)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(decoded, names), "Decoding pictures", len(names), unit="", delay=PATIENCE)
        for name, why in zip(names, bar, strict=True):
            if why:
                found[f"{why}, as decoding shows; replaced by others in training"].append(name)
    return found


def left_out(source: Any, decoded: dict[str, list[str]]) -> Iterator[str]:
    reasons = source.scan.out | decoded
    yield row("left out", f"{sum(map(len, source.scan.out.values())):,}")
    for why, names in reasons.items():
        more = ", ..." if len(names) > NAMED else ""
        yield row("", f"{len(names):,} {why}: {', '.join(names[:NAMED])}{more}")


def duplicates(splits: dict[str, Any]) -> Iterator[str]:
    digests = next(iter(splits.values())).scan.digests
    count = Counter(digests.values())
    equal = [name for name in digests if count[digests[name]] > 1]
    places: dict[str, set[str]] = defaultdict(set)
    for split, source in splits.items():
        for name in source.names:
            places[digests[name]].add(split)
    apart = [name for name in equal if len(places[digests[name]]) > 1]
    line = f"{len(equal):,} pictures are equal to another, byte for byte"
    if apart:
        line += f"; {len(apart):,} of them to one in another split ({', '.join(apart[:NAMED])})"
    yield row("duplicates", line if equal else "none")


def contact_sheet(path: str, splits: dict[str, Any], bad: set[str], place: Path | None) -> Path:
    """Pictures of all splits as training sees them, each over its first caption."""
    import torch

    from dalle.data.sources import first_captions
    from dalle.images import grid, save_png

    total = sum(map(len, splits.values()))
    images, texts = [], []
    for name, source in splits.items():
        good = [i for i in range(len(source)) if not bad or source.names[i] not in bad]
        share = min(len(good), max(1, round(SHEET * len(good) / total)))
        items = [good[i] for i in np.linspace(0, len(good) - 1, share).round().astype(int)]
        with contextlib.suppress(UserError):  # all of a split break
            images += [source.images(items)] if items else []
            texts += [f"{name}: {text}" for text in first_captions(source, items)]
    if not images:
        raise UserError(f"{path}: no picture can be decoded")
    short = Path(os.path.abspath(path)).name.partition("*")[0] or "data"
    return save_png(grid(torch.cat(images), texts), place or Path("logs", "data_check", f"{short}.png"))
