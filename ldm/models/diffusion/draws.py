"""Timesteps and noise of training samples: functions of the run's seed and a sample's number only.

A resumed run therefore draws what the uninterrupted one would have drawn, in whatever batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning.stages import timesteps_of
from ldm.models.diffusion.sampling import draw_noise
from ldm.util import mix_seed


@dataclass(frozen=True)
class Draws:
    """Draws on the host.

    Args:
        by_stage: draw sample n's timestep from stage n mod S instead of from all T timesteps.
    """

    seed: int
    num_stages: int
    num_timesteps: int
    by_stage: bool = False

    def batch(self, numbers: Sequence[int], latent_shape: torch.Size, validating: bool = False) -> dict[str, Tensor]:
        """Return `t` (B,), and `posterior_noise` and `noise` (B, C, H, W), for the samples of these numbers."""
        t, posterior_noise, noise = [], [], []
        for number in numbers:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, number, validating))
            t.append(self.timestep(number, generator))
            posterior_noise.append(draw_noise([generator], (1, *latent_shape), "cpu")[0])
            noise.append(draw_noise([generator], (1, *latent_shape), "cpu")[0])
        return {"t": torch.stack(t), "posterior_noise": torch.stack(posterior_noise), "noise": torch.stack(noise)}

    def timestep(self, number: int, generator: torch.Generator) -> Tensor:
        """Return a scalar timestep, uniform over all, or over those of stage `number` mod S."""
        within = range(self.num_timesteps)
        if self.by_stage:
            within = timesteps_of(number % self.num_stages, self.num_stages, self.num_timesteps)
        return torch.randint(within.start, within.stop, (), generator=generator, device="cpu")
