"""Edit an image by exchanging attention; see ldm/cli/edit.py."""

from ldm.cli import edit
from ldm.cli.flags import say

if __name__ == "__main__":
    for path in edit.run(edit.__doc__):
        say(path)
