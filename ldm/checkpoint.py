"""Checkpoint files into state dicts and models: no code is run from a file, no key is let slip.

`.ckpt` and other torch files, `.safetensors` and diffusers folders all become one dict of tensors in CompVis'
layout: `model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.transformer.text_model.*`.
"""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import logging
import mmap
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.diffusers_layout import TEXT, UNET, find_weights, to_compvis
from ldm.schedule import make_betas, schedule_buffers

logger = logging.getLogger(__name__)

SCHEDULE_BUFFERS = frozenset(schedule_buffers(make_betas(0.00085, 0.012)))
# What files hold beside the weights: recomputed, unused, or (the embedding manager) kept in files of its own.
_EXTRA = re.compile(r"(.*\.)?position_ids|logvar|(model_ema|embedding_manager|(first_stage_model\.)?loss)\..*")
_FAMILIES = ("Stable Diffusion v1", "Stable Diffusion 2", "Stable Diffusion XL")
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


def read_state_dict(path: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint file or diffusers folder, in the CompVis layout, on the CPU.

    Tensors are views of the memory-mapped file: nothing is read before it is used. With `dtype`, floating
    tensors are converted one at a time (except the schedule buffers, which half precision would spoil) and
    the file's pages let go, so that at no time more than the result and one tensor are in memory.

    Args:
        path: `.ckpt`, `.pt`, `.bin` or `.safetensors` (told apart by their content), or a folder with
            model_index.json.
        dtype: what floating tensors become; None leaves them as they are.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or holds more than tensors and plain
            data.
    """
    path = Path(path)
    state = _read_folder(path) if path.is_dir() else _read_file(path)
    if dtype is not None:
        mapped = _MappedFiles()
        for key, tensor in state.items():
            if tensor.is_floating_point() and key not in SCHEDULE_BUFFERS:
                state[key] = tensor.to(dtype)
                mapped.release(tensor)
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Put `state` into `model`: every weight of the model must be there with its shape, and nothing unknown.

    A parameter on the meta device becomes the tensor of `state`, in its dtype, copied where it is a mapped
    file; any other is copied into and keeps its dtype and device. The schedule buffers are never taken from the
    file: the configuration defines them, and half-precision files hold spoiled ones. They, `position_ids`,
    `model_ema.*`, `logvar`, `loss.*` and `embedding_manager.*` may be in the file or not.

    Args:
        model: any module whose state dict has the names of the CompVis layout, or of a part of it.
        state: as `read_state_dict` returns it; left as it is.
        source: the file's name, for messages.

    Raises:
        CheckpointError: another family of models, or keys that are missing, unexpected or misshapen (listed).
    """
    refuse_other_families(state, model, source)
    own = model.state_dict()
    loadable = {key for key in own if key in state and key not in SCHEDULE_BUFFERS}
    _refuse_misfits(own, state, source)

    assigned: dict[str, Tensor] = {}
    mapped = _MappedFiles()
    with torch.no_grad():
        for key in sorted(loadable):
            if own[key].is_meta:
                assigned[key] = state[key].clone() if mapped.covers(state[key]) else state[key]
            else:
                own[key].copy_(state[key])
            mapped.release(state[key])
    if assigned:
        model.load_state_dict(assigned, strict=False, assign=True)
    logger.debug("%s: ignored %s", source, sorted(set(state) - loadable))
    logger.info("%s: %d tensors loaded", source, len(loadable))


def _refuse_misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str | Path) -> None:
    def optional(key: str) -> bool:
        return key in SCHEDULE_BUFFERS or _EXTRA.fullmatch(key) is not None

    problems = {
        "missing": [key for key in own if key not in state and not optional(key)],
        "unexpected": [key for key in state if key not in own and not optional(key)],
        "misshapen": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and key not in SCHEDULE_BUFFERS and state[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        listing = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}"
            for kind, keys in problems.items()
            if keys
        )
        raise CheckpointError(
            f"'{source}' does not fit this model ({listing}); "
            "use the configuration this file was made with, or a file of this configuration."
        )


def context_width(state: Mapping[str, Tensor]) -> int | None:
    """Width of the text features that the U-Net's cross-attention reads (768 for Stable Diffusion v1)."""
    widths = (w.shape[1] for key, w in state.items() if key.endswith("attn2.to_k.weight") and w.ndim == 2)
    return next(widths, None)


