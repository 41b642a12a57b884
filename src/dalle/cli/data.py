"""Looks at data before anything is trained: `dalle data check PATH [data.image_column=NAME ...]`.

Says which format it is, how many pictures, captions and splits there are, how large and long they are, what
is left out and why, what is there twice, and the settings that read it, having read it by them.
"""

import contextlib
import os
import re
import shlex
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dalle.cli.compose import compose
from dalle.errors import UserError, Words, printable
from dalle.launch.overrides import quote

CHECKED = 100_000  # captions that are measured in tokens
PATIENCE = 2  # seconds after which a progress bar is shown
SHEET = 36  # pictures on the contact sheet
SOFTWARE = "dalle data check"  # what the contact sheet says made it
NAMED = 5  # of each kind that is left out
SPLITS = ("train", "val", "test")


def main(arguments: list[str]) -> None:
    parser = Words(prog="dalle data", description=(__doc__ or "").splitlines()[0])
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
    if args.sheet:
        check_sheet(args.sheet)
    words, module, said, unread = find(args.path, args.settings)
    for line in report(args.path, words, module, said, unread, args.quick, args.sheet):
        print(printable(line), flush=True)


def check_sheet(place: Path) -> None:
    """Refuses, before any work, to write the contact sheet over what is no contact sheet.

    Raises:
        UserError: naming it.
    """
    from PIL import Image

    from dalle.files import check_writable

    if place.suffix.lower() != ".png":
        raise UserError(f"--sheet {place}: the contact sheet is a PNG; give a file that ends in .png")
    if os.path.lexists(place):
        made: object = None
        with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(place) as there:
            made = there.info.get("Software")
        if made != SOFTWARE:
            raise UserError(f"--sheet {place} is there and no contact sheet; give a new name")
    check_writable(place.parent, "place with --sheet")


def find(path: str, given: Sequence[str]) -> tuple[list[str], Any, list[str], list[str]]:
    """The settings that read a path, the DataModule of a CLIP that they make, what was warned of, and which
    files other guesses could not read.
    """
    from dalle.data.guess import guesses
    from dalle.data.pictures import NothingUsable

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
            module, said = _module(words)
            unread = [line for error in failed if isinstance(error, NothingUsable) for line in error.unread]
            return words, module, said, unread
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


def _module(words: Sequence[str]) -> tuple[Any, list[str]]:
    """The DataModule of a CLIP, and what was warned of while its data were opened."""
    from dalle.instantiate import check, instantiate

    config = compose("train", ["model=clip", "batch_size=1", *words])[0].config
    check(config["datamodule"]["source"], "data")
    module = instantiate(config["datamodule"], "datamodule")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in SPLITS:
            module.split(name)
    return module, [str(warning.message) for warning in said if warning.category is UserWarning]


@dataclass
class Survey:
    """What was seen of the pictures that are used."""

    looks: dict[str, Any] = field(default_factory=dict)  # by name
    splits: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # of names
    broken: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # why -> names


def report(
    path: str,
    words: Sequence[str],
    module: Any,
    said: Sequence[str],
    unread: Sequence[str],
    quick: bool,
    sheet: Path | None,
) -> Iterator[str]:
    """What there is, line by line."""
    splits = {name: module.split(name) for name in SPLITS}
    yield row("format", f"{words[0]} ({type(splits['train']).__name__})")
    found = survey(splits, quick)
    sizes = ", ".join(f"{name} {len(source):,}" for name, source in splits.items())
    yield row("pictures", f"{len(found.splits):,} ({sizes})")
    yield from shapes(found, splits["train"])
    yield from captions(splits, module.tokenizer)
    yield from left_out(found, splits["train"], said, unread)
    yield from duplicates(found)
    yield row("contact sheet", contact_sheet(path, splits, set(chain(*found.broken.values())), sheet))
    line = " ".join(map(_for_shell, words))
    yield row("settings", line)
    yield f"\npython train.py -m model=clip,prior,decoder {line} name=mine"


def survey(splits: dict[str, Any], quick: bool) -> Survey:
    """Looks at every picture, and decodes it to its end unless in a hurry."""
    from tqdm import tqdm

    from dalle.data.image_files import BadPicture, inspect, read
    from dalle.data.pictures import Pictures

    def seen(job: tuple[str, Any, int]) -> tuple[str, str, Any, str]:
        split, source, item = job
        look = source.scan.looks[source.names[item]] if isinstance(source, Pictures) else None
        name, wrong = source.called(item), ""
        try:
            look = look or inspect(source.picture_of(item), source.max_pixels)
            if not quick:
                read(source.picture_of(item), source.image_size, 1, source.max_pixels, source.fit)
        except BadPicture as error:
            wrong = str(error)
        return split, name, look, wrong

    found = Survey()
    jobs = [(split, source, item) for split, source in splits.items() for item in range(len(source))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(seen, jobs), "Looking at pictures", len(jobs), unit="", delay=PATIENCE)
        for split, name, look, wrong in bar:
            if wrong and name not in found.splits:
                found.broken[f"{wrong}, as decoding shows; replaced by others in training"].append(name)
            if look is not None:
                found.looks[name] = look
            found.splits[name].add(split)
    return found


