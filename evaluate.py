"""Figures of trained stages: `python evaluate.py name=demo`, the same as `dalle evaluate name=demo`."""

import sys

from dalle.cli.command import run

if __name__ == "__main__":
    run("evaluate", sys.argv[1:])
