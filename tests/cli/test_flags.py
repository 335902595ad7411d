"""What the command lines share: flags from a dataclass, and output that any terminal takes."""

from __future__ import annotations

import io
import logging
import sys
from dataclasses import dataclass

import pytest

from ldm.cli.flags import add_field_flag, arguments_of, log_to_terminal, one_line, path, say, script_parser, talk_safely


@dataclass
class Drink:
    """A drink.

    Args:
        name: what it is called,
            in full
        sugar_share: 0 to 100 %
        cubes: of ice
        hot: whether it is hot
    """

    name: str = ""
    sugar_share: float | None = None
    cubes: int = 3
    hot: bool = False


def test_flags_are_those_of_the_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments_of(Drink)["cubes"] == "of ice"
    parser = script_parser("Make a drink.\n  make it\n")
    for name, flag in {"name": "", "sugar_share": "", "cubes": "--ice", "hot": ""}.items():
        add_field_flag(parser, Drink, name, flag)
    options = parser.parse_strictly(["--name", "tea", "--sugar-share", "0.5", "--hot"])
    assert vars(options) == {"name": "tea", "sugar_share": 0.5, "cubes": None, "hot": True}
    assert parser.parse_strictly(["--sugar_share", "1", "--ice=2"]).cubes == 2
    for value in ("a ice", "x-hot", "..sugar-share", "l.name=b"):  # which end like flags
        assert parser.parse_strictly(["--name", value]).name == value
    for flags, sentence in {
        ("--ices", "2"): "unknown argument '--ices'; did you mean --ice?",
        ("--ice", "x"): "argument --ice: invalid int value: 'x'",
        ("--name", "\x1b[31m", "\x1b[2J\n"): "unknown argument '\\x1b[2J '; see --help",
    }.items():
        with pytest.raises(SystemExit) as ended:
            parser.parse_strictly(flags)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and sentence in error and error.count("\n") == 1 and error[:-1].isprintable()
    shown = " ".join(parser.format_help().split())
    for line in ("--name TEXT what it is called, in full", "0 to 100 %", "--ice N of ice (3)", "examples: make it"):
        assert line in shown


def test_any_terminal_takes_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(UnicodeEncodeError):
        print("größe")
    talk_safely()
    say("größe 日 \udcff \x1b[31m.png")
    screen.seek(0)
    assert screen.read() == "gr\\xf6\\xdfe \\u65e5 \\udcff \\x1b[31m.png\n"
    assert one_line("a\n  b\x07\u202e") == "a b\\x07\\u202e"


def test_log_messages_are_escaped_and_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, root = io.StringIO(), logging.getLogger()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    log_to_terminal(talkative=["talkative"])
    logging.getLogger("talkative").info("the prompt '%s'", "\x1b[31m star")
    logging.getLogger("silent").info("nothing")
    for _ in range(2):
        logging.getLogger("silent").warning("two\nlines")
    assert screen.getvalue() == "the prompt '\\x1b[31m star'\ntwo\nlines\n"


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(path(text)) for text in ("~/a", "b~", "~nobody-at-all/a")] == ["/home/me/a", "b~", "~nobody-at-all/a"]
