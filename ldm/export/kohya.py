"""P+ as kohya's XTI scripts have it: one file with a tensor (n, D) for each cross-attention layer.

Source: kohya-ss/sd-scripts, train_textual_inversion_XTI.py (`save_weights`, `load_weights`).
"""

from __future__ import annotations

from pathlib import Path

from ldm.checkpoint import save_state_dict
from ldm.embeddings import Concept
from ldm.files.embedding_formats import XTI_LAYERS


def paths(folder: Path, name: str) -> list[Path]:
    """Where `save` writes; its program takes the file's name for the token."""
    return [folder / f"{name}.safetensors"]


def check_exports(concept: Concept) -> None:
    """Raise `ValueError` unless its program can read the concept."""
    if concept.table.shape[:2] != (1, len(XTI_LAYERS)):
        wanted = f"a vector for each of {len(XTI_LAYERS)} U-Net layers and none for stages"
        raise ValueError(f"kohya's XTI files have {wanted}; this concept has {concept}.")


def save(concept: Concept, folder: Path, name: str, placeholder: str) -> None:
    """Write the file of a concept that `check_exports` accepts."""
    layers = dict(zip(XTI_LAYERS, concept.table[0].cpu(), strict=True))
    save_state_dict(layers, paths(folder, name)[0], concept.metadata | {"placeholder": placeholder})
