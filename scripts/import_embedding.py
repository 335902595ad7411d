"""Read an embedding of another program into a concept; see ldm/cli/importing.py."""

from ldm.cli.importing import run

if __name__ == "__main__":
    run()
