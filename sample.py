"""Pictures from trained stages: `python sample.py prompt=...`, the same as `dalle sample prompt=...`."""

import sys

from dalle.cli.command import run

if __name__ == "__main__":
    run("sample", sys.argv[1:])
