"""What `ldm.generate.main` can be asked for: one sentence with the remedy for anything else."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING

from ldm.files.images import check_fit
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling import MAX_SCALE, Sampler

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "plms": PLMSSampler}


def check_arguments(
    model: LatentDiffusion,
    *,
    ddim_steps: int,
    strength: float,
    ddim_eta: float,
    scale: float,
    seed: int,
    n_iter: int,
    n_samples: int,
    n_rows: int,
    height: int,
    width: int,
    sampler: str,
    resize: str,
) -> None:
    """Raise `ValueError`, with the remedy, for what `main` cannot do; no weights are needed."""
    whole = {"ddim_steps": ddim_steps, "seed": seed, "n_iter": n_iter, "n_samples": n_samples, "n_rows": n_rows}
    for name, value in (whole | {"height": height, "width": width}).items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, not {value!r}.")
    for name, value in {"strength": strength, "ddim_eta": ddim_eta, "scale": scale}.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, not {value!r}.")
    if sampler not in SAMPLERS:
        raise ValueError(f"Unknown sampler '{sampler}'; there are {', '.join(SAMPLERS)}.")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be in 0..1, not {strength}: 0 keeps the content picture, 1 gives it up.")
    if n_iter < 1 or n_samples < 1:
        raise ValueError(f"n_iter and n_samples must be at least 1, not {n_iter} and {n_samples}.")
    if n_rows < 0:
        raise ValueError(f"n_rows must be at least 1, or 0 for as square as possible, not {n_rows}.")
    if not 0 <= seed <= 2**63 - n_iter * n_samples:
        raise ValueError(f"seed must be in 0..{2**63 - n_iter * n_samples}, not {seed}; picture i has seed + i.")
    if not 1 <= ddim_steps <= model.num_timesteps:
        raise ValueError(f"ddim_steps must be in 1..{model.num_timesteps}, not {ddim_steps}.")
    if not 0 <= scale <= MAX_SCALE:
        raise ValueError(f"scale must be in 0..{MAX_SCALE}, not {scale}; 1 means no guidance, 5 to 10 are usual.")
    unit = model.size_unit
    for name, size in (("height", height), ("width", width)):
        if size < unit or size % unit:
            nearest = max(unit, round(size / unit) * unit)
            raise ValueError(f"{name} must be a multiple of {unit} for this model, not {size}; nearest: {nearest}.")
    check_fit(width, height, resize, "bicubic")
