"""What the entry points share: a user's mistake is one clear line and exit code 1, never a traceback.

``debug=true`` on the command line shows the traceback all the same.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable

from dalle.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Calls a Hydra main function and turns what a user can fix into one line on stderr."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's own report is long; this makes it raise instead
    # `debug` is a config group; its plainest preset is spelled as people expect
    sys.argv = [{"debug=true": "debug=traceback", "debug=false": "debug=none"}.get(a, quoted(a)) for a in sys.argv]
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
    """A prompt is plain text: commas, quotes and brackets in it are not Hydra's. Lists and quoted values stay as they are."""
    key, equals, value = argument.partition("=")
    if key.lstrip("+") != "prompt" or not equals or value[:1] in ("[", "'", '"') or value in ("", "null"):
        return argument
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def _is_users(error: Exception) -> bool:
    return isinstance(error, UserError) or type(error).__module__.startswith(("hydra.", "omegaconf."))


def one_line(error: Exception) -> str:
    """The message of an error, on one line, with the nearest spelling where Hydra lists the choices."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=", "Config search path", "provider=")))
    text = re.sub(r"\s+To append to your config use \S+", "", text)
    if missing := re.search(r"(?:Could not find '|In '[^']*': Could not find ')([\w/]+)/([^'/]+)'", text):
        group, wrong = missing.groups()
        choices = re.findall(r"[\w.-]+", text.split("Available options")[1].split(":", 1)[1]) if "Available options" in text else []
        near = difflib.get_close_matches(wrong, choices, n=1)
        hint = f" Did you mean {group}={near[0]}?" if near else ""
        return f"there is no {group}={wrong}.{hint} Choices: {', '.join(choices)}"
    if key := re.search(r"Key '([^']+)' is not in struct", text):
        return f"no such setting: {key.group(1)} ({text}); `python {sys.argv[0]} --cfg job` lists all settings"
    return text
