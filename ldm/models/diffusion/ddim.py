"""DDIM (Song et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.models.diffusion.sampling import Callback, Denoiser, NoiseSource, Sampler, Schedule


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Schedule,
    alphas: Schedule,
    alphas_prev: Schedule,
    sigmas: Schedule,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Denoise x (B, C, H, W) from the last entry of the schedule to the first (eq. 12).

    Args:
        timesteps, alphas, alphas_prev, sigmas: increasing schedule, S entries each (`ldm.models.diffusion.schedule`).
        noise: gives the noise of a step; needed where sigmas are not 0.
    """
    for step, i in enumerate(reversed(range(len(timesteps)))):
        t, a, a_prev, sigma = int(timesteps[i]), float(alphas[i]), float(alphas_prev[i]), float(sigmas[i])
        eps = denoise(x, t)
        x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_prev**0.5 * x_0 + (1 - a_prev - sigma**2) ** 0.5 * eps
        if sigma > 0 and noise is not None:
            x = x + sigma * noise()
        if callback is not None and (changed := callback(step, t, x, x_0)) is not None:
            x = changed
    return x


class DDIMSampler(Sampler):
    """LDM's sampler class, over `ddim`."""

    def run(self, denoise: Denoiser, x: Tensor, steps: int, noise: NoiseSource, callback: Callback | None) -> Tensor:
        timesteps, alphas = self.ddim_timesteps[:steps], self.ddim_alphas[:steps]
        alphas_prev, sigmas = self.ddim_alphas_prev[:steps], self.ddim_sigmas[:steps]
        return ddim(denoise, x, timesteps, alphas, alphas_prev, sigmas, noise, callback)
