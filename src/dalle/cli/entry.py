"""What the entry points share: a mistake is one clear line and exit code 1, never a traceback.

What was no user's mistake is a line as well, which says so. ``debug=true`` on the command line shows where.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle.errors import UserError, instead, nearest, printable
from dalle.launch.overrides import quote
from dalle.launch.processes import REASON, STOPPED

RENAMED = {  # settings of earlier versions
    "model.net.inlet": "model.net.code_dim",
    "previews": "progress_strip",
    "prime": "init_image",
    "prime_rows": "init_rows",
}
BUG = "this is a bug in dalle, not a mistake of yours"


def run(main: Callable[[list[str]], None], arguments: Sequence[str]) -> None:
    """Calls a command and turns what a user can fix into one line on stderr."""
    shown = any(re.match(r"\+?debug=(?!none|false)", argument) for argument in arguments)
    if not any(name.startswith(("OMP_", "GOMP_")) for name in os.environ):
        # Threads spin microseconds instead of milliseconds before they leave their core to others (libgomp,
        # which reads it where torch is loaded): as fast on a quiet machine, far less slow on a busy one.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    warnings.formatwarning = warning
    told: list[signal.Signals] = []
    try:
        with stopping(told):
            main(list(map(at_home, arguments)))
    except KeyboardInterrupt:
        _leave(STOPPED)
        if not told:
            sys.exit(f"\n{STOPPED}")
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"\n{STOPPED} by {told[0].name}; files that were written are whole", file=sys.stderr)
        sys.exit(128 + told[0])
    except Exception as error:
        line = said(error)
        _leave(line if BUG not in line else f"{type(error).__name__}: {one_line(error)}")
        if shown and not getattr(error, "missing_cfg_file", None):  # nor is debug=foo one
            raise
        sys.exit(printable(f"error: {line}"))


@contextlib.contextmanager
def stopping(told: list[signal.Signals]) -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does, with all that is cleared away then; the one that
    came is added to `told`, and a second one ends it at once. A signal that somebody else answers, or that is
    to be ignored (nohup), stays as it is.
    """

    def stop(number: int, frame: Any) -> None:
        told.append(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in known if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def warning(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    """A warning's text as in Python, but without what file names in it could do to a terminal."""
    return printable(f"{filename}:{lineno}: {category.__name__}: {message}\n")


def said(error: Exception) -> str:
    """The line for whatever has gone wrong."""
    if _is_users(error):
        return one_line(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, MemoryError) or re.search(r"OutOfMemoryError|can't allocate memory", text):
        return f"not enough memory ({text[:120]}); a smaller batch_size, picture or network needs less"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RecursionError):
        return "a setting refers to itself"
    if "Could not determine home directory" in text:  # of `Path.expanduser`
        return "a path begins with ~ and the name of nobody here; give the whole path"
    return f"{BUG}: {text} (debug=true shows where); please report it with the command"


def groups(*folders: Path) -> dict[str, list[str]]:
    """The config groups in one or several trees, and the choices of each."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.glob("*/**/*.yaml"):
            found.setdefault(path.parent.relative_to(folder).as_posix(), set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def check_words(arguments: Sequence[str], choices: Mapping[str, list[str]]) -> None:
    """Refuses what Hydra takes without doing what it says, and what it cannot take.

    Raises:
        UserError: a group without a choice, or with several where they are alternatives; a setting to ``{}``,
            which leaves it as it is.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        value = value.strip()
        if key in choices and re.fullmatch(r"[-+]?(\d[\w.+-]*|nan|inf)|true|false|null|None|~|", value, re.I):
            raise UserError(f"{argument}: choose one of {', '.join(choices[key])}")
        if key in choices and value.startswith(("[", "{")) and key not in ("callbacks", "logger"):
            raise UserError(f"{argument}: {key} is one of {', '.join(choices[key])}, not several at once")
        if re.fullmatch(r"\{\s*\}", value) and not key.startswith(("+", "~")):
            raise UserError(f"{argument} leaves {key} as it is; name what is to change in it")


def check_text(arguments: Sequence[str]) -> None:
    """Refuses names of files whose bytes are no UTF-8: a run whose settings hold one could be written, but
    never read again. Prompts are looked at where they are read.

    Raises:
        UserError: naming the word.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            if not argument.lstrip("+").startswith("prompt="):
                raise UserError(
                    f"{argument}: this is no text in UTF-8, as settings that are kept with a run must be; "
                    "rename the file or folder, or give a link to it"
                ) from None


def check_whole(arguments: Sequence[str], choices: Collection[str]) -> None:
    """Refuses settings that are taken away from, or added to, those that a command has; but for groups, and
    for parts of sources and samplers, of which some have others.

    Raises:
        UserError: naming the setting.
    """
    for argument in arguments:
        key = argument.partition("=")[0]
        name = key.lstrip("+~")
        if name.startswith(("hydra", "data.", "sampler.")) or "@" in name or "/" in name:
            continue
        if key.startswith("~"):
            raise UserError(f"{name} is needed: do not take it away")
        if re.match(r"\+(?!\+)", key) and "." not in name and name not in choices:
            raise UserError(f"there is no setting {name}")


def _leave(reason: str) -> None:
    """Tells a sweep that has started this process why it ends; of several processes the first counts."""
    if path := os.environ.get(REASON):
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            file.write(printable(reason))


def at_home(argument: str) -> str:
    """A setting with `~` in front of a path as a shell would have it, which looks in front of words alone."""
    key, equals, value = argument.partition("=")
    if key.lstrip("+") == "prompt" or not (home := os.path.expanduser("~")).startswith("/"):
        return argument
    return key + equals + re.sub(r"""(?<![^,\["'])~(?=/)""", lambda _: home, value)


def escaped(arguments: Sequence[str]) -> list[str]:
    """A command line as Hydra is to read it: once more, it stays as it is."""
    plain = {"debug=true": "debug=traceback", "debug=false": "debug=none"}  # `debug` is a config group
    words = [plain.get(argument, quoted(today(argument))) for argument in arguments]
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # argparse wants them together


def today(argument: str) -> str:
    """A setting by its name of today; one of an earlier version is said to be one."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if name not in RENAMED:
        return argument
    print(printable(f"note: {name} is called {RENAMED[name]} now"), file=sys.stderr)
    return f"{key.removesuffix(name)}{RENAMED[name]}{equals}{value}"


def quoted(argument: str) -> str:
    """A prompt is plain text, and so is a pattern of files: commas, quotes, braces in it are not Hydra's;
    and a name may be a number.

    Lists, and values that are quoted as a whole, stay as they are.
    """
    key, equals, value = argument.partition("=")
    if key == "name":  # of one run, or of several jobs
        return key + equals + re.sub(r"(?<![^,])[-+]?\.?\d[\w.+-]*(?![^,])", r"'\g<0>'", value)
    files = r"data\.(sources\.[^.]+\.)?((val_|test_)?shards|path)"
    pattern = re.fullmatch(files, key.lstrip("+")) and "{" in value
    if not (key.lstrip("+") == "prompt" or pattern) or not equals or value in ("", "null"):
        return argument
    if len(value) > 1 and value[0] + value[-1] in ("[]", "''", '""'):
        return argument
    return f"{key}={quote(value)}"


def _is_users(error: Exception) -> bool:
    """Hydra raises plain ValueErrors, too, for what is written on a command line."""
    if isinstance(error, UserError) or type(error).__module__.startswith(("hydra.", "omegaconf.")):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith(("hydra.", "omegaconf."))


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
        more = "; pip install 'dalle[sweeps]' brings others" if group == "hydra/launcher" else ""
        return f"there is no {group}={name}{instead(name, facts['options'] or [], group + '=')}{more}"
    if key and re.match(r"Key '.*' (is )?not in ", str(facts.get("msg"))):
        return f"there is no setting {key}{_settings(key, facts['parent_node'])}"
    if several := re.search(r"Ambiguous value for argument '(.*?)'", message):
        return f"{several[1]}: several values are several jobs; say so with -m"
    if key and "Missing mandatory value" in message:
        return f"{key} is needed: give it as {key}=VALUE"
    if "sweep type" in message and "INTERVAL" in message:
        return "interval(...) is for searches; give the values themselves: key=1,2 or key=range(1,4)"
    if merged := re.match(r"Error merging override \+*(.*?)=", message):
        return f"{merged[1]} is a group of settings; give each as {merged[1]}.NAME=VALUE"
    return re.sub(r" (To append to your|See https?:|full_key:|Config search path:) ?.*", "", message)


def _settings(key: str, node: Any) -> str:
    """What a setting that `node` does not have may have meant: a group (``model/nte``), the same name deeper
    in it (``lr``), or a neighbour; one that only refers to settings elsewhere is empty, so they are meant.
    """
    place, dot, wrong = key.rpartition(".")
    if not node and hasattr(node, "_get_root"):
        paths = [path for path in _paths(node._get_root()) if "." in path and not path.startswith(place)]
        near = nearest(wrong, {path.rpartition(".")[2] for path in paths})
        there = [path for path in paths if path.rpartition(".")[2] in near]
        there = [path for path in there if path.startswith(f"{place.rpartition('.')[2]}.")] or there
        return instead(
            wrong, [], "", [p for p in there if p.count(".") == min(t.count(".") for t in there)][:3]
        )
    paths = _paths(node or {})
    if "/" in wrong:
        groups = [path.replace(".", "/") for path in paths if path.count(".") == wrong.count("/")]
        meant = nearest(wrong, groups)
    else:
        same = [path for path in paths if path.endswith("." + wrong)]
        meant = [path for path in same if path.count(".") == min(p.count(".") for p in same)]
    return instead(wrong, [path for path in paths if "." not in path], place + dot, meant[:3])


def _paths(node: Mapping[str, Any]) -> list[str]:
    """Every setting in a config, by its dotted path."""
    found = []
    for name in node:
        if name.startswith("_") or name == "hydra":
            continue
        found.append(name)
        try:
            value = node[name]
        except Exception:  # not given yet, or about something that is not known yet
            continue
        if isinstance(value, Mapping):
            found += [f"{name}.{path}" for path in _paths(value)]
    return found
