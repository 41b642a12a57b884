"""What mkdocs makes of the documentation beyond its files: the configuration's reference, and formulas.

The reference is read from `conf/` and from the signatures and docstrings of the classes that it names, at
every build: what a setting is, which values it takes and what it is where nothing is given stands in one
place, the code. Formulas become MathML, which browsers draw by themselves: the site needs no network.
"""

import html
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
sys.path.insert(0, str(ROOT / "src"))  # of this tree, whatever is installed

from dalle.ranges import describe  # noqa: E402

COMMANDS = {"train": "Training", "sample": "Sampling", "evaluate": "Evaluation", "encode": "Encoding"}
GROUPS = {  # in the order of the site; what is not here follows
    "model": "Stages", "model/datamodule": "DataModules of a stage",
    "model/net": "Networks of a stage", "data": "Pictures and captions",
    "clip": "Frozen CLIPs",
    "tokenizer": "Tokenizers of captions", "image_tokenizer": "Image tokenizers", "optimizer": "Optimizers",
    "sampler": "Samplers", "precision": "Precision", "trainer": "Trainers", "callbacks": "Callbacks",
    "logger": "Loggers", "pipeline": "Pipelines", "experiment": "Experiments", "debug": "Finding mistakes",
    "hparams_search": "Hyperparameter search", "paths": "Paths", "hydra": "Hydra",
}  # fmt: skip
GIVEN = ("self", "split", "denoise", "x", "levels", "randn", "on_step")  # by code, not by configurations
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Puts the pages that are made here into the navigation."""
    pages = [{title: f"configuration/{name}.md"} for name, (title, _) in pages_of_reference().items()]
    for entry in config["nav"]:
        if entry.get("Configuration") == "configuration":
            entry["Configuration"] = ["configuration/index.md", *pages]
    return config


def on_files(files: Any, config: Any) -> Any:
    pages = pages_of_reference()
    files.append(File.generated(config, "configuration/index.md", content=overview(pages)))
    for name, (_, content) in pages.items():
        files.append(File.generated(config, f"configuration/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Paths of the repository are no pages of the site."""
    return re.sub(r"\[([^\]]*)\]\(\.\./((?:\.\./)*)(\w[\w./-]*\.(?:md|py|yaml|cff))\)", outside, markdown)


def outside(link: re.Match) -> str:
    return f"`{link[3]}`" if (ROOT / link[3]).exists() and not (ROOT / "docs" / link[3]).exists() else link[0]


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """TeX, as arithmatex leaves it, to MathML."""

    def drawn(found: re.Match) -> str:
        display = "inline" if found["kind"] == "(" else "block"
        return convert(html.unescape(found["tex"]).strip(), display=display)

    return FORMULA.sub(drawn, content)


# The reference


def pages_of_reference() -> dict[str, tuple[str, str]]:
    """Title and text of each page, by its name."""
    found = {name: (title, command(name, title)) for name, title in COMMANDS.items()}
    there = {path.parent.relative_to(CONF).as_posix() for path in CONF.glob("*/**/*.yaml")}
    groups = [name for name in GROUPS if name in there] + sorted(there - GROUPS.keys())
    for name in groups:
        files = sorted((CONF / name).glob("*.yaml"))
        title = GROUPS.get(name, f"{name}=")
        found[name.replace("/", "_")] = (title, group(name, title, files))
    return found


def overview(pages: dict[str, tuple[str, str]]) -> str:
    lines = [
        "# Configuration",
        "",
        "Made from `conf/` and from the signatures of the classes that it names: what this version does.",
        "`python train.py --cfg job model=decoder` prints every setting and its value, and runs nothing.",
        "",
        "- `group=choice` takes a file of a group: `model=prior`, `sampler=dpmpp`.",
        "- `a.b=value` sets one value: `optimizer.lr=1e-4`. `+a.b=value` adds one that no file names.",
        "- A misspelt setting is refused, and the message names the nearest ones.",
        "",
        "| page | |",
        "|---|---|",
    ]
    for name, (title, text) in pages.items():
        first = next((line for line in text.splitlines()[1:] if line), "")
        first = re.sub(r"\[(`\w+`)\]\(#\w+\)", r"\1", first)  # anchors of that page
        lines.append(f"| [{title}]({name}.md) | {first} |")
    return "\n".join([*lines, ""])


def command(name: str, title: str) -> str:
    source = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    typed = "dalle encode KIND" if name == "encode" else f"python {name}.py"
    lines = [
        f"# {title}",
        "",
        f"The settings at the top of `{typed}`; those of its groups are on the groups' pages.",
        "",
    ]
    return "\n".join([*lines, *header(source), "", *chosen(source), "", *table(source), ""])


def group(name: str, title: str, files: list[Path]) -> str:
    several = ", ".join(f"[`{path.stem}`](#{path.stem})" for path in files)
    lines = [f"# {title}", "", f"`{name}=` is one of {several}.", ""]
    for path in files:
        source = path.read_text(encoding="utf-8")
        lines += [f"## `{name}={path.stem}` {{ #{path.stem} }}", "", *header(source), "", *docs(source)]
        lines += ["", *chosen(source), "", *table(source), ""]
    return "\n".join(lines)


