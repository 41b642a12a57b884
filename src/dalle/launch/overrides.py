"""Values as they are written on a command line of Hydra's."""

import json
import re
from typing import Any


def quote(text: str) -> str:
    """Any text as a value on a command line of Hydra's."""
    # Backslashes count before what they escape: a reference to a setting, "${", and quotes
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"'{text}'"


def written(value: Any) -> str:
    """A value as Hydra reads it."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"(?!(?i:true|false|null|nan|inf)$)[A-Za-z_][\w./-]*", value)
    return value if plain else quote(value)
