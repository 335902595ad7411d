"""Judges of pictures: how far a picture goes along with one reference, rather than with another.

Shapes: N pictures, A names of what is judged, F factors of the rendered world.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.networks.classifier import AttributeClassifier
from evaluation.world.rendered import FACTORS
from ldm.checkpoint import load_weights, read_state_dict

Distance = Callable[[Tensor, Tensor], Tensor]  # of pictures (N, 3, R, R) and (N, 3, R, R): (N,)


class Judge(ABC):
    """What is judged has a name each, in `names`."""

    names: tuple[str, ...]
    counts: bool  # whether what it gives is 0 or 1 and nothing between

    @abstractmethod
    def follows(self, pictures: Tensor, toward: Tensor, away: Tensor) -> Tensor:
        """How far each picture goes along with `toward` rather than with `away`: (N, A), 0 not at all, 1 fully.

        Args:
            pictures, toward, away: (N, 3, R, R) in [-1, 1]. Where the truth is known, attributes long (N, F) may
                stand for `toward` and `away`.
        """


class AttributeJudge(Judge):
    """Reads the attributes of the rendered world with the classifier; 1 where an attribute is that of `toward`."""

    names = tuple(FACTORS)
    counts = True

    def __init__(self, path: str | Path) -> None:
        state = read_state_dict(path)
        self.classifier = AttributeClassifier().eval().requires_grad_(False)
        load_weights(self.classifier, state, path)

    def read(self, pictures: Tensor) -> Tensor:
        """Attributes long (N, F) of pictures (N, 3, R, R)."""
        parts = pictures.clamp(-1, 1).float().split(128)
        return torch.cat([self.classifier.read(part.to(self.classifier.device)).cpu() for part in parts])

    def follows(self, pictures: Tensor, toward: Tensor, away: Tensor) -> Tensor:
        return (self.read(pictures) == self._attributes(toward)).float()

    def _attributes(self, reference: Tensor) -> Tensor:
        return self.read(reference) if reference.is_floating_point() else reference


class DistanceJudge(Judge):
    """For pictures whose attributes nobody knows: d(away) / (d(toward) + d(away)) for several distances d.

    * colour: of the joint histogram of RGB in 8³ bins (L1, on the two pictures as a whole);
    * structure: of the edges' strength and direction at a 16th of the size (L1), colour left away;
    * clip, lpips: where `clip` (a folder with a CLIP vision model) or `lpips` (an AlexNet with LPIPS weights, as
      torchmetrics reads it) are at hand.

    Args:
        clip: folder of transformers' `CLIPModel`, or None.
        lpips: measure LPIPS with torchmetrics, whose weights have to be on this machine.

    Raises:
        ValueError: there is no such CLIP model, or no LPIPS.
    """

    counts = False

    def __init__(self, clip: str | Path | None = None, lpips: bool = False) -> None:
        self.distances: dict[str, Distance] = {"colour": colour_distance, "structure": structure_distance}
        if clip is not None:
            self.distances["clip"] = _clip_distance(clip)
        if lpips:
            self.distances["lpips"] = _lpips_distance()
        self.names = tuple(self.distances)

    def follows(self, pictures: Tensor, toward: Tensor, away: Tensor) -> Tensor:
        columns = []
        for distance in self.distances.values():
            near, far = distance(pictures, toward), distance(pictures, away)
            columns.append(far / (near + far).clamp(min=1e-8))
        return torch.stack(columns, dim=1)


def colour_distance(a: Tensor, b: Tensor) -> Tensor:
    """Half the L1 distance of the colour histograms of pictures (N, 3, R, R): (N,) in [0, 1]."""

    def histogram(pictures: Tensor) -> Tensor:
        level = ((pictures.clamp(-1, 1) + 1) * 3.999).long()  # (N, 3, R, R) in 0..7
        bins = (level[:, 0] * 64 + level[:, 1] * 8 + level[:, 2]).flatten(1)
        return torch.stack([torch.bincount(row, minlength=512) / len(row) for row in bins])

    return (histogram(a) - histogram(b)).abs().sum(dim=1) / 2


def structure_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of pooled grey gradients of pictures (N, 3, R, R): (N,)."""

    def edges(pictures: Tensor) -> Tensor:
        grey = pictures.float().mean(dim=1, keepdim=True)
        dx, dy = grey[..., 1:, 1:] - grey[..., 1:, :-1], grey[..., 1:, 1:] - grey[..., :-1, 1:]
        return F.adaptive_avg_pool2d(torch.cat([dx.abs(), dy.abs(), dx, dy], dim=1), 16)

    return (edges(a) - edges(b)).abs().mean(dim=(1, 2, 3))


def _clip_distance(folder: str | Path) -> Distance:
    from transformers import CLIPModel

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"There is no CLIP model in '{folder}'; give a folder with its config.json and .safetensors.")
    model = CLIPModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval()
    size = model.config.vision_config.image_size
    mean, std = torch.tensor([0.4815, 0.4578, 0.4082]), torch.tensor([0.2686, 0.2613, 0.2758])

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        x = F.interpolate((pictures.float() + 1) / 2, size=(size, size), mode="bicubic", antialias=True)
        x = (x.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
        found = model.get_image_features(pixel_values=x)
        return F.normalize(getattr(found, "pooler_output", found), dim=-1)

    return lambda a, b: 1 - (features(a) * features(b)).sum(dim=1)


def _lpips_distance() -> Distance:
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    except (ImportError, OSError) as error:
        needs = "torchvision and AlexNet's weights in torch's cache, or a network to fetch them"
        raise ValueError(
            f"LPIPS cannot be measured here ({str(error).partition('. ')[0]}); it needs {needs}."
        ) from error

    def distance(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(a.clamp(-1, 1).split(1), b.clamp(-1, 1).split(1), strict=True)
        return torch.stack([metric(x, y) for x, y in pairs])

    return distance
