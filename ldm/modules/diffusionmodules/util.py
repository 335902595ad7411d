"""Small layers shared by the U-Net and the autoencoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding (B,) -> (B, dim) float32; cosines first, then sines (Vaswani et al. 2017)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero, so that the block it closes starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
