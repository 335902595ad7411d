"""The base model that a concept belongs to: fingerprints and comparisons."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.files.diffusers_layout import TEXT, UNET

logger = logging.getLogger(__name__)

NAME, FINGERPRINT = "base_model", "base_model_fingerprint"  # in the metadata of a concept
_VALUES = 16


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that identify a model: a hash of the first values of every weight.

    Of the U-Net and the text transformer, rounded to float16: float32 and float16 copies of a model, and its
    files in different formats, have the same fingerprint. A model that is held in bfloat16 has another.

    Args:
        state: the model's state dict, with CompVis' key names.
    """
    digest = hashlib.sha256()
    for key in sorted(key for key in state if key.startswith((UNET, TEXT)) and state[key].is_floating_point()):
        values = state[key].detach().flatten()[:_VALUES].to("cpu", torch.float16)
        digest.update(key.encode() + str(tuple(state[key].shape)).encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def same_base(first: Mapping[str, str], second: Mapping[str, str]) -> bool | None:
    """Return whether two concepts, or a concept and a model, have one base model; None where that is not known.

    Fingerprints decide where both have one, else the names of the files without their endings.
    """
    for key in (FINGERPRINT, NAME):
        if first.get(key) and second.get(key):
            one, other = first[key], second[key]
            return one == other if key == FINGERPRINT else Path(one).stem == Path(other).stem
    return None


def describe_base(metadata: Mapping[str, str]) -> str:
    """Return how a message calls a base model: its file's name, and its fingerprint where that is known."""
    known = f" (fingerprint {metadata[FINGERPRINT]})" if metadata.get(FINGERPRINT) else ""
    return f"'{metadata.get(NAME) or 'unknown'}'{known}"


def refuse_other_base(metadata: Mapping[str, str], base: Mapping[str, str], concept: str) -> None:
    """Say so where a concept was learned for another base model.

    A concept that does not say what it was learned for (another program's) fits all. Where only the names of the
    files could be compared, that is logged.

    Args:
        metadata: the concept's.
        base: the model's, as `LatentDiffusion.base_model`.
        concept: how to call it.

    Raises:
        ValueError: it was, with both named.
    """
    same = same_base(metadata, base)
    if same is False:
        raise ValueError(
            f"{concept} was learned for the base model {describe_base(metadata)}, but this is {describe_base(base)}; "
            "use it with that model, or any_base=True (--any_base) where the two are relatives, such as a fine-tune."
        )
    if same and not (metadata.get(FINGERPRINT) and base.get(FINGERPRINT)):
        logger.warning("%s does not identify its base model; only the name was compared.", concept)
