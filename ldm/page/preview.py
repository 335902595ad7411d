"""What the latents of a step look like, without decoding them: a linear map to RGB, fitted once for a first stage."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.files.images import to_pil

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import DiffusionModel

SMALL = 10_000_000  # parameters of a first stage that decodes as fast as the U-Net makes a step
SAMPLES, SIDE = 16, 128  # what the map is fitted on: images, and their pixels each way


class Preview:
    """Predicted latents (B, C, H, W) to an RGB image of the first of them."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.decodes = sum(p.numel() for p in model.first_stage_model.parameters()) < SMALL
        self._weights: Tensor | None = None

    def __call__(self, latents: Tensor) -> Image.Image:
        if self.decodes:
            return to_pil(self.model.decode_first_stage(latents[:1])[0])
        if self._weights is None:
            self._weights = fit_linear(self.model)
        return to_pil(linear_rgb(latents[0].float().cpu(), self._weights))


def inline(image: Image.Image) -> str:
    """An image as a URL that holds it: a file for each preview would be gone before it is fetched."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def linear_rgb(latents: Tensor, weights: Tensor) -> Tensor:
    """Latents (C, H, W) to RGB (3, H, W) in [-1, 1], a pixel for each latent element; `weights` is (C + 1, 3)."""
    return torch.einsum("chw,cr->rhw", latents, weights[:-1]) + weights[-1].view(3, 1, 1)


@torch.no_grad()
def fit_linear(model: DiffusionModel, images: Tensor | None = None) -> Tensor:
    """Return the weights (C + 1, 3), the last row a constant, that give RGB from latents with the least squared error.

    Args:
        images: what it is fitted on, (N, 3, H, W) in [-1, 1]; None: fields of colour, coarse and fine.
    """
    images = colour_fields() if images is None else images
    factor = model.first_stage_model.downsampling
    encoded = [model.encode_first_stage(image[None]) for image in images]
    means = [posterior if isinstance(posterior, Tensor) else posterior.mean for posterior in encoded]
    latents = torch.cat([model.scale_factor * mean.float().cpu() for mean in means])  # (N, C, h, w)
    given = F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0)  # (N, C + 1, h, w)
    wanted = F.avg_pool2d(images, factor)  # (N, 3, h, w)
    return torch.linalg.lstsq(given.movedim(1, -1).flatten(0, 2), wanted.movedim(1, -1).flatten(0, 2)).solution


def colour_fields() -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1] of random colours, black and white: patches and gradients."""
    generator = torch.Generator().manual_seed(0)
    fields = []
    for i in range(SAMPLES):
        cells = 2 ** (1 + i // 2 % 3)  # 2, 4, 8 each way
        colours = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        pure = torch.rand(1, 1, cells, cells, generator=generator)
        colours = torch.where(pure < 0.15, -1.0, torch.where(pure > 0.85, 1.0, colours))
        fields.append(F.interpolate(colours, size=(SIDE, SIDE), mode=("nearest", "bicubic")[i % 2]).clamp(-1, 1))
    return torch.cat(fields)
