"""Invert an image into a concept that it can be edited with; see ldm/cli/invert.py."""

from ldm.cli import invert
from ldm.cli.flags import say

if __name__ == "__main__":
    for path in invert.run(invert.__doc__):
        say(path)
