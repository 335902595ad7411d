"""Invert an image into a concept that it can be edited with; see ldm/cli/invert.py."""

from ldm.cli.invert import run

if __name__ == "__main__":
    run()
