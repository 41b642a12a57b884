"""`python -m dalle ...` is the command `dalle ...`."""

from dalle.cli.command import main

if __name__ == "__main__":
    main()
