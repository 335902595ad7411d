"""Devices and seeds, and the names that LDM code expects here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm.config import instantiate_from_config as instantiate_from_config


def to_device(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """Return a CPU tensor on `device`, without waiting on CUDA; other devices may read memory that is freed by then."""
    return tensor.to(device, non_blocking=device is not None and torch.device(device).type == "cuda")


def pick_device(wanted: str | torch.device | None = None) -> torch.device:
    """Return `wanted` if it is given and usable, else `PROSPECT_DEVICE`, else CUDA, else Apple's MPS, else the CPU.

    The environment variable is for machines whose GPU is there and does not work.

    Raises:
        ValueError: a device was asked for that this machine does not have.
    """
    wanted = wanted or os.environ.get("PROSPECT_DEVICE")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if not wanted:
        return torch.device(next(kind for kind, count in counts.items() if count))
    with suppress(RuntimeError, TypeError):  # it is no device's name
        device = torch.device(wanted)
        if (device.index or 0) < counts.get(device.type, 0):
            return device
    usable = [f"cuda:{i}" for i in range(gpus)] + [kind for kind in ("mps", "cpu") if counts[kind]]
    raise ValueError(f"Device '{wanted!s:.60}' is not usable here; usable: {', '.join(usable)}.")


@contextmanager
def usual_torch(keep_meta: bool = False) -> Iterator[None]:
    """PyTorch's global state as a fresh process has it: it decides which random numbers are drawn, and what is learned.

    New tensors are float32, on the CPU and fit for autograd.

    Args:
        keep_meta: stay on the `meta` device, which holds no numbers, where that is the default.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        place = device if keep_meta and device.type == "meta" else torch.device("cpu")
        with place, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)


class _Unfilled(TorchFunctionMode):
    """Skips `torch.nn.init`, whose functions return the tensor that they are given first."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on the `meta` device and leave them unfilled: to fill them there PyTorch imports its compiler."""
    with torch.device("meta"), _Unfilled():
        yield


def mix_seed(*numbers: int) -> int:
    """Return one 63-bit seed from several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_step(batch: Mapping[str, Any]) -> None:
    """Seed PyTorch's global state for a training step by the batch's first sample; without `sample`, leave it."""
    if "sample" in batch:
        torch.manual_seed(mix_seed(0, int(batch["sample"][0])))
