"""From a command line to resolved configurations: all that we ask of Hydra.

Of Hydra's private parts one is used, `Callbacks`: a launcher plugin is handed a `HydraContext`, which is
public and cannot be made without one. Tested with hydra-core 1.3.8; pyproject.toml allows 1.3 alone.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

import dalle
from dalle.cli.entry import check_text, check_whole, check_words, escaped, groups
from dalle.errors import UserError

VERSION = "1.3"  # of Hydra's behaviour
ALL_OF_IT = ("sample", "evaluate", "encode")  # commands that take every one of their settings, and no others


@dataclass
class Job:
    """A resolved configuration, and the command line that makes a child compose it again."""

    config: dict[str, Any]
    words: list[str]
    multirun: bool = False
    missing: str = (
        ""  # the file in which the chosen experiment would speak of this stage, where there is none
    )


def conf_dir() -> Path:
    """The configuration tree: within the package where it was installed, beside ``src`` in a checkout."""
    package = Path(dalle.__file__).resolve().parent
    for place in (package / "conf", package.parents[1] / "conf"):
        if (place / "train.yaml").is_file():
            return place
    raise UserError(f"{package} has come without its configuration (dalle/conf); install it again")


class OurConf(SearchPathPlugin):
    """Our groups can be chosen, too, where ``--config-path`` has put a user's own tree in place of ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        ours = str(conf_dir())
        if all(element.path != ours for element in search_path.get_path()):
            search_path.append("dalle", ours)


class Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --hydra-help says more")


def sources(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What of a command line says where configurations are, for children in any folder; and the rest."""
    parser = Options(add_help=False)
    for long, short in (("path", "cp"), ("name", "cn"), ("dir", "cd")):
        parser.add_argument(f"--config-{long}", f"-{short}")
    shown = [parser.add_argument("--cfg", "-c"), parser.add_argument("--package", "-p")]
    found, rest = parser.parse_known_args(list(arguments))
    given = []
    for name in ("path", "dir"):
        if place := getattr(found, f"config_{name}"):
            place = place if "://" in place else os.path.abspath(place)
            given.append(f"--config-{name}={place}")
    if found.config_name:
        given.append(f"--config-name={found.config_name}")
    options = [f"--{o.dest}={getattr(found, o.dest)}" for o in shown if getattr(found, o.dest)]
    return given, [*options, *rest]


def compose(
    command: str, arguments: Sequence[str], task: Callable[[DictConfig], Any] | None = None
) -> list[Job]:
    """The jobs of a command line: several with ``-m``, none where it asks for help or ``--cfg``.

    Args:
        command: train, sample or evaluate; it names the primary config.
        task: called in Hydra's run, with the configuration of each job.
    """
    check_text(arguments)
    given, rest = sources(escaped(arguments))
    folders = [Path(word.partition("=")[2]) for word in given if not word.startswith("--config-name")]
    choices = groups(conf_dir(), *folders)
    check_words(rest, choices)
    if command in ALL_OF_IT:
        check_whole(rest, choices)
    given_too = [word for word in rest if word.startswith("hydra.searchpath=")]
    composed: list[tuple[DictConfig, list[str], bool, str]] = []

    def collect(cfg: DictConfig) -> None:
        about = HydraConfig.get()
        if isinstance(run := OmegaConf.select(cfg, "paths.run"), str):
            cfg.paths.run = run  # may name the job, which only Hydra knows, and only now
        words = [*given, *given_too, *about.overrides.task]
        wanted = about.runtime.choices.get("experiment/stage", "")
        there = [
            Path(s.path, "experiment/stage", f"{wanted}.yaml").is_file() for s in about.runtime.config_sources
        ]
        missing = "" if any(there) or wanted.startswith("none_") else wanted
        composed.append((cfg, words, about.mode == RunMode.MULTIRUN, missing))
        if task is not None:
            task(cfg)

    Plugins.instance().register(OurConf)
    main = hydra.main(version_base=VERSION, config_path=str(conf_dir()), config_name=command)(collect)
    before = sys.argv
    program = before[0] if Path(before[0]).name == f"{command}.py" else f"dalle {command}"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own report is long; this makes it raise instead
    at = next((k for k, word in enumerate(rest) if not word.startswith("-") and "=" in word), 0)
    sys.argv = [program, *given, *rest[:at], f"hydra.job.name={command}", *rest[at:]]  # settings in one row
    try:
        main()
    finally:
        sys.argv = before
    jobs = []
    for (
        cfg,
        words,
        several,
        missing,
    ) in composed:  # not in Hydra's run, which would say more of what goes wrong
        config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        jobs.append(Job(config, words, several, missing))
    options = {word for word in rest if word.startswith("-")}
    if not jobs and options and options <= {"-m", "--multirun"}:
        raise UserError("there is nothing to do: glob(...) matches no choice")
    return jobs


def numbered(work: Callable[[int], Any], _: DictConfig) -> Any:
    """A launcher's job; at the top of a module, so that what is sent to other processes is its name."""
    return work(HydraConfig.get().job.num)


def launch(
    command: str, jobs: Sequence[list[str]], launcher: Sequence[str], work: Callable[[int], Any]
) -> list[Any]:
    """What `work` gives for the number of each job, done by one of Hydra's launchers: in parallel or on a
    cluster.

    Args:
        jobs: the words of each.
        launcher: the words that choose and set the launcher.
    """
    returned: list[Any] = []

    def task(_: DictConfig) -> None:
        name = HydraConfig.get().job.config_name
        settings = [f"hydra.job.name={command}", *overrides[0], *launcher]
        config = hydra.compose(name, settings, return_hydra_config=True)
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        plugin = Plugins.instance().instantiate_launcher(context, partial(numbered, work), config)
        returned.extend(job.return_value for job in plugin.launch(overrides, initial_job_idx=0))

    overrides = [[word for word in words if not word.startswith("--")] for words in jobs]
    compose(command, jobs[0], task)
    return returned
