"""Small networks trained from scratch on the rendered world, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn

from ldm.models.autoencoder import cosine_to_zero


def convolutions(channels: Sequence[int], first_stride: int) -> list[nn.Module]:
    """Return layers (B, 3, R, R) -> (B, C, R', R'); each convolution after the first halves the resolution."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise((3, *channels))):
        stride = 2 if i else first_stride
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.GroupNorm(8, after), nn.GELU()]
    return layers


def adamw(module: pl.LightningModule, learning_rate: float, beta2: float) -> OptimizerLRScheduler:
    """Return AdamW with a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=(0.9, beta2), weight_decay=0.05)
    schedule: Any = cosine_to_zero(optimizer, module.trainer)
    return {"optimizer": optimizer, "lr_scheduler": schedule}
