"""What an offline page holds, for tests."""

import json
import re
from typing import Any

SCRIPT = re.compile(r"<script>(.*?)</script>\n", re.DOTALL)
DATA = re.compile(r'<script type="application/json" id="charts">(.*?)</script>', re.DOTALL)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def parts_of(page: str) -> tuple[list[dict[str, Any]], str]:
    """The charts, as a browser reads them, and the page without them and without the scripts."""
    (data,) = DATA.findall(page)
    assert not set(data) & set("<>&'"), "data might end its block"
    scripts = SCRIPT.findall(page)
    assert len(scripts) == 2
    assert scripts[0].lstrip().startswith("/**\n* plotly.js")
    return json.loads(data, parse_constant=refuse), SCRIPT.sub("", DATA.sub("", page))
