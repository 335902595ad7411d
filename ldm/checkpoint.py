"""Checkpoint files into state dicts and models: no code is run from a file, no key is let slip.

`.ckpt` and other torch files, `.safetensors` and diffusers folders all become one dict of tensors in CompVis'
layout: `model.diffusion_model.*`, `first_stage_model.*`, `cond_stage_model.transformer.text_model.*`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ldm.files.diffusers_layout import TEXT, UNET, find_weights, to_compvis
from ldm.files.weights import CheckpointError, MappedFiles, missing, model_files, read_file
from ldm.files.writing import replace_bytes
from ldm.models.diffusion.schedule import make_betas, schedule_buffers

logger = logging.getLogger(__name__)

SCHEDULE_BUFFERS = frozenset(schedule_buffers(make_betas(0.00085, 0.012)))
# What files hold beside the weights: recomputed, unused, or (the embedding manager) kept in files of its own.
_EXTRA = re.compile(r"(.*\.)?position_ids|logvar|(model_ema|embedding_manager|balance|(first_stage_model\.)?loss)\..*")
_FAMILIES = ("Stable Diffusion v1", "Stable Diffusion 2", "Stable Diffusion XL")


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
    state = _read_folder(path) if path.is_dir() else read_file(path)
    if dtype is not None:
        mapped = MappedFiles()
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
    `model_ema.*`, `logvar`, `balance.mean`, `loss.*` and `embedding_manager.*` may be in the file or not.

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
    mapped = MappedFiles()
    with torch.no_grad():
        for key in sorted(loadable):
            _refuse_values(key, state[key], own[key].dtype, source)
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


def _refuse_values(key: str, tensor: Tensor, wanted: torch.dtype, source: str | Path) -> None:
    """Weights that would give black pictures or an error in the middle of work."""
    if tensor.is_floating_point() != wanted.is_floating_point:
        raise CheckpointError(f"'{source}': {key} holds {tensor.dtype}; use a file with weights of floats.")
    # aminmax: one pass, and no copy
    if tensor.is_floating_point() and tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
        kind = str(tensor.dtype).removeprefix("torch.")
        remedy = "download it again" if kind == "float32" else "download it again, or use float32"
        raise CheckpointError(f"'{source}': {key} has values that are not finite in {kind}; {remedy}.")


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
    replace_bytes(path, save(tensors, metadata={"format": "pt", **(metadata or {})}))


def file_hash(path: str | Path) -> str:
    """SHA-256 (hexadecimal) of a checkpoint file, or of a diffusers folder's weight files in a fixed order.

    Raises:
        CheckpointError: there is no such file, or the folder is not a diffusers folder.
    """
    path = Path(path)
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


def _read_folder(folder: Path) -> dict[str, Tensor]:
    parts = {part: read_file(file) for part, file in _folder_files(folder).items()}
    try:
        return to_compvis(parts)
    except ValueError as error:
        raise CheckpointError(f"'{folder}' {error}; use a diffusers folder of Stable Diffusion v1.") from error
