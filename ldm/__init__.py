"""Latent diffusion with per-stage prompts: a port of ProSpect on a frozen Stable Diffusion v1.

The public names are imported when they are asked for, since PyTorch takes seconds.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.conditioning.presets import joint as joint
    from ldm.conditioning.presets import preset as preset
    from ldm.embeddings import Concept as Concept
    from ldm.embeddings import load_concept as load_concept
    from ldm.embeddings import save_concept as save_concept
    from ldm.generate import generate_image as generate_image
    from ldm.generate import load_model_from_config as load_model_from_config
    from ldm.generate import main as main
    from ldm.generate import read_parameters as read_parameters
    from ldm.generate import save_picture as save_picture
    from ldm.request import Request as Request

__version__ = "0.1.0"

_NAMES = {
    "embeddings": ("Concept", "load_concept", "save_concept"),
    "generate": ("generate_image", "load_model_from_config", "main", "read_parameters", "save_picture"),
    "prompts": ("joint", "preset"),
    "request": ("Request",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_HOMES]

# OpenMP reads this when torch is imported. Threads that spin while they wait crawl as soon as another program wants a
# core, and gain nothing where none does: docs/benchmarks.md.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute '{name}'")
    return getattr(import_module(f"ldm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
