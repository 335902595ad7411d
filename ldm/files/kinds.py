"""Recognise kinds of files by its first bytes, or by the names of the tensors in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.files.diffusers_layout import TEXT, UNET

_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def foreign_kind(head: bytes) -> str:
    """Return what came instead of any file that was wanted, by its first 512 bytes, and the remedy; '' for no such."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty; download it again"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "is a web page, perhaps of a login; log in or accept the licence, then download the file"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer and not the file itself; run `git lfs pull`"
    return ""


def is_utf8(path: str | Path) -> bool:
    """Return whether the name of a file can be written into other files; on Linux it may be any bytes."""
    return not re.search("[\ud800-\udfff]", str(path))


def is_heic(head: bytes) -> bool:
    """Return whether a file begins like the images of an iPhone."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC


def is_image(head: bytes) -> bool:
    """Return whether a file begins like one of the usual image formats."""
    return head.startswith(_IMAGES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or is_heic(head)


def context_width(state: Mapping[str, Tensor]) -> int | None:
    """Return the width of the text features that the U-Net's cross-attention reads (768 for Stable Diffusion v1)."""
    widths = (w.shape[1] for key, w in state.items() if key.endswith("attn2.to_k.weight") and w.ndim == 2)
    return next(widths, None)


def identify(state: Mapping[str, Tensor]) -> str:
    """Return what a state dict is, from its key names and the context width.

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
    is_vector = len(state) == 1 and all(1 <= tensor.ndim <= 2 for tensor in state.values())
    if is_vector or has("string_to_param.") or set(state) == {"clip_l", "clip_g"}:
        return "a textual inversion embedding"
    return "unknown"
