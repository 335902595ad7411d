"""The first stage as a latent diffusion model uses it, and latents that are encoded once for all training steps.

Shapes: B batch, C latent channels, H W latent height and width; f = 8 in Stable Diffusion v1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ldm.models.first_stage import DiagonalGaussianDistribution, FirstStage, KLFirstStage
from ldm.util import to_device

Posterior = DiagonalGaussianDistribution | Tensor  # a VQ first stage has no distribution


def encode(first_stage: FirstStage, images: Tensor) -> Posterior:
    """Return the float32 posterior of the latents of images (B, 3, f·H, f·W) in [-1, 1]."""
    posterior = first_stage.in_range(first_stage.encode, images)
    if isinstance(posterior, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(posterior.parameters.float())
    return posterior.float()


def decode(first_stage: FirstStage, z: Tensor, batch: int | None = None) -> Tensor:
    """Return float32 images (B, 3, f·H, f·W), about [-1, 1], not clamped, for unscaled latents z (B, C, H, W).

    `batch` images are decoded at a time; one at a time where the device's memory does not hold them all.
    """
    try:
        return _decode_in_slices(first_stage, z, batch or len(z))
    except torch.OutOfMemoryError:
        if len(z) == 1:
            raise
    return _decode_in_slices(first_stage, z, 1)


def _decode_in_slices(first_stage: FirstStage, z: Tensor, size: int) -> Tensor:
    return torch.cat([first_stage.in_range(first_stage.decode, part).float() for part in z.split(size)])


def mode(posterior: Posterior) -> Tensor:
    """Return the most likely latents (B, C, H, W)."""
    return posterior.mode() if isinstance(posterior, DiagonalGaussianDistribution) else posterior


class ImageSet(Protocol):
    """A data set that can be cached: its samples name their `image_number` and whether it is `flipped`."""

    num_images: int
    flips: bool
    with_images: bool

    def image(self, i: int, flipped: bool = False) -> Tensor: ...


class LatentCache:
    """Posterior moments of all images of a data set, which from then on leaves the images out of its samples.

    The posterior is still sampled in every step: the same distribution as encoding anew.

    Args:
        encode: images (B, 3, f·H, f·W) -> posterior.
    """

    PIXELS = 2**19  # encoded at a time: two images of 512², 128 of 64²

    @torch.no_grad()
    def __init__(self, encode: Callable[[Tensor], Posterior], dataset: ImageSet) -> None:
        keys = [(i, f) for i in range(dataset.num_images) for f in ((False, True) if dataset.flips else (False,))]
        self._flips = dataset.flips
        self._is_gaussian = True
        parts = []
        size = max(1, self.PIXELS // dataset.image(0)[0].numel())
        for start in tqdm(range(0, len(keys), size), desc="encoding images", disable=len(keys) <= 2 * size):
            posterior = encode(torch.stack([dataset.image(i, flip) for i, flip in keys[start : start + size]]))
            self._is_gaussian = isinstance(posterior, DiagonalGaussianDistribution)
            parts.append(posterior.parameters if isinstance(posterior, DiagonalGaussianDistribution) else posterior)
        self.moments = torch.cat(parts)
        dataset.with_images = False

    @property
    def shape(self) -> torch.Size:
        """Shape of an image's latents, (C, H, W)."""
        _, channels, *size = self.moments.shape
        return torch.Size((channels // 2 if self._is_gaussian else channels, *size))

    def posterior(self, images: Tensor, flipped: Tensor) -> Posterior:
        """Return the posterior of the images numbered (B,), flipped where `flipped` (B,) says so."""
        rows = images * 2 + flipped.long() if self._flips else images
        moments = self.moments[to_device(rows, self.moments.device)]
        return DiagonalGaussianDistribution(moments) if self._is_gaussian else moments

    @torch.no_grad()
    def standardize(self, first_stage: KLFirstStage) -> None:
        """Give latents mean 0 and standard deviation 1 in every channel, by changing the 1x1 convolutions of a KL
        first stage: what it reconstructs stays the same."""
        mean, logvar = self.moments.chunk(2, dim=1)
        shift = mean.mean(dim=(0, 2, 3))  # (C,)
        scale = 1 / mean.std(dim=(0, 2, 3))
        self.moments = torch.cat(
            [(mean - _per_channel(shift)) * _per_channel(scale), logvar + 2 * _per_channel(scale).log()], dim=1
        )
        encode, decode = first_stage.quant_conv, first_stage.post_quant_conv
        channels = len(shift)
        bias = encode.get_parameter("bias")
        bias[:channels].sub_(shift).mul_(scale)
        encode.weight[:channels].mul_(scale.view(-1, 1, 1, 1))
        bias[channels:].add_(2 * scale.log())
        decode.get_parameter("bias").add_(decode.weight[:, :, 0, 0].float() @ shift)
        decode.weight.div_(scale.view(1, -1, 1, 1))


def _per_channel(channels: Tensor) -> Tensor:
    """Shape a value for each channel (C,) as (1, C, 1, 1)."""
    return channels.view(1, -1, 1, 1)
