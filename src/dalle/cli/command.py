"""The command `dalle`: each subcommand is a module with a `main` that reads the rest of the command line."""

import importlib
import sys

from dalle.cli.entry import run

COMMANDS = {
    "dashboard": ("dalle.evaluation.dashboard", "one offline page of all runs in a folder"),
    "demo": ("dalle.evaluation.demo", "the table that the demos end with"),
    "gate": ("dalle.evaluation.gate", "compares the demo's figures with recorded ones"),
    "workspace": ("dalle.training.wandb_workspace", "views of a project at W&B, made by code"),
}


def main() -> None:
    """Runs ``dalle COMMAND ...``; without one it lists them."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print("usage: dalle COMMAND ...; each COMMAND says more with --help\n")
        for command, (_, line) in COMMANDS.items():
            print(f"  {command:<11}{line}")
        sys.exit(0 if name in ("", "-h", "--help") else f"\nerror: there is no command {name!r}")
    del sys.argv[1]
    run(importlib.import_module(COMMANDS[name][0]).main)
