"""Texts and tables that users and strangers write, and names of files that come from them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Collection
from pathlib import Path

MAX_BYTES = 4 << 20
MAX_NAME = 100  # bytes
# Windows takes these for devices, whatever ending follows.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_NAME = re.compile(r'\w(?:[^/\\:*?"<>|]*[^/\\:*?"<>|. ])?')


def no_file(path: str | Path, what: str = "file") -> str:
    """Return that there is no file (called `what`) at a path, but a folder or a device, or nothing; '' for a file."""
    if os.path.isfile(path):  # unlike pathlib's, no error for a name that is too long
        return ""
    kind = "folder" if os.path.isdir(path) else "device" if os.path.exists(path) else ""
    return f"'{path}' is a {kind} and no {what}" if kind else f"There is no {what} '{path}'"


def read_text(path: str | Path, flag: str, what: str = "file") -> str:
    """Return a file of UTF-8 text, with or without a byte order mark; `flag` is where its path came from.

    Raises:
        ValueError: there is no such file, it is too large, or no UTF-8 text.
    """
    path = Path(path).expanduser()
    if problem := no_file(path, what):
        raise ValueError(f"{problem}; check the path given with {flag}.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"'{path}' has {size >> 20} MB; a {what} has at most {MAX_BYTES >> 20} MB.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        place = text.find("\0")
    except UnicodeDecodeError as error:
        place = error.start
    if place >= 0:
        raise ValueError(f"'{path}' is not UTF-8 text (line {content[:place].count(10) + 1}); save it as UTF-8.")
    return text


def read_table(path: str | Path, flag: str, needed: Collection[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV file, each with the number of its last line; cells that a row lacks are empty.

    Raises:
        ValueError: no such file, a `needed` column is missing or one is there twice, or a row has too many cells.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, flag, "CSV file"), newline=""), restval="")
    try:
        columns = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"'{path}', line {reader.line_num}: {error}; are its quotes closed?") from error
    lacking = ", ".join(name for name in needed if name not in columns)
    if lacking or len(set(columns)) < len(columns):
        problem = f"no column {lacking}" if lacking else "two columns of one name"
        raise ValueError(f"'{path}' has {problem}; it needs {', '.join(needed)}, once each, with commas between.")
    for line, row in rows:
        if any(row.pop(None, [])):
            raise ValueError(f"'{path}', line {line}: it has more values than there are columns.")
    return rows


def check_file_name(name: str) -> None:
    """Raise `ValueError` unless `name`, without an ending, is a file's name on every system and in one line."""
    if not _NAME.fullmatch(name) or not name.isprintable() or _DEVICE.fullmatch(name) or len(name.encode()) > MAX_NAME:
        raise ValueError(f"{name[:60]!r} cannot be a file's name; use at most {MAX_NAME} letters, digits, - and _.")


def slug(text: str) -> str:
    """Return the letters and digits of a text as part of a file's name."""
    return re.sub(r"\W+", "-", text).strip("-")[:60] or "text"


def file_name(text: str, unusable: str = r'[/\\:*?"<>|\x00-\x1f\x7f]') -> str:
    """Return a text as a file's name, with dashes for characters (a pattern) that have no place there."""
    name = re.sub(unusable, "-", text).lstrip(".").strip() or "image"
    if os.name == "nt" and _DEVICE.fullmatch(name):
        name = f"_{name}"
    return name.encode()[:200].decode(errors="ignore")
