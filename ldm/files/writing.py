"""Writing files so that a reader, now or after a crash, finds the old file or the whole new one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"  # what names of unfinished files begin with; safetensors' own do, too

_PLACE = "give another folder"
_REASONS = {
    errno.ENOSPC: ("there is no space left", f"free some, or {_PLACE}"),
    errno.EDQUOT: ("your quota is used up", f"free some space, or {_PLACE}"),
    errno.EFBIG: ("the file would be larger than is allowed there", f"raise the limit (ulimit -f), or {_PLACE}"),
    errno.EROFS: ("it is read-only", _PLACE),
    errno.EACCES: ("you may not write there", f"change its permissions, or {_PLACE}"),
    errno.EPERM: ("you may not write there", f"change its permissions, or {_PLACE}"),
    errno.ENOTDIR: ("part of this path is a file", _PLACE),
    errno.EEXIST: ("there is a file of this name", _PLACE),
}


class WriteError(OSError):
    """Nothing can be written to a folder; one sentence that names it and the remedy."""


@contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Turn an `OSError` that says that `folder` has no room or gives no right into a `WriteError`."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno)
        named = error.filename
        elsewhere = isinstance(named, (str, bytes)) and not _is_related(Path(os.fsdecode(named)), Path(folder))
        if isinstance(error, WriteError) or reason is None or elsewhere:
            raise
        raise WriteError(f"Cannot write to '{folder}': {reason[0]}; {reason[1]}.") from error


def _is_related(path: Path, folder: Path) -> bool:
    """Whether `path` is in `folder`, or is a folder above it (one that cannot be made)."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def check_writable(folder: str | Path, flag: str) -> None:
    """Raise `WriteError` if `folder`, which `flag` gives, cannot be made or written to; nothing is made."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise WriteError(f"Cannot write to '{folder}': '{place}' is a file; give a folder with {flag}.")
    with writing_to(folder):
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY
            raise OSError(errno.EROFS if read_only else errno.EACCES, "")


@contextmanager
def replacing(path: str | Path, keep: str | Path | None = None) -> Iterator[Path]:
    """A path beside `path` to write to. Afterwards that file, safely on the disk, takes the place of `path`.

    Args:
        keep: what `path` is called from then on, instead of being lost.

    Raises:
        WriteError: no folder, no room or no right; `path` is as it was, and nothing else is left.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise WriteError(f"Cannot write '{path.name}': there is no folder '{path.parent}'; make it first.")
    # two processes, or two threads, may write the same file
    temporary = path.with_name(f"{TEMPORARY}-{os.getpid()}-{threading.get_ident()}-{path.name}")
    with writing_to(path.parent):
        try:
            yield temporary
            _sync(temporary)
            if keep is not None and path.exists():
                _rename_aside(path, Path(keep))
            os.replace(temporary, path)
            if os.name == "posix":
                _sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 in place of `path`, all of it or nothing; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _rename_aside(path: Path, keep: Path) -> None:
    """Give `path` the second name `keep`, so that at every moment it has at least one."""
    link = keep.with_name(f"{TEMPORARY}-{os.getpid()}-{keep.name}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, keep)
    except OSError:  # a file system without links
        os.replace(path, keep)


def _sync(path: Path) -> None:
    """Wait until a file, or which files a folder has, is on the disk; a rename alone may come there first."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: str | Path) -> None:
    """Delete what a process that was killed had begun to write below `folder`."""
    for path in Path(folder).rglob(f"{TEMPORARY}*"):
        if path.is_file():
            path.unlink(missing_ok=True)
