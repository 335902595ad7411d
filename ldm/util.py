"""Names that LDM code expects here, and the choice of device."""

from __future__ import annotations

import torch

from ldm.config import instantiate_from_config

__all__ = ["instantiate_from_config", "pick_device"]


def pick_device(wanted: str | torch.device | None = None) -> torch.device:
    """`wanted` if it is given and usable, else CUDA, else Apple's MPS, else the CPU.

    Raises:
        ValueError: a device was asked for that this machine does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted is None:
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    device = torch.device(wanted)
    if not available.get(device.type, False):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise ValueError(f"Device '{device}' is not usable here; usable: {usable}.")
    return device
