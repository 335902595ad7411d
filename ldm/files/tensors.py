"""The reader of foreign tensors: safetensors files and those of torch, told apart by their content.

No code of a file is run: torch files are read with `weights_only`, and stand-ins that do nothing take the place of
the classes that public files name.
"""

from __future__ import annotations

import difflib
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ldm.files.kinds import foreign_kind, is_image, is_utf8

_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".bin")
# Lightning's checkpoints (sd-v1-4.ckpt is one) pickle this class, and numpy scalars, beside the weights. Neither is
# needed, so neither library is imported or called.
_STAND_INS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
# Embedding files of ProSpect, and NeTI's, pickle whole modules.
_MODULES = ("ldm.", "torch.nn.modules.", "models.positional_encoding.")
_UNPACKED, _RATIO = 2**30, 20  # a compressed file may become 1 GB, or 20 times as large
_READING = threading.Lock()


class TensorFileError(ValueError):
    """A file that cannot be used: one sentence that says which file, what is wrong with it and what to do."""


class StandIn:
    """Stands in for every class that a file names: keeps the pickled state as data, does nothing."""

    state: object = None

    def __new__(cls, *args: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def part(self, name: str) -> Mapping[object, object]:
        """Return `_parameters` or `_modules` of a pickled module; empty where there are none."""
        found = self.state.get(name) if isinstance(self.state, Mapping) else None
        return found if isinstance(found, Mapping) else {}


class TensorFile(NamedTuple):
    """The content of a file: nested dicts of tensors, plain data and stand-ins, and a safetensors file's metadata.

    The tensors of a `mapped` file are views of it: nothing is read before it is used.
    """

    content: object
    metadata: dict[str, str]
    mapped: bool


def read_file(
    path: Path, mapped: bool = True, wanted: Callable[[str], bool] | None = None, head: bytes | None = None
) -> TensorFile:
    """Read a safetensors or torch file of any age, with any name; tensors are on the CPU.

    Args:
        mapped: view a torch file where that is possible, instead of reading all of it.
        wanted: says of a name whether the tensor is needed; a safetensors file is read without the others.
        head: from `read_head`, if that was called before.

    Raises:
        TensorFileError: missing, damaged, of another kind, or it names code.
    """
    kind = ""
    try:
        kind = _kind(path, head)
        if kind == "safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                names = filter(wanted, file.keys()) if wanted else file.keys()
                return TensorFile({name: file.get_tensor(name) for name in names}, file.metadata() or {}, mapped=True)
        mapped = mapped and kind == "zip"
        return TensorFile(_unpickle(path, kind, mapped), {}, mapped)
    except TensorFileError:
        raise
    except Exception as error:  # a malformed file can fail in any way
        raise _refusal(path, kind, error) from error


def named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """Return the tensors of nested dicts under dotted names; everything else is dropped.

    Raises:
        TensorFileError: a tensor whose values are not all in the file: sparse, nested, or a few that are repeated.
    """
    tensors = dict(_flatten(content))
    for name, tensor in tensors.items():
        if not _is_whole(tensor):
            raise TensorFileError(f"'{path}': {name} claims more values than the file holds; use another copy of it.")
    return tensors


def _is_whole(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _flatten(content: object) -> Iterator[tuple[str, Tensor]]:
    """A dict that is in several places is read once: such a pickle can stand for more names than memory holds."""
    pending: list[tuple[str, object]] = [("", content)]
    seen: set[int] = set()
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, Tensor):
            yield prefix, node.detach()
        elif isinstance(node, Mapping) and id(node) not in seen:
            seen.add(id(node))
            named = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items()]
            pending += reversed(named)


def read_checkpoint(path: Path, keys: Collection[str]) -> Mapping[str, Any]:
    """Return what a training run saved, read as by `read_file`; also its checksums are compared.

    Raises:
        TensorFileError: not a torch file with these keys, or a part has a wrong checksum.
    """
    if (kind := _kind(path)) != "zip":
        what = {"safetensors": "a safetensors file", "pickle": "in torch's old format"}.get(kind, "compressed")
        raise TensorFileError(f"'{path}' is {what} and not a checkpoint of a training run; use its last.ckpt.")
    content = read_file(path).content
    content = content if isinstance(content, Mapping) else {}
    if lacking := ", ".join(key for key in keys if key not in content):
        raise TensorFileError(f"'{path}' holds no {lacking}: it is no checkpoint of a training run; use its last.ckpt.")
    with zipfile.ZipFile(path) as archive:
        try:
            bad = archive.testzip()
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            bad = str(error)
    if bad is not None:
        raise TensorFileError(f"'{path}' is damaged (the checksum of '{bad}' is wrong); use another copy of it.")
    return content


