"""Numbers that are not finite: found where they arise, without waiting for the device in every step."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.schedule import stage_of


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
            known = timesteps if self._timesteps is None else self._timesteps
            self._timesteps = torch.where(first, timesteps, known)

    def read(self) -> tuple[int, list[int]] | None:
        """The first bad step with its batch's timesteps, or None."""
        if self._step is None or (step := int(self._step)) < 0:
            return None
        return step, [] if self._timesteps is None else self._timesteps.tolist()


class FiniteGuard(pl.Callback):
    """Stops a run whose loss or weights are not finite, before anything of it is saved.

    On the CPU every loss is checked before its step is made. A GPU would have to be waited for, so there the
    losses are marked on the device, and the marks are read every `every_n_steps` and before each saving. It must be
    the first of the callbacks.

    Args:
        save_every: how often others save; then, and when `SaveLast` asks, the weights are checked, too.
    """

    def __init__(self, save_every: int, every_n_steps: int = 50) -> None:
        self.save_every = save_every
        self.every_n_steps = every_n_steps
        self._losses = FirstBad()

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.add(trainer.global_step + 1, loss.detach(), getattr(module, "timesteps", None))
        if self.reads_at_once(loss):
            self._check_losses(trainer, module)

    def reads_at_once(self, loss: Tensor) -> bool:
        """Whether nothing has to be waited for."""
        return loss.device.type == "cpu"

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.save_every == 0:
            self.check(trainer, module)
        elif trainer.global_step % self.every_n_steps == 0:
            self._check_losses(trainer, module)

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise `NotFiniteError` if a loss was, or a trained weight is, not finite."""
        self._check_losses(trainer, module)
        weights = [p.detach() for p in module.parameters() if p.requires_grad]
        if weights and not torch.stack([torch.isfinite(p).all() for p in weights]).all():
            raise NotFiniteError(_sentence(f"The weights are not finite after step {trainer.global_step}", trainer))

    def _check_losses(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (found := self._losses.read()) is None:
            return
        step, timesteps = found
        where = ""
        if timesteps and (stages := getattr(module, "num_stages", None)):
            seen = sorted({int(stage_of(t, stages, module.num_timesteps)) for t in timesteps})
            where = f" (stage{'s' * (len(seen) > 1)} {', '.join(map(str, seen))})"
        raise NotFiniteError(_sentence(f"The loss is not finite at step {step}{where}", trainer))


def _sentence(what: str, trainer: pl.Trainer) -> str:
    return (
        f"{what}; nothing of it was saved, '{trainer.default_root_dir}' holds the last good state. "
        "Learn more slowly (model.base_learning_rate), and with model.params.frozen_dtype=float32 or bfloat16."
    )


def refuse_bad_latents(watch: FirstBad, num_stages: int, num_timesteps: int) -> None:
    """Raise `NotFiniteError` if latents, watched by timestep, were infinite or NaN."""
    if (found := watch.read()) is None:
        return
    stage = stage_of(found[0], num_stages, num_timesteps)
    raise NotFiniteError(
        f"The latents are not finite from timestep {found[0]} on (stage {stage}); use float32 or bfloat16 weights "
        "(dtype), a smaller guidance scale, or another embedding."
    )
