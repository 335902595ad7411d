"""Open the page in a browser; see ldm/page/command.py."""

from ldm.page.command import run

if __name__ == "__main__":
    run()