def header(source: str) -> list[str]:
    """The comment at the top of a file, as paragraphs; commands in it as code."""
    paragraphs: list[list[str]] = [[]]
    for line in source.splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        if text.startswith("@package"):
            continue
        if text:
            paragraphs[-1].append(text)
        else:
            paragraphs.append([])
    said = [" ".join(words) for words in paragraphs if words]
    said = [re.sub(r"^(python \S+\.py [^:]*?)( : |$)", r"`\1`\2", text) for text in said]
    return [line for text in said for line in (escaped(text), "")]


def docs(source: str) -> list[str]:
    """The first sentence of the docstrings of the classes that a file builds."""
    lines = []
    for target in dict.fromkeys(re.findall(r"_target_: (\S+)", source)):
        made = named(target)
        if made is not None and target.startswith("dalle."):
            first = (inspect.getdoc(made) or "").split("\n\n")[0]
            lines.append(f"- `{target}`: {escaped(' '.join(first.split()))}")
    return lines


def chosen(source: str) -> list[str]:
    """What a file takes from others before it says anything itself."""
    loaded = yaml.safe_load(source) or {}
    taken = [d for d in loaded.get("defaults", []) if d != "_self_"]
    words = []
    for default in taken:
        if isinstance(default, str):
            words.append(f"`{default}`")
        else:
            words += [
                f"`{key.replace('override /', '').replace('optional ', '')}={value}`"
                for key, value in default.items()
            ]
    return [f"Begins with {', '.join(words)}."] if words else []


def table(source: str) -> list[str]:
    rows = list(settings(source))
    if not rows:
        return ["It sets nothing."]
    lines = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for path, value, values, said in rows:
        lines.append(f"| `{path}` | {code(value)} | {escaped(values)} | {escaped(said)} |")
    return lines


def code(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "needed"
    text = str(value) if isinstance(value, str) else plain(value)
    return f"`{text}`".replace("|", "\\|") if text else '`""`'


def plain(value: Any) -> str:
    """A value as it is written in YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def escaped(text: str) -> str:
    """Free text for a Markdown table: signs that would mean something are taken as they are."""
    pieces = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([*_<>\[\]])", r"\\\1", pieces[i])
    return "".join(pieces).replace("|", "\\|")


def settings(source: str) -> Iterator[tuple[str, Any, str, str]]:
    """(path, default, values, what is said of it) of every setting of a file, and of every argument of the
    classes it names that the file leaves as it is."""
    node = yaml.compose(source)
    lines = source.splitlines()
    if isinstance(node, yaml.MappingNode):
        yield from below(node, lines, "")


def below(node: yaml.MappingNode, lines: list[str], place: str) -> Iterator[tuple[str, Any, str, str]]:
    keys = {key.value: (key, value) for key, value in node.value}
    target = keys["_target_"][1].value if "_target_" in keys else None
    signature = arguments(target) if target else {}
    if target == "dalle.diffusion.samplers.Sampler":  # its options are those of its method
        signature |= arguments(f"dalle.diffusion.samplers.{keys['method'][1].value}")
    told = args_of_docstring(target) if target else {}
    for name, (key, value) in keys.items():
        if name in ("_target_", "_partial_") or (name == "defaults" and not place):
            continue
        path = f"{place}{name}"
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from below(value, lines, f"{path}.")
            continue
        line = lines[key.start_mark.line]
        comment = re.search(r"\s#\s*(.*)$", line)
        hint = signature.get(name)
        values = describe(hint.annotation) if hint and hint.annotation is not hint.empty else ""
        raw = (
            yaml.safe_load(line[value.start_mark.column :].split(" #")[0])
            if value.start_mark.line == key.start_mark.line
            else None
        )
        if isinstance(value, yaml.ScalarNode) and value.tag.endswith(":str"):
            raw = value.value
        yield path, raw, values, comment[1] if comment else told.get(name, "")
    for name, parameter in signature.items():
        if name not in keys and parameter.default is not parameter.empty:
            default = parameter.default
            if default is None or isinstance(default, bool | int | float | str | list | tuple):
                shown = list(default) if isinstance(default, tuple) else default
                values = describe(parameter.annotation) if parameter.annotation is not parameter.empty else ""
                yield f"{place}{name}", shown, values, told.get(name, "")


def named(target: str) -> Any:
    """The class or function of a `_target_`, None where its package is not installed."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    return None


def arguments(target: str) -> dict[str, inspect.Parameter]:
    """The arguments a configuration may give to a class or function, with resolved annotations."""
    made = named(target)
    if made is None or not target.startswith("dalle."):  # others have documentation of their own
        return {}
    call = made.__init__ if inspect.isclass(made) else made
    try:
        hints = typing.get_type_hints(call, include_extras=True)
        found = inspect.signature(made).parameters
    except (TypeError, ValueError, NameError):
        return {}
    kept = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter.replace(annotation=hints.get(name, inspect.Parameter.empty))
        for name, parameter in found.items()
        if parameter.kind in kept and name not in GIVEN
    }


def args_of_docstring(target: str) -> dict[str, str]:
    """What a docstring's `Args:` say, by name; `a, b:` holds for both."""
    text = inspect.getdoc(named(target)) or ""
    found: dict[str, str] = {}
    if "Args:" not in text:
        return found
    block = text.split("Args:", 1)[1].split("\n\n")[0]
    for names, said in re.findall(r"\n    (\w[\w, ]*): ((?:.|\n(?=        ))*)", "\n" + block.strip("\n")):
        for name in names.split(", "):
            found[name] = " ".join(said.split())
    return found
