"""Judges of images: how far an image follows one reference rather than another.

Shapes: N images, R pixels a side, A names of what is judged, F factors of the rendered world.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics.backbones import open_clip_folder, projected
from evaluation.networks.classifier import AttributeClassifier
from evaluation.world.attributes import FACTORS
from ldm.checkpoint import load_weights, read_state_dict

Distance = Callable[[Tensor, Tensor], Tensor]  # of images (N, 3, R, R) and (N, 3, R, R): (N,)


class AttributeJudge:
    """Reads attributes with the classifier."""

    names = tuple(FACTORS)  # of what is judged
    counts = True  # scores are 0 or 1 and nothing between

    def __init__(self, path: str | Path) -> None:
        self.classifier = AttributeClassifier().eval().requires_grad_(False)
        load_weights(self.classifier, read_state_dict(path), path)

    def read(self, images: Tensor) -> Tensor:
        """Return attributes long (N, F) of images (N, 3, R, R)."""
        parts = images.clamp(-1, 1).float().split(128)
        return torch.cat([self.classifier.read(part.to(self.classifier.device)).cpu() for part in parts])

    def follows(self, images: Tensor, toward: Tensor, away: Tensor) -> Tensor:
        """Score images (N, 3, R, R) in [-1, 1]: (N, A), 1 where an attribute is that of `toward`, long (N, F)."""
        return (self.read(images) == toward).float()


@lru_cache(maxsize=1)
def load_judge(path: str) -> AttributeJudge:
    return AttributeJudge(path)


class DistanceJudge:
    """Compares with images `toward` and `away`: d(away) / (d(toward) + d(away)) for several distances d.

    Args:
        clip: folder of transformers' `CLIPModel`, whose features are compared, too.
        lpips: compare by LPIPS, too (torchmetrics, whose AlexNet has to be on this machine).
    """

    counts = False

    def __init__(self, clip: str | Path | None = None, lpips: bool = False) -> None:
        self.distances: dict[str, Distance] = {"colour": colour_distance, "structure": structure_distance}
        if clip is not None:
            self.distances["clip"] = _clip_distance(clip)
        if lpips:
            self.distances["lpips"] = lpips_distance()
        self.names = tuple(self.distances)

    def follows(self, images: Tensor, toward: Tensor, away: Tensor) -> Tensor:
        """Score images (N, 3, R, R) in [-1, 1]: (N, A) in [0, 1], 1 matches the images `toward` and 0 those `away`."""
        pairs = [(distance(images, toward), distance(images, away)) for distance in self.distances.values()]
        return torch.stack([far / (near + far).clamp(min=1e-8) for near, far in pairs], dim=1)


Judge = AttributeJudge | DistanceJudge


def colour_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return half the L1 distance of the joint RGB histograms, 8³ bins, of images (N, 3, R, R): (N,) in [0, 1]."""

    def histogram(images: Tensor) -> Tensor:
        level = ((images.clamp(-1, 1) + 1) * 3.999).long()  # (N, 3, R, R) in 0..7
        bins = (level[:, 0] * 64 + level[:, 1] * 8 + level[:, 2]).flatten(1)
        return torch.stack([torch.bincount(row, minlength=512) / len(row) for row in bins])

    return (histogram(a) - histogram(b)).abs().sum(dim=1) / 2


def structure_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute difference of grey gradients, pooled to 16², of images (N, 3, R, R): (N,)."""

    def edges(images: Tensor) -> Tensor:
        grey = images.float().mean(dim=1, keepdim=True)
        dx, dy = grey[..., 1:, 1:] - grey[..., 1:, :-1], grey[..., 1:, 1:] - grey[..., :-1, 1:]
        return F.adaptive_avg_pool2d(torch.cat([dx.abs(), dy.abs(), dx, dy], dim=1), 16)

    return (edges(a) - edges(b)).abs().mean(dim=(1, 2, 3))


def _clip_distance(folder: str | Path) -> Distance:
    model: Any = open_clip_folder(folder)
    size = model.config.vision_config.image_size
    mean, std = torch.tensor([0.4815, 0.4578, 0.4082]), torch.tensor([0.2686, 0.2613, 0.2758])

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = F.interpolate((images.float() + 1) / 2, size=(size, size), mode="bicubic", antialias=True)
        x = (x.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
        return F.normalize(projected(model.get_image_features(pixel_values=x)), dim=-1)

    return lambda a, b: 1 - (features(a) * features(b)).sum(dim=1)


def lpips_distance() -> Distance:
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    except (ImportError, OSError) as error:
        needs = "torchvision and AlexNet's weights in torch's cache, or a network to fetch them"
        raise ValueError(f"LPIPS cannot be measured here ({str(error).split('. ')[0]}); it needs {needs}.") from error

    return lambda a, b: torch.stack([metric(*pair) for pair in zip(a.split(1), b.split(1), strict=True)])