def row(name: str, text: object) -> str:
    return f"{name:<15}{text}"


def spread(values: Sequence[float] | np.ndarray, unit: str = "") -> str:
    """The smallest, the middle and the largest of some numbers."""
    low, middle, high = np.percentile(np.asarray(values), (0, 50, 100), method="nearest")
    return f"{low:g} to {high:g}{unit}, median {middle:g}"


def shapes(found: Survey, source: Any) -> Iterator[str]:
    short = np.array([min(look.width, look.height) for look in found.looks.values()])
    long = np.array([max(look.width, look.height) for look in found.looks.values()])
    yield row("shorter side", spread(short, " px"))
    yield row("long : short", spread((long / short).round(2)))
    if small := int((short < source.image_size).sum()):
        yield row("", f"{small:,} are smaller than data.image_size={source.image_size} and are enlarged")
    cropped = int((1 - short / long > 1 / 3).sum())
    if source.fit == "crop" and cropped:
        share = f"{cropped:,} ({cropped / len(short):.0%})"
        yield row("", f"{share} lose more than a third to the square crop: data.fit=pad keeps the whole")


def captions(splits: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    from tqdm import tqdm

    from dalle.data.sources import captions_of

    by_name: dict[str, list[str]] = {}  # a small set is in every split
    for source in splits.values():
        some = range(min(len(source), CHECKED))
        by_name |= zip(map(source.called, some), captions_of(source, some), strict=True)
    found = list(by_name.values())
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


def left_out(found: Survey, source: Any, said: Sequence[str], unread: Sequence[str]) -> Iterator[str]:
    from dalle.data.pictures import Pictures

    out = source.scan.out if isinstance(source, Pictures) else {}
    if isinstance(source, Pictures) or not said:
        yield row("left out", f"{sum(map(len, out.values())):,}")
    else:
        yield from (row("left out" if not k else "", line) for k, line in enumerate(said))
    for why, names in (out | found.broken).items():
        more = ", ..." if len(names) > NAMED else ""
        yield row("", f"{len(names):,} {why}: {', '.join(names[:NAMED])}{more}")
    unread = [*unread, *(source.scan.unread if isinstance(source, Pictures) else ())]
    more = f"; and {len(unread) - NAMED} others" if len(unread) > NAMED else ""
    if unread:
        yield row("not read", "; ".join(unread[:NAMED]) + more)


def duplicates(found: Survey) -> Iterator[str]:
    same: dict[str, list[str]] = defaultdict(list)
    for name, look in found.looks.items():
        same[look.digest].append(name)
    groups = [names for names in same.values() if len(names) > 1]
    apart = [names for names in groups if len(set().union(*(found.splits[name] for name in names))) > 1]
    line = f"{sum(map(len, groups)):,} pictures are equal to another, byte for byte"
    if apart:
        line += f"; {sum(map(len, apart)):,} of them to one in another split ({', '.join(apart[0][:NAMED])})"
    yield row("duplicates", line if groups else "none")


def contact_sheet(path: str, splits: dict[str, Any], bad: set[str], place: Path | None) -> Path:
    """Pictures of all splits as training sees them, each over its first caption."""
    import torch

    from dalle.data.sources import first_captions
    from dalle.images import grid, save_png

    total = sum(map(len, splits.values()))
    images, texts = [], []
    for name, source in splits.items():
        good = [item for item in range(len(source)) if not bad or source.called(item) not in bad]
        share = min(len(good), max(1, round(SHEET * len(good) / total)))
        items = [good[i] for i in np.linspace(0, len(good) - 1, share).round().astype(int)]
        with contextlib.suppress(UserError):  # all of a split break
            images += [source.images(items)] if items else []
            texts += [f"{name}: {text}" for text in first_captions(source, items)]
    if not images:
        raise UserError(f"{path}: no picture can be decoded")
    short = Path(os.path.abspath(path)).name.partition("*")[0] or "data"
    place = place or Path("logs", "data_check", f"{short}.png")
    return save_png(grid(torch.cat(images), texts), place, {"Software": SOFTWARE})
