"""Trains one stage: `python train.py model=prior ...`, the same as `dalle train model=prior ...`."""

import sys

from dalle.cli.command import run

if __name__ == "__main__":
    run("train", sys.argv[1:])
