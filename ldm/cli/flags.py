"""What the command lines share: flags from a dataclass, one-sentence errors, output that any terminal takes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import io
import logging
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from ldm.files.shipped import shipped

# `name: what it is`, with the lines that continue it, in the Args of a docstring
_ARGUMENT = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_ENDLESS = re.compile(r"(\S{300})\S+")
# Flags of earlier versions, and what says the same.
REPLACED = {"--word": "--stages '0=TEXT'", "--words": "--stages '0=TEXT', or --prompts FILE"}
# Metavar and type of a field's flag, by the field's annotation.
_KINDS: dict[str, tuple[str, Any]] = {"int": ("N", int), "float": ("X", float), "str": ("TEXT", str)}


class Parser(argparse.ArgumentParser):
    """Ends with exit code 2 and one sentence on standard error; an unknown flag names the nearest known one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def refuse(self, text: str, otherwise: str = "see --help", instead: str | None = None) -> NoReturn:
        """End because of the unknown argument `text`; `instead` is what says the same, where that is known."""
        known = [name for action in self._actions for name in action.option_strings]
        close = [instead] if instead else difflib.get_close_matches(text.split("=")[0], known, n=1)
        self.error(f"unknown argument '{text}'; {f'did you mean {close[0]}?' if close else otherwise}")

    def refuse_command(self, text: str, commands: Sequence[str]) -> NoReturn:
        """End because of an unknown subcommand."""
        close = difflib.get_close_matches(text, commands, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(commands)}."
        self.error(f"unknown command '{text}'; {hint}")

    @contextlib.contextmanager
    def sentences(self, debug: bool = False) -> Iterator[None]:
        """End with the sentence of an error that a user can mend; any other is a defect and shows its trace.

        Ctrl-C ends with exit code 130 and the sentence that it carries, if it does.
        """
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            if debug:
                raise
            self.error(str(error))
        except KeyboardInterrupt as stop:
            self.exit(130, f"{self.prog}: {one_line(stop) or 'stopped by Ctrl-C'}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        talk_safely()  # before --help
        args = self.underscored(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def underscored(self, args: Sequence[str]) -> list[str]:
        """Write the hyphens in flags' names as underscores where such a flag is known."""
        known = {name for action in self._actions for name in action.option_strings}
        parts = [text.partition("=") for text in args]
        names = [re.sub(r"(?<=[^-])-", "_", name) for name, _, _ in parts]
        return [
            name + sign + value if text not in known and name in known else text + sign + value
            for name, (text, sign, value) in zip(names, parts, strict=True)
        ]

    def parse_strictly(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the options, and refuse unknown ones."""
        options, unknown = self.parse_known_args(argv)
        if unknown and getattr(options, "prompt", None) is not None and os.path.exists(unknown[0]):
            self.error(
                f"unknown argument '{unknown[0]}', which is a file: put the prompt in quotes, or the shell writes the "
                "names of files for a *."
            )
        if unknown:
            self.refuse(unknown[0], instead=REPLACED.get(unknown[0].split("=")[0]))
        return options


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return int(text)


class Once(argparse.Action):
    """A flag that is refused when it is given again; `instead` says what to do."""

    def __init__(self, *names: Any, instead: str, **options: Any) -> None:
        super().__init__(*names, **options)
        self.instead = instead

    def __call__(
        self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any, name: Any = None
    ) -> None:
        if getattr(options, self.dest) is not None:
            parser.error(f"{name} is given twice; {self.instead}")
        setattr(options, self.dest, value)


def script_parser(docstring: str | None, prog: str | None = None) -> Parser:
    """Return the parser of a script: the first line of its docstring describes it, the others are examples."""
    summary, _, examples = inspect.cleandoc(docstring or "").partition("\n")
    return Parser(
        prog=prog,
        description=summary,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples.strip("\n")), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_flag(group: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """Add a flag of a `Parser`, which takes its name with underscores and with hyphens."""
    group.add_argument(*names, **options)


def add_field_flag(group: argparse._ActionsContainer, kind: type, name: str, flag: str = "", **options: Any) -> None:
    """Add the flag of a dataclass's field: the annotation gives its type, the docstring and the default its help.

    A flag that is not given is None, so that defaults stay the dataclass's own.

    Args:
        kind: the dataclass.
        flag: where it is not called like the field.
        options: for `add_argument`, in place of what the field gives.
    """
    field = next(field for field in fields(kind) if field.name == name)
    help_text = " ".join(arguments_of(kind)[name].split()).replace("%", "%%")
    if isinstance(field.default, (str, float, int)) and not isinstance(field.default, bool) and field.default != "":
        help_text += f" ({field.default})"
    given: dict[str, Any] = {"dest": name, "help": help_text}
    annotation = str(field.type).partition(" | ")[0]
    if annotation == "bool":
        given |= {"action": "store_const", "const": True}
    elif annotation in _KINDS:
        given |= dict(zip(("metavar", "type"), _KINDS[annotation], strict=True))
    add_flag(group, flag or f"--{name}", **(given | options))


def arguments_of(kind: type) -> dict[str, str]:
    """Return what the `Args` of a docstring say: {name: text}."""
    return dict(_ARGUMENT.findall(inspect.cleandoc(kind.__doc__ or "")))


def check_paths(paths: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Raise `ValueError` for a path that leads nowhere, before the time is spent to load PyTorch; {flag: paths}."""
    for flag, given in paths.items():
        for file in given:
            if file is not None and not os.path.exists(os.path.expanduser(file)):
                beside = [other.name for other in Path(file).parent.glob("*")]
                near = difflib.get_close_matches(Path(file).name, beside, n=1)
                hint = f"did you mean '{Path(file).with_name(near[0])}'?" if near else "check the path."
                raise ValueError(f"There is no file '{file}', given with {flag}; {hint}")


def path(text: str) -> Path:
    """A path as the shell means it: `~` is the home folder, also behind a `=`."""
    return Path(os.path.expanduser(text))


def input_path(text: str) -> Path:
    """A path that is read; what ships is found by its name in the checkout, from any folder."""
    return Path(shipped(text))


# --- output ----------------------------------------------------------------------------------------------------


def talk_safely() -> None:
    """Escape on standard output and error what the terminal's encoding does not have, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: object) -> None:
    """Print a line that may hold names from files or from the user."""
    print(printable(str(text)), flush=True)


def printable(text: str) -> str:
    """Return a text with control characters escaped, line breaks and tabs aside."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: object) -> str:
    """Return a message as one line that a terminal shows as it is; of endless words in files only the beginning."""
    return _ENDLESS.sub(r"\1…", printable(" ".join(str(text).split())))


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_terminal(level: int = logging.WARNING, talkative: Collection[str] = ()) -> None:
    """Write log messages to standard error.

    Args:
        talkative: loggers of which INFO is shown, too; no message is then shown twice, as for each of many images.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    handler.addFilter(lambda record: record.levelno >= level or record.name in talkative)
    if talkative:
        shown: dict[str, logging.LogRecord] = {}
        handler.addFilter(lambda record: shown.setdefault(record.getMessage(), record) is record)
    logging.basicConfig(level=min(level, logging.INFO) if talkative else level, handlers=[handler])
