"""Edit an image by exchanging attention; see ldm/cli/edit.py."""

from ldm.cli.edit import run

if __name__ == "__main__":
    run()
