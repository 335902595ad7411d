"""Generate images from text; see ldm/cli/sample.py."""

from ldm.cli.sample import run

if __name__ == "__main__":
    run(editing=False)
