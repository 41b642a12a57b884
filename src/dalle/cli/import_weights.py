"""Public weights as a finished run: `dalle import clip FILE-OR-FOLDER name=mine`.

The run lands in logs/<name>/<stage> (paths.logs=...: elsewhere), with the licence and the origin of the
weights in its manifest. Files are safetensors, or those of torch.save; nothing in them is run. The page
docs/weights.md lists what is known, from where, and each kind's own settings.
"""

import inspect
from pathlib import Path
from typing import Any

import yaml

from dalle.cli.entry import check_text
from dalle.errors import UserError, instead, printable

UPSTREAM = {
    "clip": ("clip",),
    "image_tokenizer": ("vqgan", "dvae"),
}  # settings that are runs, and their stages
SHARED = ("name", "paths.logs", "licence")


def main(arguments: list[str]) -> None:
    kind, *words = arguments or [""]
    if kind in ("-h", "--help"):
        usage = "usage: dalle import KIND FILE-OR-FOLDER name=NAME [SETTING=VALUE ...]"
        print(f"{(__doc__ or '').strip()}\n\n{usage}")
        raise SystemExit(0)
    from dalle.weights.importers import IMPORTERS

    if kind not in IMPORTERS:
        given = f"there is no dalle import {kind}" if kind else "dalle import needs a kind"
        raise UserError(f"{given}{instead(kind, IMPORTERS, '')}")
    check_text(words)
    places = [word for word in words if "=" not in word or Path(word).exists()]
    if len(places) != 1:
        raise UserError(f"dalle import {kind} takes one file or folder, and settings as SETTING=VALUE")
    settings = dict(setting(word) for word in words if word not in places)
    import_weights(kind, Path(places[0]).expanduser(), settings)


def setting(word: str) -> tuple[str, Any]:
    """``vision_heads=16`` -> its name and its value."""
    key, _, text = word.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    plain = value is None or isinstance(
        value, bool | int | float | str | list | dict
    )  # YAML knows dates, too
    return key, value if plain and key not in SHARED else text


def import_weights(kind: str, place: Path, settings: dict[str, Any]) -> None:
    from dalle.instantiate import check_arguments
    from dalle.run_dir import Run
    from dalle.run_lock import check_name
    from dalle.weights.importers import IMPORTERS, PARTS
    from dalle.weights.reading import read_weights
    from dalle.weights.writing import write_run

    take = IMPORTERS[kind]
    name, logs, licence = (settings.pop(key, None) for key in SHARED)
    if not name:
        raise UserError("name is needed: give it as name=NAME")
    check_name(name, "name")
    folder = Path(logs or "logs", name)
    own = {key: p for key, p in inspect.signature(take).parameters.items() if key != "source"}
    for key, stages in UPSTREAM.items():
        there = [str(folder / stage) for stage in stages if Run(folder / stage).finished]
        if key in own and key not in settings and there:
            settings[key] = there[0]
    for key in settings:
        if key not in own:
            known = [*SHARED, *own]
            raise UserError(f"there is no setting {key} of dalle import {kind}{instead(key, known, '')}")
    for key, parameter in own.items():
        if parameter.default is parameter.empty and key not in settings:
            raise UserError(f"dalle import {kind} needs {key}: give it as {key}=...")
    check_arguments(take, settings, "", partial_call=True)
    run = Run(folder / kind)
    if run.occupied:
        raise UserError(f"{run} already holds a run; give another name=, or delete it")
    source = read_weights(place, PARTS.get(kind, ()))
    try:
        found = take(source, **settings)
    except UserError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # odd shapes, names
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{place} is no {kind} that this version knows ({reason})") from error
    write_run(found, source, run, name, licence)
    print(printable(f"{run}: {found.stage} of {place} (layout: {found.layout})"))
    if not (licence or found.licence):
        print("careful: what licence these weights have is not known from the file; licence=... notes it")
