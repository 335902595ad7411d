"""NeTI's own files: `mapper-NAME.pt` and `learned_embeds-NAME.bin`, as its `scripts/inference.py` reads them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ldm.embeddings import Concept
from ldm.files.writing import replacing_set
from ldm.methods.neti import FREQUENCIES, NeTIMapper, NeTISettings, load_mapper

_HOME = "models.positional_encoding"  # the module of its classes


def paths(folder: Path, name: str) -> list[Path]:
    """Where `save` writes."""
    return [folder / f"mapper-{name}.pt", folder / f"learned_embeds-{name}.bin"]


def check_exports(concept: Concept) -> None:
    """Raise `ValueError` unless its program can read the concept."""
    if concept.method != "neti":
        raise ValueError(f"A concept of {concept.method} has no file for NeTI's program: it holds no mapper of NeTI.")
    settings = load_mapper(concept.tensors, concept.metadata).settings
    is_joint = settings.target_norm is None or settings.normalize == "joint"
    if (settings.num_layers, settings.width) != (16, 768) or not is_joint:
        raise ValueError("NeTI's program is for Stable Diffusion v1 and joint normalisation, which this is not.")


def save(concept: Concept, folder: Path, name: str, placeholder: str) -> None:
    """Write both files of a concept that `check_exports` accepts, or none.

    The vector of the second makes the token known and is not used otherwise.
    """
    mapper = load_mapper(concept.tensors, concept.metadata)
    state = {key: x for key, x in mapper.state_dict().items() if key != "w"}
    config = _config(mapper.settings, concept, placeholder)
    word = torch.full((mapper.width,), (mapper.settings.target_norm or 0.4) * mapper.width**-0.5)
    with replacing_set(folder) as staging:
        first, second = paths(staging, name)
        with _encoder(mapper) as encoder:
            torch.save({"state_dict": state, "cfg": config, "encoder": encoder}, first)
        torch.save({placeholder: word}, second)


@contextmanager
def _encoder(mapper: NeTIMapper) -> Iterator[nn.Module]:
    """The module that its program unpickles, of a class that has the name of the one there while it is written."""
    settings = mapper.settings
    kind = "NeTIPositionalEncoding" if settings.positional_encoding else "BasicEncoder"
    home = ModuleType(_HOME)
    setattr(home, kind, type(kind, (nn.Module,), {"__module__": _HOME}))
    encoder: nn.Module = getattr(home, kind)()
    if settings.positional_encoding:
        own = {"sigma_t": settings.sigma_t, "sigma_l": settings.sigma_l, "num_w": FREQUENCIES, "w": mapper.w.clone()}
    else:
        own = {"normalized_timesteps": torch.arange(1000) / 999 * 2 - 1}
        own["normalized_unet_layers"] = torch.arange(mapper.num_layers) / (mapper.num_layers - 1) * 2 - 1
    encoder.__dict__.update(own)
    before = sys.modules.copy()
    sys.modules.update({"models": ModuleType("models"), _HOME: home})
    try:
        yield encoder
    finally:
        for name in ("models", _HOME):
            del sys.modules[name]
            if name in before:
                sys.modules[name] = before[name]


def _config(settings: NeTISettings, concept: Concept, placeholder: str) -> dict[str, Any]:
    """The configuration that its reader asks for; what it does not say has its defaults there."""
    word = concept.metadata.get("init_word", "object")
    return {
        "log": {"exp_name": "export"},
        "data": {"train_data_dir": "data", "placeholder_token": placeholder, "super_category_token": word},
        "model": {
            "use_nested_dropout": settings.nested_dropout is not None,
            "nested_dropout_prob": settings.nested_dropout or 0.5,
            "normalize_mapper_output": settings.target_norm is not None,
            "target_norm": settings.target_norm,
            "use_positional_encoding": settings.positional_encoding,
            "pe_sigmas": {"sigma_t": settings.sigma_t, "sigma_l": settings.sigma_l},
            "num_pe_time_anchors": settings.num_anchors,
            "output_bypass": settings.output_bypass,
        },
    }
