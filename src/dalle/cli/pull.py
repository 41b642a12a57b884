"""A run from the Hugging Face hub, where `dalle push` has put it: `dalle pull OWNER/NAME name=mine`.

It lands in logs/<name>/<stage> (paths.logs=...: elsewhere); revision=... takes another than the newest,
trust=[mylab] is for classes of your own, as everywhere.
"""

from pathlib import Path

from dalle.cli.entry import check_text
from dalle.cli.import_weights import setting
from dalle.errors import UserError, instead

SETTINGS = ("name", "paths.logs", "revision", "trust")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nusage: dalle pull OWNER/NAME name=NAME [SETTING=VALUE ...]")
        raise SystemExit(0)
    from dalle.run_lock import check_name
    from dalle.trust import set_trusted
    from dalle.weights.hub import pull

    check_text(arguments)
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    if unknown := [key for key in settings if key not in SETTINGS]:
        raise UserError(f"there is no setting {unknown[0]} of dalle pull{instead(unknown[0], SETTINGS, '')}")
    places = [word for word in arguments if "=" not in word]
    if len(places) != 1 or places[0].count("/") != 1:
        raise UserError("dalle pull takes OWNER/NAME")
    if not settings.get("name"):
        raise UserError("name is needed: give it as name=NAME")
    check_name(settings["name"], "name")
    set_trusted(setting(f"trust={settings.get('trust', '')}")[1])
    logs = Path(settings.get("paths.logs") or "logs")
    print(pull(places[0], logs, settings["name"], settings.get("revision")))
