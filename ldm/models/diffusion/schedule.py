"""The noise schedule: betas, cumulative products and sampler timesteps.

Everything is computed once, in float64, on the host. T is the number of training timesteps (1000).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def make_betas(linear_start: float, linear_end: float, timesteps: int = 1000) -> np.ndarray:
    """Return betas (T,) float64, linear in their square roots ("scaled linear", Stable Diffusion v1)."""
    return np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2


def schedule_buffers(betas: np.ndarray) -> dict[str, Tensor]:
    """Return the 12 buffers (T,) float32 of a CompVis checkpoint, in its order (Ho et al. 2020, eq. 4, 6, 7)."""
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1.0 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod - 1.0),
        "posterior_variance": posterior_variance,
        # the variance at t = 0 is 0, so its logarithm is clipped
        "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
        "posterior_mean_coef2": (1.0 - alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - alphas_cumprod),
    }
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in buffers.items()}


def vlb_weights(betas: np.ndarray) -> Tensor:
    """Return the weights (T,) float32 of the variational bound for eps-prediction; logged only (train/loss_vlb)."""
    buffers = schedule_buffers(betas)
    betas32 = buffers["betas"]
    alphas = torch.tensor(1.0 - betas, dtype=torch.float32)
    weights = betas32**2 / (2 * buffers["posterior_variance"] * alphas * (1 - buffers["alphas_cumprod"]))
    weights[0] = weights[1]  # the posterior variance at t = 0 is 0
    return weights


def at(values: Tensor, t: Tensor) -> Tensor:
    """Return entries t (B,) of a schedule buffer (T,), shaped (B, 1, 1, 1)."""
    return values[t].view(-1, 1, 1, 1)


def ddim_timesteps(steps: int, num_timesteps: int = 1000, spacing: str = "leading") -> np.ndarray:
    """Return exactly `steps` increasing timesteps, evenly spaced.

    Args:
        spacing: `leading`, floor(i·T/S) + 1, equal to the reference (`arange(0, T, T // S) + 1`) wherever S divides T;
            elsewhere the reference makes more steps than asked, or leaves the schedule. Or `trailing`, round(i·T/S) - 1
            for i = 1 … S (Lin et al. 2024, section 3.3), which begins at T - 1, where pure noise belongs.

    Raises:
        ValueError: `steps` is not in 1..T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"The number of sampling steps must be in 1..{num_timesteps}, not {steps}.")
    if spacing == "trailing":
        return np.round(np.arange(1, steps + 1) * num_timesteps / steps).astype(int) - 1
    timesteps = np.arange(steps) * num_timesteps // steps
    return timesteps + 1 if timesteps[-1] + 1 < num_timesteps else timesteps


def ddim_parameters(
    alphas_cumprod: np.ndarray, timesteps: np.ndarray, eta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (alphas, alphas_prev, sigmas), each (S,), for DDIM (Song et al. 2021, eq. 16).

    `alphas_prev[i]` is the cumulative alpha that step i leads to; the last step (i = 0) leads to that of t = 0.
    """
    alphas = alphas_cumprod[timesteps]
    alphas_prev = np.concatenate([alphas_cumprod[:1], alphas_cumprod[timesteps[:-1]]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    return alphas, alphas_prev, sigmas
