"""Train: learn ProSpect embeddings against a frozen model, or train a small model from scratch.

    python main.py --base configs/stable-diffusion/v1-finetune.yaml -t --actual_resume CKPT \\
        -n NAME --gpus 0, --data_root DIR
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ldm.cli.train import run


def __getattr__(name: str) -> object:
    """Give the classes that the reference's configurations look for here."""
    from ldm.config import ALIASES, get_class

    if f"main.{name}" not in ALIASES:
        raise AttributeError(f"module 'main' has no attribute '{name}'")
    return get_class(f"main.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
