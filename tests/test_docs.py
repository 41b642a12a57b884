"""The documentation: it builds with no broken link, and what it says of the code is so."""

import ast
import re
import subprocess
import sys

import pytest
import yaml
from tiny import ENVIRONMENT, ROOT, SECONDS

DOCS = ROOT / "docs"
MESSAGES = re.findall(
    r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="the documentation needs pip install -e '.[docs]'")
    pytest.importorskip("material", reason="the documentation needs pip install -e '.[docs]'")
    site = tmp_path / "site"
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=ROOT, env=ENVIRONMENT | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    clip = (site / "stages" / "clip.html").read_text(encoding="utf-8")
    assert "<math" in clip  # formulas are drawn, not left as TeX
    assert "arithmatex" not in clip
    samplers = (site / "configuration" / "sampler.html").read_text(encoding="utf-8")
    assert re.search(r"eta</code></td>\s*<td><code>0.0</code></td>\s*<td>a number from 0 to 1", samplers)
    for page in site.rglob("*.html"):  # it must be readable without a network
        loaded = re.findall(
            r'<(?:script|img|link rel="(?:stylesheet|icon)")[^>]*(?:src|href)="(https?://[^"]*)',
            page.read_text("utf-8"),
        )
        assert not loaded, (page, loaded)


def pages_of(entries: list) -> set[str]:
    found = set()
    for entry in entries:
        inner = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found |= pages_of(inner) if isinstance(inner, list) else {inner}
    return found


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages_of(nav) - {"configuration"} == written


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.fixture(scope="module")
def texts() -> str:
    """Every literal text of the code, those of one message side by side."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_the_troubleshooting_page_are_those_of_the_code(message, texts):
    pieces = [piece.strip(" .") for piece in message.split("...")]
    for piece in [piece for piece in pieces if len(piece) > 4]:
        assert piece in texts.replace("{{", "{").replace("}}", "}"), piece
