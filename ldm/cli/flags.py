"""What the command lines share: mistakes end with one sentence, and flags have two spellings."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Ends with exit code 2 and one sentence on standard error; an unknown flag names the nearest known one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def refuse(self, text: str, otherwise: str = "see --help", instead: str | None = None) -> NoReturn:
        """End because of the unknown argument `text`; `instead` is what says the same, where that is known."""
        known = [name for action in self._actions for name in action.option_strings]
        close = [instead] if instead else difflib.get_close_matches(text.split("=")[0], known, n=1)
        self.error(f"unknown argument '{text}'; {f'did you mean {close[0]}?' if close else otherwise}")

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

    def parse_strictly(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The options, and none that is unknown."""
        options, unknown = self.parse_known_args(argv)
        if unknown and getattr(options, "prompt", None) is not None and os.path.exists(unknown[0]):
            self.error(
                f"unknown argument '{unknown[0]}', which is a file: put the prompt in quotes, or the shell writes the "
                "names of files for a *."
            )
        if unknown:
            self.refuse(unknown[0])
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

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any, name: str) -> None:
        if getattr(options, self.dest) is not None:
            parser.error(f"{name} is given twice; {self.instead}")
        setattr(options, self.dest, value)


def add_flag(group: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """Add a flag whose long name, the last one, is taken with underscores and with hyphens."""
    long = names[-1]
    group.add_argument(*names[:-1], *dict.fromkeys((long, "--" + long[2:].replace("_", "-"))), **options)


def one_line(text: object) -> str:
    """A message as one line that a terminal shows as it is: names in files may hold control characters."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
