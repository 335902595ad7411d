"""Small layers shared by the U-Net and the autoencoder."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Gradients pass through float16 layers enlarged by this power of two: those of an image's mean loss would vanish.
FLOAT16_GRADIENT_SCALE = 2.0**10


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def enter(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as layers in `dtype` read it; float16 layers give back enlarged gradients, see `leave`."""
    if dtype == torch.float16 and x.requires_grad:
        x = ScaleGradient.apply(x.float(), 1 / FLOAT16_GRADIENT_SCALE)
    return x.to(dtype)


def leave(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what layers in `dtype` give, as float32; the gradient that enters float16 layers here is enlarged.

    What counts is the dtype of the layers' weights, as in `enter`: under autocast to float16 the trainer's own scaler
    enlarges the gradients of float32 weights.
    """
    out = x.float()
    return ScaleGradient.apply(out, FLOAT16_GRADIENT_SCALE) if dtype == torch.float16 and x.requires_grad else out


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Return the sinusoidal embedding (B, dim) float32 of t (B,); cosines first, then sines (Vaswani et al. 2017)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero, so that the block it closes starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
