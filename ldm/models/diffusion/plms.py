"""PLMS: pseudo linear multi-step (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds")."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.models.diffusion.sampling import Callback, Denoiser, NoiseSource, Sampler, Schedule


@torch.no_grad()
def plms(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Schedule,
    alphas: Schedule,
    alphas_prev: Schedule,
    callback: Callback | None = None,
) -> Tensor:
    """Denoise x (B, C, H, W) from the last entry of the schedule to the first; S + 1 calls of the denoiser.

    The first step is an improved Euler step, the next ones use up to three older predictions (eq. 12). Each
    call reads the prompt of its own timestep.
    """
    older: list[Tensor] = []  # earlier noise predictions, the latest first

    def move(x: Tensor, eps: Tensor, i: int) -> tuple[Tensor, Tensor]:
        a, a_prev = float(alphas[i]), float(alphas_prev[i])
        x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        return a_prev**0.5 * x_0 + (1 - a_prev) ** 0.5 * eps, x_0

    for step, i in enumerate(reversed(range(len(timesteps)))):
        t = int(timesteps[i])
        eps = denoise(x, t)
        if not older:
            ahead, _ = move(x, eps, i)
            combined = (eps + denoise(ahead, int(timesteps[max(i - 1, 0)]))) / 2
        elif len(older) == 1:
            combined = (3 * eps - older[0]) / 2
        elif len(older) == 2:
            combined = (23 * eps - 16 * older[0] + 5 * older[1]) / 12
        else:
            combined = (55 * eps - 59 * older[0] + 37 * older[1] - 9 * older[2]) / 24
        x, x_0 = move(x, combined, i)
        older = [eps, *older[:2]]
        if callback is not None and (changed := callback(step, t, x, x_0)) is not None:
            x = changed
    return x


class PLMSSampler(Sampler):
    """LDM's sampler class, over `plms`."""

    largest_eta = 0.0

    def run(self, denoise: Denoiser, x: Tensor, steps: int, noise: NoiseSource, callback: Callback | None) -> Tensor:
        timesteps, alphas, alphas_prev = self.ddim_timesteps, self.ddim_alphas, self.ddim_alphas_prev
        return plms(denoise, x, timesteps[:steps], alphas[:steps], alphas_prev[:steps], callback)
