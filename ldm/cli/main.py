"""The command `prospect`: its subcommands are the scripts of the repository, for wherever the package is installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import ldm
from ldm.cli.flags import Parser

STAR = "models/demo/concepts/dotted-star.safetensors"
DEMO = ["--concept", STAR, "--preset", "material", "--prompt", "a large * heart on a black background"]


def demo(argv: Sequence[str], prog: str = "prospect demo") -> None:
    """Generate a first image with the small model that ships.

    prospect demo
    prospect demo --seed 1-4 --outdir images
    """
    given = {text.partition("=")[0] for text in argv}
    shown = [] if {"--prompt", "--prompts", "--from"} & given else DEMO[2:] if "--concept" in given else DEMO
    import_module("ldm.cli.sample").run([*shown, *argv], prog, docstring=demo.__doc__)


def learn(argv: Sequence[str], prog: str = "prospect learn") -> int:
    """Learn a concept from images; resume a run.

    The first argument may be the folder with images; without a configuration the small model learns.
    """
    given = ["-t", *argv]
    if argv and not argv[0].startswith("-") and "=" not in argv[0]:
        given.insert(1, "--data_root")
    if not {"-b", "--base", "-r", "--resume", "-h", "--help"} & {text.partition("=")[0] for text in argv}:
        given += ["--base", "demo"]
    return int(import_module("ldm.cli.train").run(given, prog))


FUNCTIONS = {"demo": demo, "learn": learn}
# Each with a docstring, whose first line describes the command, and `run(argv, prog)`.
MODULES = {
    "learn-many": "ldm.many.command",
    "generate": "ldm.cli.sample",
    "export": "ldm.cli.export",
    "import": "ldm.cli.importing",
    "push": "ldm.cli.push",
    "invert": "ldm.cli.invert",
    "edit": "ldm.cli.edit",
    "page": "ldm.page.command",
}
COMMANDS = (*FUNCTIONS, *MODULES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        name = given.pop(0)
        run = FUNCTIONS.get(name) or import_module(MODULES[name]).run
        code = run(given, f"prospect {name}")
        return code if isinstance(code, int) else 0  # most return what they have written
    described = {name: FUNCTIONS.get(name) or import_module(MODULES[name]) for name in COMMANDS}
    lines = [f"  {name:11} {str(what.__doc__).splitlines()[0]}" for name, what in described.items()]
    parser = Parser(
        prog="prospect",
        usage="prospect COMMAND …",
        description="Personalise Stable Diffusion from one image, attribute by attribute.",
        epilog="\n".join(["commands (each has a --help of its own):", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prospect {ldm.__version__}")
    _, unknown = parser.parse_known_args(given)
    if unknown:
        parser.refuse(unknown[0], "command", COMMANDS, f"there are {', '.join(COMMANDS)}.")
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
