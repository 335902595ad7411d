"""Stop a run whose loss or weights are no longer finite, before anything of it is saved."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.conditioning.stages import stage_of
from ldm.models.diffusion.finite import FirstBad, NotFiniteError


class FiniteGuard(pl.Callback):
    """Stop a run whose loss or weights are not finite, before anything of it is saved.

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
        """Return whether nothing has to be waited for."""
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

    def _check_losses(self, trainer: pl.Trainer, module: Any) -> None:
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
