"""Seeds from sample numbers, which make a resumed run the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_step(batch: Mapping[str, Any]) -> None:
    """Seed PyTorch's global state for a training step by the batch's first sample; without `sample`, leave it."""
    if "sample" in batch:
        torch.manual_seed(mix_seed(0, int(batch["sample"][0])))
