"""A small CLIP (Radford et al. 2021), trained on captioned images to give a small model its text transformer.

Trained first and then kept frozen, as Stable Diffusion does with CLIP: a U-Net learns to follow captions much
sooner from a text transformer that already tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from evaluation.networks import adamw, convolutions
from ldm.conditioning.prompts import PromptReader
from ldm.util import instantiate_from_config


class ImageTower(nn.Module):
    """Strided convolutions, then a linear layer on all positions; (B, 3, R, R) -> (B, D)."""

    def __init__(self, resolution: int, width: int, channels: Sequence[int] = (32, 64, 128, 128)) -> None:
        super().__init__()
        self.features = nn.Sequential(*convolutions(channels, first_stride=2), nn.Flatten())
        self.projection = nn.Linear(channels[-1] * (resolution // 2 ** len(channels)) ** 2, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.features(images))


class CLIP(pl.LightningModule):
    """Text and image towers trained with the symmetric contrastive loss.

    The text tower is the `cond_stage_config` of the diffusion model that will use it, and its weights are saved
    under `cond_stage_model.`.
    """

    def __init__(self, cond_stage_config: Mapping[str, Any], resolution: int = 64) -> None:
        super().__init__()
        self.learning_rate = 1e-3
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        width = self.cond_stage_model.width
        self.image_tower = ImageTower(resolution, width)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.6))  # log(1 / 0.07), as in the paper

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, D) of images (B, 3, R, R) in [-1, 1]."""
        return F.normalize(self.image_tower(images), dim=-1)

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return unit vectors (B, D) of captions, read off at the end mark."""
        encoder = self.cond_stage_model
        reader = PromptReader(encoder.tokenizer, {}, 1, encoder.max_length)
        slots = reader.read(captions)[0].to(self.device)  # (B, L)
        ends = (slots == encoder.tokenizer.eos_token_id).int().argmax(dim=1)  # padding is the end mark too
        hidden = encoder(slots)
        return F.normalize(self.text_projection(hidden[torch.arange(len(slots)), ends]), dim=-1)

    def _loss(self, batch: Mapping[str, Any], split: str) -> Tensor:
        images = self.encode_image(batch["image"].permute(0, 3, 1, 2))
        texts = self.encode_text(batch["caption"])
        similarity = self.log_scale.exp().clamp(max=100.0) * images @ texts.T  # (B, B)
        target = torch.arange(len(images), device=self.device)
        loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        correct = (similarity.argmax(dim=1) == target).float().mean()
        self.log_dict({f"{split}/loss": loss.detach(), f"{split}/correct": correct}, batch_size=len(images))
        self.log("correct", correct, prog_bar=True, logger=False)
        return loss

    def training_step(self, batch: Mapping[str, Any], _: int) -> Tensor:
        return self._loss(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], _: int) -> None:
        self._loss(batch, "val")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw(self, self.learning_rate, beta2=0.98)
