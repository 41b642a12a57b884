"""The command `dalle`: each subcommand is a module with a `main` that takes the rest of the command line."""

import importlib
import os
import re
import sys
from collections.abc import Sequence

from dalle import __version__
from dalle.cli import entry
from dalle.errors import instead

COMMANDS = {
    "train": ("dalle.cli.train", "trains a stage, and first what it needs; -m: several, sweeps, searches"),
    "sample": ("dalle.cli.sample", "pictures from trained stages, with the recipe that makes them again"),
    "evaluate": ("dalle.cli.evaluate", "figures of trained stages or of pictures; -m: several in one report"),
    "data": ("dalle.cli.data", "check PATH: what pictures and captions are there, and the settings to use"),
    "import": ("dalle.cli.import_weights", "public weights (OpenAI's CLIP ...) as a finished run"),
    "export": ("dalle.cli.export_weights", "a run as a folder for open_clip, transformers, diffusers"),
    "push": ("dalle.cli.push", "a run to the Hugging Face hub, with a model card"),
    "pull": ("dalle.cli.pull", "a run from there"),
    "encode": ("dalle.cli.encode", "embeddings, codes or latents of data, as shards to train from"),
    "costs": ("dalle.cli.costs", "memory and time of a training on machines that are not here"),
    "dashboard": ("dalle.evaluation.dashboard", "one offline page of all runs in a folder"),
    "demo": ("dalle.evaluation.demo", "the table that the demos end with"),
    "gate": ("dalle.evaluation.gate", "compares the demo's figures with recorded ones"),
    "workspace": ("dalle.training.wandb_workspace", "views of a project at W&B, made by code"),
}
SETTINGS = ("train", "sample", "evaluate")  # whose words are Hydra's


def main() -> None:
    """Runs ``dalle COMMAND ...``; without one it lists them."""
    name, *arguments = sys.argv[1:] or [""]
    if name in COMMANDS:
        run(name, arguments)
    elif name in ("", "-h", "--help"):
        print("usage: dalle COMMAND ...; each COMMAND says more with --help\n")
        for command, (_, line) in COMMANDS.items():
            print(f"  {command:<11}{line}")
    elif name in ("-sc", "--shell-completion"):
        complete(arguments)
    elif name == "--version":
        print(f"dalle {__version__}")
    else:
        sys.exit(f"error: there is no command {name!r}{instead(name, COMMANDS, 'dalle ')}")


def complete(arguments: Sequence[str]) -> None:
    """Hydra's completion, ``eval "$(dalle -sc install=bash)"``: of a subcommand, or of its settings."""
    typed = re.match(rf"\s*\S+\s+({'|'.join(SETTINGS)})\s(.*)", os.environ.get("COMP_LINE", ""), re.DOTALL)
    if typed:
        os.environ["COMP_LINE"] = f"dalle {typed[2]}"  # as if the subcommand were the program
    if typed or not arguments or not arguments[0].startswith("query="):
        run(typed[1] if typed else "train", ["-sc", *arguments])
    else:
        print(" ".join(COMMANDS))


def run(name: str, arguments: Sequence[str]) -> None:
    """Runs a subcommand."""
    # The user's own code, in the folder in which they are: last, so that it hides nobody else's
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    entry.run(importlib.import_module(COMMANDS[name][0]).main, arguments)
