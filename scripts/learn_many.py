"""Learn a concept from each of many folders of images; see ldm/many/command.py."""

import sys

from ldm.many.command import run

if __name__ == "__main__":
    sys.exit(run())
