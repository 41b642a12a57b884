"""A run to the Hugging Face hub, with a model card: `dalle push RUN OWNER/NAME licence=apache-2.0`.

card=true only prints the card; private=false makes the repository public at once. The licence of imported
weights is in their manifest.
"""

from pathlib import Path

from dalle.cli.import_weights import setting
from dalle.errors import UserError, instead

SETTINGS = ("licence", "private", "card")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nusage: dalle push RUN OWNER/NAME [SETTING=VALUE ...]")
        raise SystemExit(0)
    from dalle.run_dir import Run
    from dalle.weights.hub import card, push

    settings = dict(setting(word) for word in arguments if "=" in word)
    if unknown := [key for key in settings if key not in SETTINGS]:
        raise UserError(f"there is no setting {unknown[0]} of dalle push{instead(unknown[0], SETTINGS, '')}")
    for key in ("private", "card"):
        if not isinstance(settings.setdefault(key, key == "private"), bool):
            raise UserError(f"{key} must be true or false, got {settings[key]!r}")
    places = [word for word in arguments if "=" not in word]
    if len(places) != 2 or places[1].count("/") != 1:
        raise UserError("dalle push takes a run and OWNER/NAME")
    run, repository = Run(Path(places[0]).expanduser()), places[1]
    if settings["card"]:
        print(card(run, repository, settings.get("licence")))
        return
    print(push(run, repository, settings.get("licence"), settings["private"]))
