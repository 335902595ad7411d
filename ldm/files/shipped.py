"""Files that ship with the program: configurations, and the small model with its tokenizer and concepts.

They lie in the checkout, or in the installed package as in the checkout. Names are those of the checkout.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).parents[1]
IS_INSTALLED = (_PACKAGE / "shipped").is_dir()
ROOT = _PACKAGE / "shipped" if IS_INSTALLED else _PACKAGE.parent


class Model(NamedTuple):
    """A base model that has a short name: its configurations for sampling and for learning, and its weights."""

    config: str
    learning: str
    ckpt: str


MODELS = {
    "demo": Model("configs/demo/finetune.yaml", "configs/demo/finetune.yaml", "models/demo/model.safetensors"),
    "sd": Model(
        "configs/stable-diffusion/v1-inference.yaml",
        "configs/stable-diffusion/v1-finetune.yaml",
        "models/sd/sd-v1-4.ckpt",
    ),
}


def shipped(path: str | Path) -> str:
    """Return a path with `~` expanded; one that leads nowhere becomes that of the shipped file of its name."""
    path = os.path.expanduser(path)
    return path if not path or os.path.exists(path) or not (ROOT / path).exists() else str(ROOT / path)


def name_of(path: str) -> str:
    """Return the name of a base model's file that ships, which is the same everywhere; any other path as it is."""
    names = (name for model in MODELS.values() for name in model if path == str(ROOT / name))
    return next(names, path)


def command(script: str, name: str, *words: str) -> str:
    """Return a command to type: `python scripts/….py` in a checkout, `prospect NAME` where it is installed."""
    return " ".join([f"prospect {name}" if IS_INSTALLED else f"python {script}", *map(quoted, words)])


def quoted(word: str) -> str:
    """Return a word as the shell takes it; those of Windows know double quotes only."""
    if os.name == "posix":
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w@+=:,./\\-]+", word) else '"' + word.replace('"', r"\"") + '"'
