"""Reads the attributes of images of the rendered world: the judge of what a model generates there.

It shares nothing with the generative model: trained on rendered images only, by labels, not by captions.
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
from evaluation.world.attributes import FACTORS
from ldm.util import seed_step


class AttributeClassifier(pl.LightningModule):
    """One convolutional trunk and a linear head for each factor of the rendered world.

    Training images are disturbed (noise, blur, contrast), since the images it is made for are generated ones.
    Images of other sizes are averaged to `resolution`, which each layer after the first halves.
    """

    def __init__(self, resolution: int = 64, channels: Sequence[int] = (24, 48, 64, 96, 128)) -> None:
        super().__init__()
        self.resolution = resolution
        self.learning_rate = 1e-3
        self.features = nn.Sequential(*convolutions(channels, first_stride=1), nn.Flatten(), nn.Dropout(0.1))
        width = channels[-1] * (resolution // 2 ** (len(channels) - 1)) ** 2
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in FACTORS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return, for images (B, 3, H, W) in [-1, 1], the logits of every factor, {name: (B, words)}."""
        features = self.features(F.adaptive_avg_pool2d(images, self.resolution))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """Return the most probable word of every factor: long (B, F), columns in the order of `FACTORS`."""
        return torch.stack([logits.argmax(dim=1) for logits in self(images).values()], dim=1)

    def training_step(self, batch: Mapping[str, Any], _: int) -> Tensor:
        seed_step(batch)
        logits = self(disturbed(batch["image"].permute(0, 3, 1, 2)))
        truths = zip(logits, batch["attributes"].unbind(1), strict=True)
        losses = {name: F.cross_entropy(logits[name], truth) for name, truth in truths}
        loss = torch.stack(list(losses.values())).sum()
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()})
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: Mapping[str, Any], _: int) -> None:
        correct = (self.read(batch["image"].permute(0, 3, 1, 2)) == batch["attributes"]).float().mean(dim=0)
        self.log_dict({f"val/{name}": value for name, value in zip(FACTORS, correct, strict=True)})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw(self, self.learning_rate, beta2=0.99)


def disturbed(images: Tensor) -> Tensor:
    """Return images (B, 3, R, R) with some blur, contrast and noise, a random amount of each for every image."""

    def amount() -> Tensor:
        return torch.rand(len(images), 1, 1, 1, device=images.device)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, 0.7 * amount())
    images = images * (0.85 + 0.3 * amount()) + 0.1 * (amount() - 0.5)
    return images + 0.1 * amount() * torch.randn_like(images)
