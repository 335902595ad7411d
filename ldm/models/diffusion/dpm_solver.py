"""DPM-Solver++(2M): a second-order multistep solver (Lu et al. 2022, "DPM-Solver++", arXiv 2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampling import Callback, Denoiser, Guided, NoiseSource, Sampler, Schedule


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    timesteps: Schedule,
    alphas: Schedule,
    alphas_prev: Schedule,
    restarts: Sequence[Sequence[bool]] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Denoise x (B, C, H, W) from the last entry of the schedule to the first (algorithm 2).

    With λ = log(α/σ) and h the step in λ, x' = (σ'/σ) x + α' (1 - e^-h) D, where D extrapolates from the predicted x_0
    and the one before it.

    Args:
        timesteps, alphas, alphas_prev: increasing schedule, S entries each; an `alphas_prev` of 1 is a clean image.
        restarts: (S, B or 1), whether the step from an entry is of first order, D = x_0, as the first step and one to
            a clean image always are: where the prompt is another than in the call before, which tells nothing of it.
    """
    before: Tensor | None = None  # x_0 of the call before
    h_before = 0.0
    for step, i in enumerate(reversed(range(len(timesteps)))):
        t, a, a_prev = int(timesteps[i]), float(alphas[i]), float(alphas_prev[i])
        x_0 = target = (x - (1 - a) ** 0.5 * denoise(x, t)) / a**0.5
        decay = ((1 - a_prev) / (1 - a) * a / a_prev) ** 0.5  # e^-h
        h = -math.log(decay) if decay > 0 else math.inf
        if before is not None and h < math.inf:
            shares = [h / (2 * h_before) * (not restart) for restart in (restarts[i] if restarts else [False])]
            share = shares[0] if len(set(shares)) == 1 else x.new_tensor(shares).view(-1, 1, 1, 1)
            target = x_0 + share * (x_0 - before)
        x = ((1 - a_prev) / (1 - a)) ** 0.5 * x + a_prev**0.5 * (1 - decay) * target
        before, h_before = x_0, h
        if callback is not None and (changed := callback(step, t, x, x_0)) is not None:
            x = changed
    return x


class DPMSolverSampler(Sampler):
    """LDM-style class over `dpmpp_2m`, to a clean image; of first order wherever the prompt or its guidance changes."""

    spacing, largest_eta = "trailing", 0.0

    def run(self, denoise: Denoiser, x: Tensor, steps: int, noise: NoiseSource, callback: Callback | None) -> Tensor:
        times, alphas = self.ddim_timesteps[:steps], self.ddim_alphas[:steps]
        alphas_prev = np.append(1.0, alphas[:-1])
        restarts = None
        if isinstance(denoise, Guided):
            restarts = [denoise.differs(int(t), int(before)) for t, before in zip(times, times[1:], strict=False)]
            restarts.append([True])  # the entry that is denoised first
        return dpmpp_2m(denoise, x, times, alphas, alphas_prev, restarts, callback)
