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
from ldm.files.texts import no_file

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

    def parts(self) -> dict[object, object]:
        """Return the parameters and modules in a pickled module; nothing for other objects."""
        state = self.state if isinstance(self.state, Mapping) else {}
        found = (state.get(name) for name in ("_parameters", "_modules"))
        return {key: part for mapping in found if isinstance(mapping, Mapping) for key, part in mapping.items()}


class TensorFile(NamedTuple):
    """The content of a file: nested dicts of tensors, plain data and stand-ins, and a safetensors file's metadata.

    The tensors of a `mapped` file are views of it: nothing is read before it is used.
    """

    content: object
    metadata: dict[str, str]
    mapped: bool


def read_file(path: Path, wanted: Callable[[str], bool] | None = None, head: bytes | None = None) -> TensorFile:
    """Read a safetensors or torch file of any age, with any name; tensors are on the CPU.

    Args:
        wanted: says of a name whether the tensor is needed; a safetensors file is read without the others.
        head: from `read_head`, if that was called before.

    Raises:
        TensorFileError: missing, damaged, of another kind, or it names code.
    """
    kind = ""
    try:
        kind = _kind(path, read_head(path) if head is None else head)
        if kind != "safetensors":
            return TensorFile(_unpickle(path, kind), {}, mapped=kind == "zip")
        with safe_open(path, framework="pt", device="cpu") as file:
            names = filter(wanted, file.keys()) if wanted else file.keys()
            return TensorFile({name: file.get_tensor(name) for name in names}, file.metadata() or {}, mapped=True)
    except TensorFileError:
        raise
    except Exception as error:  # a malformed file can fail in any way
        raise TensorFileError(f"'{path}' {_reason(kind, error)}.") from error


def named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """Return the tensors of nested dicts and of pickled modules under dotted names; everything else is dropped.

    Raises:
        TensorFileError: a tensor whose values are not all in the file: sparse, nested, or a few that are repeated.
    """
    tensors: dict[str, Tensor] = {}
    pending: list[tuple[str, object]] = [("", content)]
    # What is in several places is read once: it could be endless, or stand for more names than memory holds.
    seen: set[int] = set()
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, Tensor):
            tensors[prefix] = node.detach()
        elif id(node) not in seen:
            seen.add(id(node))
            parts = node.parts() if isinstance(node, StandIn) else node if isinstance(node, Mapping) else {}
            pending += reversed([(f"{prefix}.{key}" if prefix else str(key), part) for key, part in parts.items()])
    for name, tensor in tensors.items():
        if not _is_whole(tensor):
            raise TensorFileError(f"'{path}': {name} claims more values than the file holds; use another copy of it.")
    return tensors


def _is_whole(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def read_checkpoint(path: Path, keys: Collection[str]) -> Mapping[str, Any]:
    """Return what a training run saved, read as by `read_file`; also its checksums are compared.

    Raises:
        TensorFileError: not a torch file with these keys, or a part has a wrong checksum.
    """
    content = read_file(path).content
    content = content if isinstance(content, Mapping) else {}
    lacking = [key for key in keys if key not in content]
    if lacking or not zipfile.is_zipfile(path):
        what = f"it holds no {', '.join(lacking)}" if lacking else "it is in torch's old format"
        raise TensorFileError(f"'{path}' is no checkpoint of a training run ({what}); use its last.ckpt.")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        bad = str(error)
    if bad is not None:
        raise TensorFileError(f"'{path}' is damaged (the checksum of '{bad}' is wrong); use another copy of it.")
    return content


def _unpickle(path: Path, kind: str) -> object:
    """Read with torch's `weights_only` reader, which has one list of allowed names for all threads."""
    with _READING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        modules: list[str] = []
        if kind != "pickle":  # in older files the names cannot be listed
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            modules = [name for name in named if name.startswith(_MODULES)]
        with torch.serialization.safe_globals([(StandIn, name) for name in (*_STAND_INS, *modules)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")


def _reason(kind: str, error: Exception) -> str:
    """Return what is wrong with a file that could not be read, and the remedy."""
    refused = re.search(r"GLOBAL ([\w.]+) (?:was not|whose module)", str(error))
    if refused and refused[1].startswith(_MODULES) and kind == "pickle":
        return (
            "is in the format that torch wrote before 1.6; write it anew with a newer torch where it was made: "
            "torch.save(torch.load(file), file)"
        )
    if refused or "Weights only load failed" in str(error):
        return (
            f"holds {repr(refused[1]) if refused else 'more than tensors and plain data'}, which could run code and is "
            "not loaded; use a .safetensors version of this file, or one from a source that saves tensors only"
        )
    first_line = re.sub(r"^\[.*?\][ .]*", "", str(error).strip().partition("\n")[0])
    cause = re.split(r"\.( |$)", first_line)[0][:120] or type(error).__name__
    return f"is damaged or incomplete ({cause}); download it again"


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
    with naming(path), path.open("rb") as stream:
        return stream.read(512)


def _kind(path: Path, head: bytes) -> str:
    """Return 'safetensors', 'zip' (torch), 'packed zip' (compressed by someone) or 'pickle' (torch before 1.6)."""
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if all(entry.compress_type == zipfile.ZIP_STORED for entry in entries):
            return "zip"
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked <= max(_UNPACKED, _RATIO * path.stat().st_size):
            return "packed zip"
        problem = f"would be {unpacked / 2**30:,.1f} GB when unpacked; use a .safetensors version of it"
    elif head.startswith(b"PK\x03\x04"):
        problem = "is cut off (the download was not finished); download it again"
    else:
        is_text = b"\0" not in head and head.isascii()
        what = "an image" if is_image(head) else "a text file" if is_text else "of an unknown format"
        problem = foreign_kind(head) or f"is {what}; use a .safetensors, .ckpt, .pt or .bin file"
    raise TensorFileError(f"'{path}' {problem}.")


def missing(path: Path) -> TensorFileError:
    """Return the error of a file that is not there, with the nearest one that is."""
    if path.exists() or not path.parent.is_dir():
        return TensorFileError(f"{no_file(path)}{'' if path.exists() else ', nor its folder'}; check the path.")
    there = model_files(path.parent)
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    known = f"check the path (model files in its folder: {', '.join(there) or 'none'})."
    remedy = f"did you mean '{path.with_name(near[0])}'?" if near else known
    return TensorFileError(f"There is no file '{path}'; {remedy}")


def model_files(folder: Path) -> list[str]:
    """Return names of the files in a folder that may hold tensors."""
    return sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES and file.exists())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's or folder's name in front of what is wrong with it."""
    try:
        yield
    except OSError as error:
        raise TensorFileError(f"'{path}': it cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise TensorFileError(f"'{path}': {error}") from error
