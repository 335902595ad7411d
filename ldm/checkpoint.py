"""Checkpoint files into state dicts and models: no code is run from a file, no key is let slip.

`.ckpt` and other torch files, `.safetensors` and diffusers folders all become one dict of tensors in CompVis'
layout: `model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.transformer.text_model.*`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ldm.files.base_model import FINGERPRINT, NAME, fingerprint
from ldm.files.diffusers_layout import find_weights, to_compvis
from ldm.files.kinds import context_width, identify
from ldm.files.tensors import TensorFileError as CheckpointError
from ldm.files.tensors import missing, model_files, named_tensors, read_file
from ldm.files.writing import replace_bytes

logger = logging.getLogger(__name__)

SCHEDULE_BUFFERS = frozenset((
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
))  # fmt: skip
# What files hold beside the weights: recomputed, unused, or (the embedding manager) kept in files of its own.
_EXTRA = re.compile(r"(.*\.)?position_ids|logvar|(model_ema|embedding_manager|balance|(first_stage_model\.)?loss)\..*")
# What models of a context width are called, and the short name of their configuration here.
_WIDTHS = {
    128: ("the small model", "demo"),
    768: ("Stable Diffusion v1", "sd"),
    1024: ("Stable Diffusion 2", ""),
    2048: ("Stable Diffusion XL", ""),
}
_FAMILIES = ("Stable Diffusion v1", "Stable Diffusion 2", "Stable Diffusion XL")
# Levels of key names that other programs add or omit: of DistributedDataParallel and torch.compile, and transformers'.
_WRAPPERS = re.compile(r"^(module\.)+|(?<![^.])_orig_mod\.")
_TEXT_LEVEL = re.compile(r"(?<=^cond_stage_model\.transformer\.)(?=(embeddings|encoder|final_layer_norm)\.)")
_PORTION = 2**28  # bytes of a mapped file that are read before it is opened anew


def read_state_dict(path: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read a checkpoint file or diffusers folder: its tensors in the CompVis layout, on the CPU.

    Without `dtype`, tensors are views of the memory-mapped file: nothing is read before it is used. With it, they
    are copies, made in portions: beside the result about an eighth of the file, or 256 MB, is in memory. Averaged
    weights (`model_ema.*`), which no model here has, are then omitted.

    Args:
        path: `.ckpt`, `.pt`, `.bin` or `.safetensors` (told apart by their content), or a folder with
            model_index.json.
        dtype: what floating tensors become, except the schedule buffers, which half precision would spoil.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or holds more than tensors and plain
            data.
    """
    path = Path(path).expanduser()
    state, mapped = _open(path)
    return state if dtype is None else _copied(path, state, mapped, dtype)


def read_base_model(path: str | Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return `read_state_dict` with a `dtype`, and `base_model_of`, which is the same for every `dtype`."""
    path = Path(path).expanduser()
    state, mapped = _open(path)
    base = {NAME: path.name, FINGERPRINT: fingerprint(state)}
    return _copied(path, state, mapped, dtype), base


def base_model_of(path: str | Path) -> dict[str, str]:
    """Return what a concept's metadata says of the base model in a file or folder: its name and its fingerprint."""
    return {NAME: Path(path).name, FINGERPRINT: fingerprint(read_state_dict(path))}


def _open(path: Path, only: Collection[str] | None = None) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of a file or folder (`only` some of them), and whether they are views of a mapped file."""
    if path.is_dir():
        return _open_folder(path)
    file = read_file(path, wanted=None if only is None else lambda name: _compvis_name(name) in only)
    inner = file.content.get("state_dict") if isinstance(file.content, Mapping) else None
    state = named_tensors(path, inner if isinstance(inner, Mapping) else file.content)
    if "prospect.version" in file.metadata or "initial_embeddings" in state:
        raise CheckpointError(f"'{path}' is a learned concept, not a model; use a file with model weights.")
    if not state:
        raise CheckpointError(f"'{path}' holds no tensors; use a file with model weights.")
    return {_compvis_name(name): tensor for name, tensor in state.items()}, file.mapped


def _compvis_name(name: str) -> str:
    return _TEXT_LEVEL.sub("text_model.", _WRAPPERS.sub("", name))


def _open_folder(folder: Path) -> tuple[dict[str, Tensor], bool]:
    files = {part: (path, read_file(path)) for part, path in _folder_files(folder).items()}
    parts = {part: named_tensors(path, file.content) for part, (path, file) in files.items()}
    return to_compvis(parts), all(file.mapped for _, file in files.values())


def _copied(path: Path, state: dict[str, Tensor], mapped: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return `state` as tensors of their own, floating ones in `dtype`, without averaged weights.

    The pages of a mapped file stay in memory as long as a view of them is left, so that a large file is opened anew
    for each portion.
    """
    portions = list(_portions({key: x.nbytes for key, x in state.items() if not key.startswith("model_ema.")}))
    views = dict(state)
    state.clear()
    for keys in portions:
        if mapped and len(portions) > 1:
            views.clear()
            views = _open(path, keys)[0]
        for key in keys:
            changes = views[key].is_floating_point() and key not in SCHEDULE_BUFFERS
            state[key] = views[key].to(dtype if changes else views[key].dtype, copy=True)
    return state


def _portions(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The keys and sizes in groups of about an eighth of the bytes."""
    limit = max(_PORTION, sum(sizes.values()) // 8)
    portion: dict[str, int] = {}
    for key, size in sizes.items():
        portion[key] = size
        if sum(portion.values()) >= limit:
            yield portion
            portion = {}
    if portion:
        yield portion


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Put `state` into `model`: every weight of the model must be there with its shape, and nothing unknown.

    A parameter on the meta device becomes the tensor of `state` itself, in its dtype; any other is copied into and
    keeps its dtype and device. The schedule buffers are never loaded from the file: the configuration defines them,
    and half-precision files hold spoiled ones. They, `position_ids`, `model_ema.*`, `logvar`, `balance.mean`,
    `loss.*` and `embedding_manager.*` may be in the file or not.

    Args:
        model: any module whose state dict has the names of the CompVis layout, or of a part of it.
        state: as `read_state_dict` returns it (with a dtype for a model on the meta device, which would otherwise
            depend on the file); left as it is.
        source: the file's name, for messages.

    Raises:
        CheckpointError: another family of models, or keys that are missing, unexpected or misshapen (listed).
    """
    refuse_other_families(state, model, source)
    own = model.state_dict()
    loadable = {key for key in own if key in state and key not in SCHEDULE_BUFFERS}
    _refuse_misfits(own, state, source)

    assigned: dict[str, Tensor] = {}
    with torch.no_grad():
        for key in sorted(loadable):
            _refuse_values(key, state[key], own[key].dtype, source)
            if own[key].is_meta:
                assigned[key] = state[key]
            else:
                own[key].copy_(state[key])
    if assigned:
        model.load_state_dict(assigned, strict=False, assign=True)
    logger.debug("%s: ignored %s", source, sorted(set(state) - loadable))
    logger.info("%s: %d tensors loaded", source, len(loadable))


def _refuse_misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str | Path) -> None:
    def lacking(keys: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
        return [key for key in keys if key not in others and key not in SCHEDULE_BUFFERS and not _EXTRA.fullmatch(key)]

    problems = {
        "missing": lacking(own, state),
        "unexpected": lacking(state, own),
        "misshapen": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and key not in SCHEDULE_BUFFERS and state[key].shape != own[key].shape
        ],
    }
    listing = "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}"
        for kind, keys in problems.items()
        if keys
    )
    if listing:
        raise CheckpointError(
            f"'{source}' does not fit this model ({listing}); "
            "use the configuration this file was made with, or a file of this configuration."
        )


