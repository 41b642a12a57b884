"""What the entry points share: a user's mistake is one clear line and exit code 1, never a traceback.

``debug=true`` on the command line shows the traceback all the same.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Collection

from dalle.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Calls a Hydra main function and turns what a user can fix into one line on stderr."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's own report is long; this makes it raise instead
    plain = {"debug=true": "debug=traceback", "debug=false": "debug=none"}  # `debug` is a config group
    script, *arguments = [plain.get(argument, quoted(argument)) for argument in sys.argv]
    arguments.sort(key=lambda argument: argument not in ("-m", "--multirun"))  # argparse wants them together
    sys.argv = [script, *arguments]
    shown = any(re.match(r"\+?debug=(?!none)", a) for a in sys.argv)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except Exception as error:
        if shown or not _is_users(error):
            raise
        sys.exit(f"error: {one_line(error)}")


def quoted(argument: str) -> str:
    """A prompt is plain text: commas, quotes, braces in it are not Hydra's.

    Lists, and values that are quoted as a whole, stay as they are.
    """
    key, equals, value = argument.partition("=")
    if key.lstrip("+") != "prompt" or not equals or value in ("", "null"):
        return argument
    if len(value) > 1 and value[0] + value[-1] in ("[]", "''", '""'):
        return argument
    # Backslashes count before what they escape: a reference to a setting, "${", and quotes
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    text = re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"{key}='{text}'"


def _is_users(error: Exception) -> bool:
    return isinstance(error, UserError) or type(error).__module__.startswith(("hydra.", "omegaconf."))


def one_line(error: Exception) -> str:
    """What is wrong and what to do about it, on one line.

    Hydra's errors come with their facts as attributes, their own or of what caused them; they are read here
    without importing it.
    """
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return message
    facts = {**vars(error.__cause__), **vars(error)} if error.__cause__ else vars(error)
    key = facts.get("full_key")
    if written := facts.get("override"):
        return (
            f"{written!r} cannot be read; write key=value, or key=\"'some text'\" for text that holds signs"
        )
    if "/" in (wanted := facts.get("missing_cfg_file") or ""):
        group, _, name = wanted.rpartition("/")
        return f"there is no {group}={name}{_choices(name, facts['options'], group + '=')}"
    if key and "is not in struct" in str(facts.get("msg")):
        place, _, name = key.rpartition(".")
        known = [k for k in facts["parent_node"] if not k.startswith("_")] if facts["parent_node"] else []
        return f"there is no setting {key}{_choices(name, known, place + '.' if place else '')}"
    if several := re.search(r"Ambiguous value for argument '(.*?)'", message):
        return f"{several[1]}: several values are several jobs; say so with -m"
    if key and "Missing mandatory value" in message:
        return f"{key} is needed: give it as {key}=VALUE"
    return re.sub(r" (To append to your|See https?:|full_key:|Config search path:) ?.*", "", message)


def _choices(wrong: str, choices: Collection[str] | None, prefix: str) -> str:
    """The rest of a sentence that says what is not there."""
    if not choices:
        return ""
    near = difflib.get_close_matches(wrong, choices, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(sorted(choices))}"
