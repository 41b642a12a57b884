"""Pages that need nothing but themselves: templates by jinja2, charts by plotly, pictures within.

What others have chosen (names, captions, settings) is text in HTML by jinja2's autoescape, and data in one
JSON block in which no tag can end or begin. The page's policy lets only its own two scripts run, known by
their hashes, and fetches nothing.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dalle.errors import printable

Chart = dict[str, Any]  # what plotly.js draws: title, data (traces), layout

MOST_BYTES = 50_000_000  # of pictures in a page
MOST_POINTS = 2_000  # of a curve
TEMPLATES = Environment(
    loader=PackageLoader("dalle.evaluation"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: printable(value) if type(value) is str else value,
)
TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False}


@dataclass(frozen=True)
class Picture:
    title: str
    source: str


class Album:
    """Pictures of a page, until they are too many bytes; `left_out` counts those that came later."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.bytes, self.left_out = most_bytes, 0, 0

    def add(self, title: str, path: Path, folder: Path) -> list[Picture]:
        """The picture, or nothing: it is no file of this folder, or the page is full."""
        if not belongs(path, folder):
            return []
        if self.bytes + path.stat().st_size > self.most_bytes:
            self.left_out += 1
            return []
        data = path.read_bytes()
        self.bytes += len(data)
        return [Picture(title, f"data:image/png;base64,{base64.b64encode(data).decode()}")]


def belongs(path: Path, folder: Path) -> bool:
    """Whether it is a file of this folder, and no link to one elsewhere."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def render(template: str, charts: Sequence[Chart], album: Album, **values: Any) -> str:
    """A page as HTML; the template places each chart with the macro `chart`."""
    from plotly.offline import get_plotlyjs  # 5 MB, of use only here

    own = {name: TEMPLATES.get_template(f"page.{name}").render() for name in ("css", "js")}
    scripts = [script.replace("\r\n", "\n") for script in (get_plotlyjs(), own["js"])]
    return TEMPLATES.get_template(template).render(
        style=Markup(own["css"]),
        scripts=[Markup(script) for script in scripts],
        hashes=[base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts],
        charts=plain(charts),
        album=album,
        megabytes=(sum(map(len, scripts)) + album.bytes * 4 / 3) / 1e6,
        **values,
    )


def label(text: str) -> str:
    """A text within a chart, where plotly would read tags."""
    return escape(printable(text), quote=False)


def plain(value: Any) -> Any:
    """The same with null for every number that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def thinned(column: Mapping[int, float], most: int = MOST_POINTS) -> tuple[list[int], list[float]]:
    """Steps and values of a curve; of a long one the lowest and highest of each stretch, so that no spike is
    lost.
    """
    steps = sorted(column)
    if len(steps) > most:
        stretch = math.ceil(2 * len(steps) / most)
        parts = [steps[i : i + stretch] for i in range(0, len(steps), stretch)]
        chosen = {
            step
            for part in parts
            for step in (min(part, key=column.__getitem__), max(part, key=column.__getitem__))
        }
        steps = sorted(chosen | {steps[0], steps[-1]})
    return steps, [float(f"{column[step]:.6g}") for step in steps]
