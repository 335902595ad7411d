"""See `ldm.page.command`."""

from ldm.page.command import __doc__ as docstring
from ldm.page.command import run

if __name__ == "__main__":
    run(docstring)
