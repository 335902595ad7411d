"""Detect NaN and inf without a host synchronisation per step."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.conditioning.stages import stage_of


class NotFiniteError(ValueError):
    """Infinite or NaN values; one sentence with the step, the stages where they are known, and the remedy."""


class FirstBad:
    """Remembers, on the device, at which step values first were not finite; reading it is what waits."""

    def __init__(self) -> None:
        self._step: Tensor | None = None
        self._timesteps: Tensor | None = None

    def add(self, step: int, values: Tensor, timesteps: Tensor | None = None) -> None:
        """Look at any tensor; `timesteps` (B,), always of one length, are kept with the first bad step."""
        bad = ~torch.isfinite(values).all()
        if self._step is None:
            self._step = torch.full_like(bad, -1, dtype=torch.long)
        first = bad & (self._step < 0)
        self._step = torch.where(first, step, self._step)
        if timesteps is not None:
            self._timesteps = torch.where(first, timesteps, timesteps if self._timesteps is None else self._timesteps)

    def read(self) -> tuple[int, list[int]] | None:
        """Return the first bad step with its batch's timesteps, or None."""
        if self._step is None or (step := int(self._step)) < 0:
            return None
        return step, [] if self._timesteps is None else self._timesteps.tolist()


def refuse_bad_latents(watch: FirstBad, num_stages: int, num_timesteps: int) -> None:
    """Raise `NotFiniteError` if latents, watched by timestep, were infinite or NaN."""
    if found := watch.read():
        t = found[0]
        raise NotFiniteError(
            f"The latents are not finite from timestep {t} on (stage {stage_of(t, num_stages, num_timesteps)}); use "
            "float32 or bfloat16 weights (dtype), a smaller guidance scale, or another embedding."
        )