def _unpickle(path: Path, kind: str, mapped: bool) -> object:
    """Read with torch's `weights_only` reader, which has one list of allowed names for all threads."""
    with _READING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        modules: list[str] = []
        if kind != "pickle":  # in older files the names cannot be listed
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            modules = [name for name in named if name.startswith(_MODULES)]
        with torch.serialization.safe_globals([(StandIn, name) for name in (*_STAND_INS, *modules)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _refusal(path: Path, kind: str, error: Exception) -> TensorFileError:
    refused = re.search(r"GLOBAL ([\w.]+) (?:was not|whose module)", str(error))
    if refused and refused[1].startswith(_MODULES) and kind == "pickle":
        return TensorFileError(
            f"'{path}' is in the format that torch wrote before 1.6; write it anew with a newer torch where it was "
            "made: torch.save(torch.load(file), file)."
        )
    if refused or "Weights only load failed" in str(error):
        what = f"'{refused[1]}'" if refused else "more than tensors and plain data"
        return TensorFileError(
            f"'{path}' holds {what}, which could run code and is not loaded; "
            "use a .safetensors version of this file, or one from a source that saves tensors only."
        )
    first_line = re.sub(r"^\[.*?\][ .]*", "", str(error).strip().partition("\n")[0])
    reason = re.split(r"\.( |$)", first_line)[0][:120] or type(error).__name__
    return TensorFileError(f"'{path}' is damaged or incomplete ({reason}); download it again.")


def read_head(path: Path) -> bytes:
    """Return the first 512 bytes of a file.

    Raises:
        TensorFileError: there is no such file, or it may not be read.
    """
    if not path.is_file():
        raise missing(path)
    if not is_utf8(path):
        shown = str(path).encode(errors="replace").decode()
        raise TensorFileError(f"'{shown}': its name is not UTF-8; rename the file or its folder.")
    try:
        with path.open("rb") as stream:
            return stream.read(512)
    except OSError as error:
        raise TensorFileError(f"'{path}' cannot be read: {error.strerror}; check its permissions.") from error


def _kind(path: Path, head: bytes | None = None) -> str:
    """Return 'safetensors', 'zip' (torch), 'packed zip' (compressed by someone) or 'pickle' (torch before 1.6)."""
    head = read_head(path) if head is None else head
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        return _kind_of_zip(path)
    problem, remedy = foreign_kind(head) or ("", "")
    if not problem and head.startswith(b"PK\x03\x04"):
        problem, remedy = "is cut off (the download was not finished)", "download it again"
    elif not problem:
        text = b"\0" not in head and head.isascii()
        problem = f"is {'an image' if is_image(head) else 'a text file' if text else 'of an unknown format'}"
    raise TensorFileError(f"'{path}' {problem}; {remedy or 'use a .safetensors, .ckpt, .pt or .bin file'}.")


def _kind_of_zip(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if all(entry.compress_type == zipfile.ZIP_STORED for entry in entries):
        return "zip"
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max(_UNPACKED, _RATIO * path.stat().st_size):
        raise TensorFileError(
            f"'{path}' would be {unpacked / 2**30:,.1f} GB when unpacked; use a .safetensors version of it."
        )
    return "packed zip"


def missing(path: Path) -> TensorFileError:
    """Return the error of a file that is not there, with the nearest one that is."""
    if path.is_dir():
        return TensorFileError(f"'{path}' is a folder; give a file.")
    if path.exists():
        return TensorFileError(f"'{path}' is a device, not a file; check the path.")
    if not path.parent.is_dir():
        return TensorFileError(f"There is no file '{path}', nor its folder; check the path.")
    siblings = [file.name for file in path.parent.iterdir() if file.name != path.name]  # a link may lead nowhere
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    if near:
        return TensorFileError(f"There is no file '{path}'; did you mean '{path.with_name(near[0])}'?")
    there = ", ".join(model_files(path.parent)) or "none"
    return TensorFileError(f"There is no file '{path}'; check the path (model files in its folder: {there}).")


def model_files(folder: Path) -> list[str]:
    """Return names of the files in a folder that may hold tensors."""
    return sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's or folder's name in front of what is wrong with it."""
    try:
        yield
    except OSError as error:
        raise TensorFileError(f"'{path}': it cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise TensorFileError(f"'{path}': {error}") from error
