"""A weighting of the loss for training from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LossBalance(nn.Module):
    """Divides losses by their running mean at the same noise level, so that every level counts alike.

    Without it the large errors at low noise drown what is decided at high noise: position and shape.
    """

    mean: Tensor

    def __init__(self, bins: int = 20, decay: float = 0.98) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(bins))

    def forward(self, losses: Tensor, time: Tensor) -> Tensor:
        """Return the balanced losses (B,), of losses (B,) at times (B,) in [0, 1)."""
        place = (time * len(self.mean)).long()
        # one after the other, as several samples may share a level; by index operations, which need no waiting
        for level, loss in zip(place.split(1), losses.detach().split(1), strict=True):
            old = self.mean[level]
            self.mean[level] = torch.where(old > 0, self.decay * old + (1 - self.decay) * loss, loss)
        return losses / self.mean[place].clamp(min=1e-8)
