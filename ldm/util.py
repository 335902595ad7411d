"""Names that LDM code expects here, and the choice of device."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.config import instantiate_from_config

__all__ = ["instantiate_from_config", "pick_device", "to_device"]


def to_device(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """A CPU tensor on `device`, without waiting on CUDA; others may read memory that is no longer the tensor's."""
    return tensor.to(device, non_blocking=device is not None and torch.device(device).type == "cuda")


def pick_device(wanted: str | torch.device | None = None) -> torch.device:
    """`wanted` if it is given and usable, else CUDA, else Apple's MPS, else the CPU.

    Raises:
        ValueError: a device was asked for that this machine does not have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if wanted is None:
        return torch.device(next(kind for kind, count in counts.items() if count))
    device = torch.device(wanted)
    if (device.index or 0) >= counts.get(device.type, 0):
        usable = [f"cuda:{i}" for i in range(gpus)] + [kind for kind in ("mps", "cpu") if counts[kind]]
        raise ValueError(f"Device '{device}' is not usable here; usable: {', '.join(usable)}.")
    return device
