"""The stage rule: which stage of denoising a timestep belongs to. Everything calls this one.

Timesteps 0 … T-1 are cut into S equal parts. Stage 0 is the end of sampling (low noise, fine detail), stage S-1 its
start (high noise, layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Timestep = TypeVar("Timestep", int, "Tensor")


def stage_of(t: Timestep, num_stages: int, num_timesteps: int = 1000) -> Timestep:
    """Return floor(t · S / T), the stage of a raw DDPM timestep t (int or tensor), 0 ≤ t < T."""
    return t * num_stages // num_timesteps


def at_stage(values: Sequence[float], t: int, num_timesteps: int = 1000) -> float:
    """Return the value, of one for each stage, that holds at timestep t."""
    return values[stage_of(t, len(values), num_timesteps)]


def timesteps_of(stage: int, num_stages: int, num_timesteps: int = 1000) -> range:
    """Return the timesteps t with `stage_of(t) == stage`."""
    first, end = (-(-s * num_timesteps // num_stages) for s in (stage, stage + 1))
    return range(first, end)


def matching_stage(stage: int, num_stages: int, other_stages: int) -> int:
    """Return the stage, of `other_stages`, in which the middle of `stage` (of `num_stages`) lies."""
    return stage_of(2 * stage + 1, other_stages, 2 * num_stages)