def _refuse_values(key: str, tensor: Tensor, wanted: torch.dtype, source: str | Path) -> None:
    """Weights that would give black images or an error in the middle of work."""
    if tensor.is_floating_point() != wanted.is_floating_point:
        raise CheckpointError(f"'{source}': {key} holds {tensor.dtype}; use a file with weights of floats.")
    # aminmax: one pass, and no copy
    if tensor.is_floating_point() and tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
        kind = str(tensor.dtype).removeprefix("torch.")
        remedy = "download it again" if kind == "float32" else "download it again, or use float32"
        raise CheckpointError(f"'{source}': {key} has values that are not finite in {kind}; {remedy}.")


def refuse_other_families(state: Mapping[str, Tensor], model: nn.Module, path: str | Path) -> None:
    """Say in words that a file is for another kind of model, before its keys are compared one by one.

    Raises:
        CheckpointError: `model` is a Stable Diffusion of some version and `state` is known to be another, or they have
            text transformers of different widths.
    """
    own = model.state_dict()
    family, width = identify(state), context_width(state)
    expected, own_width = identify(own), context_width(own)
    config = ""
    if width and own_width and width != own_width:
        (family, config), (expected, _) = (_WIDTHS.get(w, ("a model", "")) for w in (width, own_width))
        family += f" (context width {width})"
    elif family in ("unknown", expected) or expected not in _FAMILIES:
        return
    use = f"--config {config} (in main.py: --base {config}), or " if config else ""
    example = ", such as sd-v1-4.ckpt" if expected == _FAMILIES[0] else ""
    raise CheckpointError(
        f"'{path}' holds {family}, but this configuration is for {expected} (context width {own_width}); "
        f"use {use}a full checkpoint of {expected}{example}."
    )


def save_state_dict(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one step: readers see the old file or the whole new one.

    Raises:
        WriteError: no folder, no room or no right; the old file is as it was.
    """
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        tensor = tensor.detach().contiguous()
        # the format has no shared storage, so a second tensor on the same memory is written out
        tensors[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    replace_bytes(Path(path).expanduser(), save(tensors, metadata={"format": "pt", **(metadata or {})}))


def file_hash(path: str | Path) -> str:
    """Return SHA-256 (hexadecimal) of a checkpoint file, or of a diffusers folder's weight files in a fixed order.

    Raises:
        CheckpointError: there is no such file, or the folder is not a diffusers folder.
    """
    path = Path(path).expanduser()
    digest = hashlib.sha256()
    for file in _folder_files(path).values() if path.is_dir() else [path]:
        if not file.is_file():
            raise missing(file)
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _folder_files(folder: Path) -> dict[str, Path]:
    try:
        return find_weights(folder)
    except ValueError as error:
        there = ", ".join(model_files(folder)) or "none"
        raise CheckpointError(
            f"'{folder}' {error}; use a whole diffusers folder of Stable Diffusion v1, or a single file "
            f"(model files in this folder: {there})."
        ) from error
