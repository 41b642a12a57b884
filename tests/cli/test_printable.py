"""Names that anybody may have chosen: in terminals, in plots, and on pages."""

import warnings
from base64 import b64encode
from pathlib import Path

import pytest
from webpage import parts_of

from dalle.cli import entry
from dalle.errors import UserError, printable
from dalle.evaluation import dashboard
from dalle.run_dir import Run


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", r"a\x1b[31mred"), ("a\u202egnp.exe", r"a\u202egnp.exe"), ("a\x9bb", r"a\x9bb"),
        ("\udce9", r"\udce9"), ("a\x07\x00\x7f\r", r"a\x07\x00\x7f\r"), ("a\u2066b\u2028", r"a\u2066b\u2028"),
        ("größe 一只猫 😀", "größe 一只猫 😀"), ("two\nlines", "two\nlines"),
        ("a\u200db\u00a0c", "a\u200db\u00a0c"),
    ],
)  # fmt: skip
def test_nothing_steers_a_terminal(text, shown):
    assert printable(text) == shown


def test_messages_and_warnings_are_printable(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x.py"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def main(arguments: list[str]) -> None:
        raise UserError("a\x1b]0;title\x07.png cannot be read")

    with pytest.raises(SystemExit) as ended:
        entry.run(main, [])
    assert str(ended.value) == r"error: a\x1b]0;title\x07.png cannot be read"
    assert warnings.formatwarning("a\x1b[2Jb", UserWarning, "f.py", 3) == "f.py:3: UserWarning: a\\x1b[2Jb\n"


def test_pages_of_hostile_names(tmp_path):
    """A formula, markup, and a link out of the run."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG secret")
    for name in ("a$x^$", "<script>"):
        run = tmp_path / "logs" / name
        (run / "samples").mkdir(parents=True)
        (run / "config.yaml").write_text("model: {_target_: x}\nstage: clip\n")
        (run / "metrics.csv").write_text("step,train/loss,val/loss,train/$x^$\n1,1,2,3\n2,1,2,3\n")
        (run / "samples" / "<b>step-1.png").symlink_to(secret)
        (run / "samples" / "<i>own-1.png").write_bytes(b"\x89PNG own")
    page = dashboard.make(tmp_path / "logs").read_text(encoding="utf-8")
    _, own = parts_of(page)
    assert "&lt;script" in own
    assert not [tag for tag in ("<script>", "<b>step", "<i>own") if tag in own]
    assert b64encode(b"\x89PNG own").decode() in page
    assert b64encode(secret.read_bytes()).decode() not in page
    assert list(dashboard.drawings(Run(Path(tmp_path / "logs" / "a$x^$")))) == ["<i>own"]
