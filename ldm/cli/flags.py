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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ldm.files.shipped import shipped

# `name: what it is`, with the lines that continue it, in the Args of a docstring
_ARGUMENT = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
# Flags of earlier versions, and what says the same.
REPLACED = {"--word": ["--stages '0=TEXT'"], "--words": ["--stages '0=TEXT', or --prompts FILE"]}
_ENDLESS = re.compile(r"(\S{300})\S+")
# What `add_argument` is given for a field, by its annotation.
_KINDS: dict[str, dict[str, Any]] = {
    "int": {"metavar": "N", "type": int},
    "float": {"metavar": "X", "type": float},
    "str": {"metavar": "TEXT"},
    "bool": {"action": "store_const", "const": True},
}
TALKATIVE = ("ldm.conditioning.presets", "ldm.cli.invert")  # loggers of which commands show INFO
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Ends with exit code 2 and one sentence on standard error; hyphens in flags' names are underscores, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def refuse(
        self, text: str, what: str = "argument", known: Iterable[str] = (), otherwise: str = "see --help"
    ) -> NoReturn:
        """End because of an unknown argument, or command, and name the nearest known one."""
        name = text.partition("=")[0]
        close = REPLACED.get(name) or difflib.get_close_matches(name, known or self._option_string_actions, n=1)
        self.error(f"unknown {what} '{text}'; {f'did you mean {close[0]}?' if close else otherwise}")

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

    def run(self, work: Callable[[argparse.Namespace], list[T]], argv: Sequence[str] | None) -> list[T]:
        """Do what the flags (None: the program's own) ask for, print a line for each result, and return these."""
        options = self.parse_strictly(argv)
        log_to_terminal(talkative=TALKATIVE)
        with self.sentences(getattr(options, "debug", False)):
            results = work(options)
        for result in results:
            say(result)
        return results

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        talk_safely()  # before --help
        return super().parse_known_args(self.underscored(args), namespace)

    def underscored(self, args: Sequence[str] | None) -> list[str]:
        """Return the flags (None: the program's own) with underscores in names where such a flag is known."""
        known = self._option_string_actions

        def spelled(text: str) -> str:
            name, sign, value = text.partition("=")
            other = re.sub(r"(?<=[^-])-", "_", name)
            return other + sign + value if text not in known and other in known else text

        return [spelled(text) for text in (sys.argv[1:] if args is None else args)]

    def parse_strictly(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the options, and refuse unknown ones."""
        options, unknown = self.parse_known_args(argv)
        if unknown and getattr(options, "prompt", None) is not None and os.path.exists(unknown[0]):
            reason = "put the prompt in quotes, or the shell writes the names of files for a *"
            self.error(f"unknown argument '{unknown[0]}', which is a file: {reason}.")
        if unknown:
            self.refuse(unknown[0])
        return options


def script_parser(docstring: str | None, prog: str | None = None) -> Parser:
    """Return the parser of a command that has no flags yet.

    Args:
        docstring: its first line describes the command, the others are examples.
        prog: how the command was called, where that is not as in the examples: `prospect edit`.
    """
    summary, _, examples = inspect.cleandoc(docstring or "").partition("\n")
    if prog is not None:
        examples = re.sub(r"python (scripts/)?\w+\.py", prog, examples)
    return Parser(
        prog=prog,
        description=summary,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples.strip("\n")), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_field_flag(
    group: argparse._ActionsContainer, kind: type[Any], name: str, flag: str = "", **options: Any
) -> None:
    """Add the flag of a dataclass's field: the annotation gives its type, the docstring and the default its help.

    A flag that is not given is None, so that defaults stay the dataclass's own.

    Args:
        kind: the dataclass.
        flag: where it is not called like the field.
        options: for `add_argument`, in place of what the field gives.
    """
    field = kind.__dataclass_fields__[name]
    text = " ".join(arguments_of(kind)[name].split()).replace("%", "%%")
    if type(field.default) in (str, float, int) and field.default != "":
        text += f" ({field.default})"
    of_kind = _KINDS.get(str(field.type).partition(" | ")[0], {})
    group.add_argument(flag or f"--{name}", **{"dest": name, "help": text, **of_kind, **options})


def arguments_of(kind: type) -> dict[str, str]:
    """Return what the `Args` of a docstring say: {name: text}."""
    return dict(_ARGUMENT.findall(inspect.cleandoc(kind.__doc__ or "")))


# --- values ----------------------------------------------------------------------------------------------------


def natural(text: str, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least {least}")
    return int(text)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return natural(text, 1)


def path(text: str) -> Path:
    """A path as the shell means it: `~` is the home folder, also behind a `=`."""
    return Path(os.path.expanduser(text))


def input_path(text: str) -> Path:
    """A path that is read; what ships is found by its name in the checkout, from any folder."""
    return Path(shipped(text))


def check_paths(paths: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Raise `ValueError` for a path that leads nowhere, before the time is spent to load PyTorch; {flag: paths}."""
    for flag, file in ((flag, file) for flag, given in paths.items() for file in given if file is not None):
        if not os.path.exists(os.path.expanduser(file)):
            near = difflib.get_close_matches(Path(file).name, [p.name for p in Path(file).parent.glob("*")], n=1)
            hint = f"did you mean '{Path(file).with_name(near[0])}'?" if near else "check the path."
            raise ValueError(f"There is no file '{file}', given with {flag}; {hint}")


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
    """Write log messages to standard error; of `talkative` loggers also INFO, and then no message twice."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    handler.addFilter(lambda record: record.levelno >= level or record.name in talkative)
    if talkative:
        shown: dict[str, logging.LogRecord] = {}
        handler.addFilter(lambda record: shown.setdefault(record.getMessage(), record) is record)
    logging.basicConfig(level=min(level, logging.INFO) if talkative else level, handlers=[handler])
