"""Atomic writing: a reader, now or after a crash, finds the old file or the whole new one.

Unfinished files have names that no other program uses; only such files are ever removed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

if sys.platform != "win32":
    import fcntl

_PARTIAL = re.compile(r"\.prospect-\d+-[0-9a-f]{8}\.partial")
# A place without room or without the right to write; other errors have other causes.
_PLACE = frozenset((
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
))  # fmt: skip

MAX_NAME = 255  # bytes, of common file systems
_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ()  # seconds, for another program to close a file


class WriteError(OSError):
    """Nothing can be written to a folder; one sentence that names it and the remedy."""


@contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Turn an `OSError` that says that `folder` has no room or gives no right into a `WriteError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _PLACE or _is_elsewhere(error.filename, folder):
            raise
        raise WriteError(f"Cannot write to '{folder}': {error.strerror}; give another folder.") from error


def _is_elsewhere(named: object, folder: str | Path) -> bool:
    """Return whether an error names a path that is neither in `folder` nor above it, where it cannot be made."""
    if not isinstance(named, (str, bytes)):
        return False
    path, place = Path(os.path.abspath(os.fsdecode(named))), Path(os.path.abspath(folder))
    return not (path.is_relative_to(place) or place.is_relative_to(path))


def check_writable(folder: str | Path, flag: str) -> None:
    """Raise `WriteError` if `folder`, which `flag` gives, cannot be made or written to; nothing stays there."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        if len(os.fsencode(place.name)) > MAX_NAME:
            raise WriteError(f"Cannot write to a folder called '{place.name:.40}…': the name is too long; shorten it.")
        place = place.parent
    if not place.is_dir():
        raise WriteError(f"Cannot write to '{folder}': '{place}' is a file; give a folder with {flag}.")
    probe = _partial(place)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise WriteError(f"Cannot write to '{folder}': {error.strerror}; give another folder.") from error


def check_new_file(
    path: str | Path, force: bool = False, inputs: Iterable[str | Path] = (), suffix: str = ".safetensors"
) -> Path:
    """Return the path of a file that a user wants written, with `~` expanded.

    Args:
        force: a file that is there may be overwritten.
        inputs: files and folders that the new file is made from; it never takes the place of one of them.

    Raises:
        ValueError: another ending, an input, a file of a training run, or there already without `force`.
    """
    path = Path(path).expanduser()
    place = path.resolve()
    if path.suffix != suffix:
        raise ValueError(f"'{path}': the file to write must end in {suffix}.")
    if any(place.is_relative_to(Path(source).expanduser().resolve()) for source in inputs):
        raise ValueError(f"'{path}' is, or is part of, what is read; name another file.")
    if any((place.parent.parent / "configs").glob("*-project.yaml")):
        raise ValueError(f"'{path}' is in the folder of a training run, which needs its files; name another file.")
    if path.exists() and not (force and path.is_file()):
        what = "a folder; name" if path.is_dir() else "there already; use --force to overwrite it, or name"
        raise ValueError(f"'{path}' is {what} another file.")
    return path


def _partial(folder: Path) -> Path:
    """Return a new name in `folder` for something that is not finished."""
    return folder / f".prospect-{os.getpid()}-{secrets.token_hex(4)}.partial"


@contextmanager
def replacing(path: str | Path, keep: str | Path | None = None) -> Iterator[Path]:
    """A path beside `path` to write to. Afterwards that file, safely on the disk, takes the place of `path`.

    Its folder is made where there is none. A link at `path` is replaced, and not what it leads to.

    Args:
        keep: what `path` is called from then on, instead of being lost.

    Raises:
        WriteError: no room or no right; `path` is as it was, and nothing else is left.
    """
    path = Path(path)
    temporary = _partial(path.parent)
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            if keep is not None and path.exists():
                _rename_aside(path, Path(keep))
            move(temporary, path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def replacing_set(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write files to that belong together. Afterwards all of them are moved into `folder`.

    `folder` is not touched before everything is safely on the disk. If it is not there, it appears whole, in one
    step. If it is, files of the same names are replaced one after the other and others stay, so that a crash in
    between mixes old and new files: each should say what it belongs to, and readers compare that.

    Raises:
        WriteError: no room, no right, or a folder where a file should go; `folder` is as it was.
    """
    folder = Path(folder)
    with writing_to(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = _partial(folder if folder.is_dir() else folder.parent)
        staging.mkdir()
        try:
            yield staging
            targets = {p: folder / p.relative_to(staging) for p in sorted(staging.rglob("*")) if p.is_file()}
            for path, target in targets.items():
                if target.is_dir():
                    raise WriteError(f"Cannot write '{target}': it is a folder; name another place.")
                _sync(path)
            if folder.is_dir():
                for path, target in targets.items():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    move(path, target)
            else:
                os.rename(staging, folder)
            _sync(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def move(path: Path, target: Path) -> None:
    """Move a file to `target`, in place of what is there.

    Windows refuses that while another program has `target` open, which mostly is a matter of a moment.

    Raises:
        WriteError: it stays open.
    """
    for wait in _WAITS:
        with suppress(PermissionError):
            os.replace(path, target)
            return
        time.sleep(wait)
    try:
        os.replace(path, target)
    except PermissionError as error:
        if not _WAITS or not target.is_file():
            raise
        raise WriteError(f"Cannot write '{target}': another program has it open; close it there.") from error


def replace_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` in place of `path`, all of it or nothing; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 in place of `path`, all of it or nothing; see `replacing`."""
    replace_bytes(path, text.encode("utf-8"))


def _rename_aside(path: Path, keep: Path) -> None:
    """Give `path` the second name `keep`, so that at every moment it has at least one."""
    link = _partial(keep.parent)
    try:
        os.link(path, link)
        move(link, keep)
    except OSError:  # a file system without links
        move(path, keep)
    finally:
        link.unlink(missing_ok=True)  # which stays where a kill has left both names to one file


def _sync(path: Path) -> None:
    """Wait until a file, or which files a folder has, is on the disk; a rename alone may come there first."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(stream: IO[Any]) -> bool:
    """Lock a file until all who have it open or inherit it have closed it (not on Windows); False where others have."""
    if sys.platform != "win32":
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some file systems of clusters lock nothing
            return not isinstance(error, BlockingIOError)
    return True


def is_locked(path: str | Path) -> bool:
    """Return whether a file is there and a process has it locked."""
    with suppress(FileNotFoundError), open(path, "rb") as stream:
        return not lock(stream)
    return False


def is_unfinished(name: str) -> bool:
    """Return whether a file or folder of this name is unfinished output of this program."""
    return _PARTIAL.fullmatch(name) is not None


def remove_unfinished(folder: str | Path) -> None:
    """Delete unfinished output of killed processes below `folder`; links are not followed."""
    for place, folders, files in os.walk(folder) if not os.path.islink(folder) else ():
        for name in filter(is_unfinished, files):
            Path(place, name).unlink(missing_ok=True)
        for name in filter(is_unfinished, folders):
            with suppress(OSError):  # a link
                shutil.rmtree(Path(place, name))
