"""First stages as Lightning modules, which learn to reconstruct images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.first_stage import DiagonalGaussianDistribution, FirstStage, KLFirstStage, VQFirstStage
from ldm.util import seed_step

__all__ = ["AutoencoderKL", "DiagonalGaussianDistribution", "FirstStage", "VQModelInterface", "cosine_to_zero"]


class AutoencoderTraining(FirstStage, pl.LightningModule):
    """Training by L1, squared error and the regulariser's own weight."""

    learning_rate = 1e-4

    def _loss(self, batch: Mapping[str, Any], split: str) -> Tensor:
        images = batch[self.image_key].permute(0, 3, 1, 2)  # (B, H, W, 3) as data sets give it
        reconstructions, regulariser = self.reconstruct(images)
        mse = F.mse_loss(reconstructions, images)
        loss = F.l1_loss(reconstructions, images) + self.mse_weight * mse + regulariser
        psnr = 10 * torch.log10(4.0 / mse.detach())  # images span 2 units, so the peak power is 4
        values = {"rec_loss": loss.detach(), "regulariser": regulariser.detach(), "psnr": psnr}
        for name, value in values.items():
            self.log(f"{split}/{name}", value, prog_bar=name == "psnr", batch_size=len(images))
        return loss

    def training_step(self, batch: Mapping[str, Any], _: int) -> Tensor:
        seed_step(batch)
        return self._loss(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], _: int) -> None:
        self._loss(batch, "val")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))
        return {"optimizer": optimizer, "lr_scheduler": cosine_to_zero(optimizer, self.trainer)}

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
        images = batch[self.image_key].permute(0, 3, 1, 2)
        return {"inputs": images, "reconstruction": self.reconstruct(images)[0]}


class AutoencoderKL(KLFirstStage, AutoencoderTraining):
    """A KL first stage to be trained; parameters as in the reference's `first_stage_config`."""


class VQModelInterface(VQFirstStage, AutoencoderTraining):
    """A VQ first stage to be trained."""


def cosine_to_zero(optimizer: torch.optim.Optimizer, trainer: pl.Trainer, warmup: int = 200) -> dict[str, Any]:
    """Return Lightning's dict of a linear warm-up and a half cosine that is zero at the trainer's `max_steps`."""
    total = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
    warmup = min(warmup, max(1, total // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return float(0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * progress)))

    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
