"""Weight files, told apart by their content, as state dicts that are views of the mapped file.

No code of a file is run: torch files are read with `weights_only` and inert stand-ins for the few harmless classes
that public checkpoints name.
"""

from __future__ import annotations

import ctypes
import difflib
import mmap
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ldm.memory import MemoryShort, check

_LIST_IN_USE = threading.Lock()
_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".bin")


class CheckpointError(ValueError):
    """A file that cannot be used: one sentence that says which file, what is wrong with it and what to do."""


class _Inert:
    """Stands in for a pickled class: takes whatever the file passes and keeps none of it."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Lightning's checkpoints (sd-v1-4.ckpt is one) pickle this class, and numpy scalars, beside the
# weights. Neither is needed, so neither library is imported or called.
_STAND_INS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise missing(path)
    try:
        kind = _sniff(path)
        if kind == "safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        else:
            content = unpickle(path, mapped=kind == "mappable")
            inner = content.get("state_dict") if isinstance(content, Mapping) else None
            state = dict(_tensors(inner if isinstance(inner, Mapping) else content))
    except CheckpointError:
        raise
    except MemoryShort as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # a malformed file can fail in any way
        refused = re.search(r"GLOBAL ([\w.]+) (?:was not|whose module)", str(error))
        if refused or "Weights only load failed" in str(error):
            what = f"'{refused[1]}'" if refused else "more than tensors and plain data"
            raise CheckpointError(
                f"'{path}' holds {what}, which could run code and is not loaded; "
                "use a .safetensors version of this file, or one from a source that saves tensors only."
            ) from error
        first_line = re.sub(r"^\[.*?\][ .]*", "", str(error).strip().partition("\n")[0])
        reason = re.split(r"\.( |$)", first_line)[0][:120] or type(error).__name__
        raise CheckpointError(f"'{path}' is damaged or incomplete ({reason}); download it again.") from error
    if not state:
        raise CheckpointError(f"'{path}' holds no tensors; use a file with model weights.")
    for key, tensor in state.items():
        if not is_whole(tensor):
            raise CheckpointError(f"'{path}': {key} claims more values than the file holds; use another copy of it.")
    return state


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor's values are all in its file: dense, and not a few that are repeated without end."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def unpickle(path: Path, mapped: bool) -> object:
    """What a torch file holds, read without running any of its code; tensors are views of the file if `mapped`."""
    with reading_with(_Inert, lambda: _STAND_INS):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


@contextmanager
def reading_with(stand_in: type, names: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Let `torch.load` make `stand_in` where a file names one of these classes.

    Torch has one list of such names for all threads, so that one thread at a time changes it and reads with it;
    `names` is called when no other thread's are on it.
    """
    with _LIST_IN_USE, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        with torch.serialization.safe_globals([(stand_in, name) for name in names()]):
            yield


def _tensors(tree: object, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts under dotted names; everything else is dropped.

    A dict that is in several places is read once: such a pickle can stand for more names than memory holds.
    """
    seen = set() if seen is None else seen
    if isinstance(tree, Tensor):
        yield prefix, tree.data  # starts a version count of its own, which `MappedFiles.release` reads
    elif isinstance(tree, Mapping) and id(tree) not in seen:
        seen.add(id(tree))
        for key, branch in tree.items():
            yield from _tensors(branch, f"{prefix}.{key}" if prefix else str(key), seen)


def _sniff(path: Path) -> str:
    """'safetensors', 'mappable' (torch) or 'torch' (before 1.6, or compressed by someone), by content."""
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}; check its permissions.") from error
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        problem, remedy = "is empty", "download it again"
    elif text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        problem, remedy = "is a web page, perhaps of a login", "log in or accept the licence, then download"
    elif text.startswith(b"version https://git-lfs"):
        problem, remedy = "is a git-lfs pointer and not the file itself", "run `git lfs pull`"
    elif head.startswith(b"PK\x03\x04"):
        if zipfile.is_zipfile(path):
            if unpacked := packed_size(path):
                check(unpacked, "cpu", f"'{path}', unpacked,", "a .safetensors version of it")
            return "torch" if unpacked else "mappable"
        problem, remedy = "is cut off (the download was not finished)", "download it again"
    elif head[8:9] == b"{":
        return "safetensors"
    elif head.startswith(b"\x80"):
        return "torch"
    else:
        kind = "a text file" if b"\0" not in head and head.isascii() else "of an unknown format"
        problem, remedy = f"is {kind}", "use a .ckpt or .safetensors file, or a diffusers folder"
    raise CheckpointError(f"'{path}' {problem}; {remedy}.")


def packed_size(path: Path) -> int:
    """Bytes that a compressed zip file has when it is unpacked; 0 where nothing is compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if all(entry.compress_type == zipfile.ZIP_STORED for entry in entries):
        return 0
    return sum(entry.file_size for entry in entries)


def missing(path: Path) -> CheckpointError:
    if not path.parent.is_dir():
        return CheckpointError(f"There is no file '{path}', nor its folder; check the path.")
    siblings = [file.name for file in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    if near:
        return CheckpointError(f"There is no file '{path}'; did you mean '{path.with_name(near[0])}'?")
    there = ", ".join(model_files(path.parent)) or "none"
    return CheckpointError(f"There is no file '{path}'; check the path (model files in its folder: {there}).")


def model_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)


class MappedFiles:
    """Which memory of this process is a mapped file, and how to let it go; known on Linux only.

    Pages of a mapped file stay resident after they were read, so a copy of the file would show as twice its
    size until the system is short of memory.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] | None = None
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return
        fields = [line.split(maxsplit=5) for line in lines]  # range, permissions, offset, device, inode, path
        ranges = [field[0].split("-") for field in fields if field[1].endswith("p") and field[4] != "0"]
        self._ranges = [(int(start, 16), int(end, 16)) for start, end in ranges]

    def covers(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is a mapped file; True where that cannot be known."""
        if self._ranges is None:
            return True
        return any(start <= tensor.data_ptr() < end for start, end in self._ranges)

    def release(self, tensor: Tensor) -> None:
        """Drop the pages of a mapped tensor that was copied; reading it again would fetch them anew."""
        edited = tensor.is_inference() or tensor._version > 0  # an edit lives in the page, not in the file
        if self._ranges is None or edited:
            return
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(start <= first and last <= end for start, end in self._ranges):
            length = ctypes.c_size_t(last - first)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), length, mmap.MADV_DONTNEED)
