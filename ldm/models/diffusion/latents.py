"""Latents that are encoded once for all training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ldm.models.first_stage import KLFirstStage
from ldm.util import to_device

PIXELS = 2**19  # encoded at a time: two images of 512², 128 of 64²


class ImageSet(Protocol):
    """A data set that can be cached: its samples name their `image_number` and whether it is `flipped`."""

    num_images: int
    flips: bool
    with_images: bool

    def image(self, i: int, flipped: bool = False) -> Tensor: ...


class LatentCache:
    """Posterior moments (images, 2z or z, H, W) of a data set, which from then on leaves images out of its samples.

    The posterior is still sampled in every step: the same distribution as encoding anew.

    Args:
        encode: images (B, 3, f·H, f·W) -> moments.
    """

    @torch.no_grad()
    def __init__(self, encode: Callable[[Tensor], Tensor], dataset: ImageSet) -> None:
        self.flips = dataset.flips
        keys = [(i, f) for i in range(dataset.num_images) for f in ((False, True) if self.flips else (False,))]
        size = max(1, PIXELS // dataset.image(0)[0].numel())
        starts = tqdm(range(0, len(keys), size), desc="encoding images", disable=len(keys) <= 2 * size)
        batches = (torch.stack([dataset.image(i, f) for i, f in keys[start : start + size]]) for start in starts)
        self.moments = torch.cat([encode(images) for images in batches])
        dataset.with_images = False

    def of(self, images: Tensor, flipped: Tensor) -> Tensor:
        """Return the moments of the images numbered (B,), flipped where `flipped` (B,) says so."""
        rows = images * 2 + flipped.long() if self.flips else images
        return self.moments[to_device(rows, self.moments.device)]

    @torch.no_grad()
    def standardize(self, first_stage: KLFirstStage) -> None:
        """Give latents mean 0 and standard deviation 1 in every channel, by changing the 1x1 convolutions of a KL
        first stage: what it reconstructs stays the same."""
        mean, logvar = self.moments.chunk(2, dim=1)
        shift, scale = mean.mean(dim=(0, 2, 3)), 1 / mean.std(dim=(0, 2, 3))  # (C,)
        per_channel = scale.view(-1, 1, 1)
        mean, logvar = (mean - shift.view(-1, 1, 1)) * per_channel, logvar + 2 * per_channel.log()
        self.moments = torch.cat([mean, logvar], dim=1)
        encode, decode, channels = first_stage.quant_conv, first_stage.post_quant_conv, len(shift)
        bias = encode.get_parameter("bias")
        bias[:channels].sub_(shift).mul_(scale)
        encode.weight[:channels].mul_(scale.view(-1, 1, 1, 1))
        bias[channels:].add_(2 * scale.log())
        decode.get_parameter("bias").add_(decode.weight[:, :, 0, 0].float() @ shift)
        decode.weight.div_(per_channel)
