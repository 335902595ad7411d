"""The command `prospect`: its subcommands are the scripts of the repository, for wherever the package is installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec

import ldm
from ldm.cli.flags import Parser, say

Command = Callable[[Sequence[str]], "int | None"]
STAR = "models/demo/concepts/dotted-star.safetensors"
DEMO = ["--concept", STAR, "--preset", "material", "--prompt", "a large * heart on a black background"]


def demo(argv: Sequence[str]) -> None:
    """Generate a first image with the small model that ships.

    prospect demo
    prospect demo --seed 1-4 --outdir images
    """
    flags = {text.partition("=")[0] for text in argv}
    shown = [] if {"--prompt", "--prompts", "--from"} & flags else DEMO
    given = [*(shown if "--concept" not in flags else shown[2:]), *argv]
    _say_all(import_module("ldm.cli.sample").run(demo.__doc__, None, given, "prospect demo"))


def learn(argv: Sequence[str]) -> int:
    """Learn a concept from images; resume a run.

    The first argument may be the folder with images; without a configuration the small model learns.
    """
    given = ["-t", *argv]
    if argv and not argv[0].startswith("-") and "=" not in argv[0]:
        given = ["-t", "--data_root", *argv]
    if not {"-b", "--base", "-r", "--resume", "-h", "--help"} & {text.partition("=")[0] for text in argv}:
        given += ["--base", "demo"]
    return int(import_module("ldm.cli.train").run(given, "prospect learn"))


def learn_many(argv: Sequence[str]) -> int:
    """Learn a concept from each of many folders of images, on all cores or on a Ray cluster.

    prospect learn-many IMAGES --out CONCEPTS
    prospect learn-many concepts.csv --out CONCEPTS --workers 4 --max_steps 75
    """
    return int(import_module("ldm.many.command").run(learn_many.__doc__, argv, "prospect learn-many"))


def generate(argv: Sequence[str]) -> None:
    """Generate images from text, stage by stage, or from an image with --content.

    prospect generate --prompt "a large striped red star on the left on a navy background"
    prospect generate --concept models/demo/concepts/dotted-star.safetensors --preset material --prompt "a * heart"
    prospect generate --concept logs/…/checkpoints/embeddings.safetensors --prompt "a *" --content photo.png
    prospect generate --config sd --ckpt sd-v1-4.ckpt --prompt "*" --stages "7-9=a mug" "0-6=a blue mug"
    """
    _say_all(import_module("ldm.cli.sample").run(generate.__doc__, None, argv, "prospect generate"))


def export(argv: Sequence[str]) -> None:
    """Export learned concepts to diffusers, AUTOMATIC1111's web UI and ComfyUI.

    prospect export models/demo/concepts/dotted-star.safetensors --name star --to diffusers a1111 --preset material
    """
    _say_all(import_module("ldm.cli.export").run(export.__doc__, argv, "prospect export"))


def import_(argv: Sequence[str]) -> None:
    """Read an embedding of another program, or the files of its stages, into one concept.

    prospect import learned_embeds.bin --key "<cat-toy>" --out cat-toy.safetensors
    """
    say(import_module("ldm.cli.importing").run(import_.__doc__, argv, "prospect import"))


def push(argv: Sequence[str]) -> None:
    """Upload a concept to the Hugging Face hub, with its stage files and a model card.

    prospect push logs/…/checkpoints/embeddings.safetensors user/name --images outputs/a-42.png
    """
    _say_all(import_module("ldm.cli.push").run(push.__doc__, argv, "prospect push"))


def _say_all(paths: Sequence[object]) -> None:
    for path in paths:
        say(path)


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "learn": learn,
    "learn-many": learn_many,
    "generate": generate,
    "export": export,
    "import": import_,
    "push": push,
}
# Modules with `run(docstring, argv, prog)`, where they are there: name -> module.
OTHERS = {"invert": "ldm.cli.invert", "edit": "ldm.cli.edit", "page": "ldm.page.command"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    commands = COMMANDS | {name: _other(name, module) for name, module in OTHERS.items() if _exists(module)}
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in commands:
        return commands[given[0]](given[1:]) or 0
    parser = Parser(
        prog="prospect",
        usage="prospect COMMAND …",
        description="Personalise Stable Diffusion from one image, attribute by attribute.",
        epilog=_listing(commands),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prospect {ldm.__version__}")
    _, unknown = parser.parse_known_args(given)
    if unknown:
        parser.refuse_command(unknown[0], list(commands))
    parser.print_help()
    return 0


def _listing(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    texts = {name: command.__doc__ or import_module(OTHERS[name]).__doc__ or "" for name, command in commands.items()}
    lines = [f"  {name:{width}}  {text.partition(chr(10))[0]}" for name, text in texts.items()]
    return "\n".join(["commands (each has a --help of its own):", *lines])


def _exists(module: str) -> bool:
    return find_spec(module.rpartition(".")[0]) is not None and find_spec(module) is not None


def _other(name: str, module: str) -> Command:
    def run(argv: Sequence[str]) -> None:
        found = import_module(module)
        examples = (found.__doc__ or "").replace(f"python scripts/{name}.py", f"prospect {name}")
        _say_all(found.run(examples, argv, f"prospect {name}") or [])

    return run


if __name__ == "__main__":
    sys.exit(main())