def identify(state: Mapping[str, Tensor]) -> str:
    """What a state dict is, from its key names and the context width.

    Returns:
        'Stable Diffusion v1' (of any size), 'Stable Diffusion 2', 'Stable Diffusion XL', 'a LoRA', 'a VAE',
        'a textual inversion embedding' or 'unknown'.
    """
    width = context_width(state)

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in state)

    if any(re.search(r"(^|[._])lora[._]", key) for key in state):
        return "a LoRA"
    if has("conditioner.embedders.") or width == 2048:
        return "Stable Diffusion XL"
    if has("cond_stage_model.model.") or width == 1024:
        return "Stable Diffusion 2"
    if has(UNET):
        return "Stable Diffusion v1" if has(TEXT) or width == 768 else "unknown"
    if has("encoder.conv_in.") and has("decoder.conv_in."):
        return "a VAE"
    if has("string_to_param.") or set(state) == {"clip_l", "clip_g"}:
        return "a textual inversion embedding"
    if len(state) == 1 and all(1 <= tensor.ndim <= 2 for tensor in state.values()):
        return "a textual inversion embedding"
    return "unknown"


def refuse_other_families(state: Mapping[str, Tensor], model: nn.Module, path: str | Path) -> None:
    """Say in words that a file is for another kind of model, before its keys are compared one by one.

    Raises:
        CheckpointError: `model` is a Stable Diffusion of some version and `state` is known to be another.
    """
    own = model.state_dict()
    family, expected = identify(state), identify(own)
    if family in ("unknown", expected) or expected not in _FAMILIES:
        return
    width = context_width(state)
    found = f"{family} (context width {width})" if family in _FAMILIES and width else family
    raise CheckpointError(
        f"'{path}' holds {found}, this configuration is {expected} (context width {context_width(own)}); "
        f"use a full {expected} checkpoint{', such as sd-v1-4.ckpt' if expected == _FAMILIES[0] else ''}."
    )


def save_state_dict(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one step: readers see the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        tensor = tensor.detach().contiguous()
        # the format has no shared storage, so a second tensor on the same memory is written out
        tensors[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        temporary.chmod(mode)  # safetensors leaves files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: str | Path) -> str:
    """SHA-256 (hexadecimal) of a checkpoint file, or of a diffusers folder's weight files in a fixed order.

    Raises:
        CheckpointError: there is no such file, or the folder is not a diffusers folder.
    """
    path = Path(path)
    digest = hashlib.sha256()
    for file in _folder_files(path).values() if path.is_dir() else [path]:
        if not file.is_file():
            raise _missing(file)
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _folder_files(folder: Path) -> dict[str, Path]:
    try:
        return find_weights(folder)
    except ValueError as error:
        there = ", ".join(_model_files(folder)) or "none"
        raise CheckpointError(
            f"'{folder}' {error}; use a whole diffusers folder of Stable Diffusion v1, or a single file "
            f"(model files in this folder: {there})."
        ) from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    parts = {part: _read_file(file) for part, file in _folder_files(folder).items()}
    try:
        return to_compvis(parts)
    except ValueError as error:
        raise CheckpointError(f"'{folder}' {error}; use a diffusers folder of Stable Diffusion v1.") from error


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise _missing(path)
    try:
        kind = _sniff(path)
        if kind == "safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        else:
            content = _unpickle(path, mapped=kind == "mappable")
            inner = content.get("state_dict") if isinstance(content, Mapping) else None
            state = dict(_tensors(inner if isinstance(inner, Mapping) else content))
    except CheckpointError:
        raise
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
    return state


def _unpickle(path: Path, mapped: bool) -> object:
    with torch.serialization.safe_globals([(_Inert, name) for name in _STAND_INS]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _tensors(tree: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts under dotted names; everything else is dropped."""
    if isinstance(tree, Tensor):
        yield prefix, tree.data  # starts a version count of its own, which `_MappedFiles.release` reads
    elif isinstance(tree, Mapping):
        for key, branch in tree.items():
            yield from _tensors(branch, f"{prefix}.{key}" if prefix else str(key))


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
            with zipfile.ZipFile(path) as archive:
                stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
            return "mappable" if stored else "torch"
        problem, remedy = "is cut off (the download was not finished)", "download it again"
    elif head[8:9] == b"{":
        return "safetensors"
    elif head.startswith(b"\x80"):
        return "torch"
    else:
        kind = "a text file" if b"\0" not in head and head.isascii() else "of an unknown format"
        problem, remedy = f"is {kind}", "use a .ckpt or .safetensors file, or a diffusers folder"
    raise CheckpointError(f"'{path}' {problem}; {remedy}.")


def _missing(path: Path) -> CheckpointError:
    if not path.parent.is_dir():
        return CheckpointError(f"There is no file '{path}', nor its folder; check the path.")
    siblings = [file.name for file in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    if near:
        return CheckpointError(f"There is no file '{path}'; did you mean '{path.with_name(near[0])}'?")
    there = ", ".join(_model_files(path.parent)) or "none"
    return CheckpointError(f"There is no file '{path}'; check the path (model files in its folder: {there}).")


def _model_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)


class _MappedFiles:
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
