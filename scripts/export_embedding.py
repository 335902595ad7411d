"""Export concepts to other programs; see ldm/cli/export.py."""

from ldm.cli.export import run

if __name__ == "__main__":
    run()
