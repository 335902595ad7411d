"""Pictures to latents and back; pictures to learn from are encoded once.

Shapes: B batch, C latent channels, H W latent height and width; f = 8 in Stable Diffusion v1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussianDistribution, FirstStage
from ldm.util import to_device

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


class LatentCodec:
    """The first stage as `LatentDiffusion` uses it: scaled latents, float32 outside."""

    first_stage_model: FirstStage
    scale_factor: float
    device: torch.device
    decode_batch: int | None

    @torch.no_grad()
    def encode_first_stage(self, images: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Pictures (B, 3, f·H, f·W) in [-1, 1] to the posterior of their latents."""
        first_stage = self.first_stage_model
        posterior = first_stage.in_range(first_stage.encode, images.to(self.device))
        if isinstance(posterior, DiagonalGaussianDistribution):
            return DiagonalGaussianDistribution(posterior.parameters.float())
        return posterior.float()

    def get_first_stage_encoding(
        self, posterior: DiagonalGaussianDistribution | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Scaled latents (B, C, H, W): a sample of the posterior, by `noise` (B, C, H, W) if it is given."""
        if isinstance(posterior, DiagonalGaussianDistribution):
            posterior = posterior.sample(noise)
        return self.scale_factor * posterior

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) to pictures (B, 3, f·H, f·W), about [-1, 1], not clamped; float32.

        `decode_batch` pictures at a time; one at a time where the device's memory does not hold them all.
        """
        z = (z / self.scale_factor).to(self.device)
        try:
            return self._decode_in_slices(z, self.decode_batch or len(z))
        except torch.OutOfMemoryError:
            if len(z) == 1:
                raise
        return self._decode_in_slices(z, 1)

    def _decode_in_slices(self, z: Tensor, size: int) -> Tensor:
        first_stage = self.first_stage_model
        return torch.cat([first_stage.in_range(first_stage.decode, part).float() for part in z.split(size)])


class PictureSet(Protocol):
    """What a data set offers to be cached; its samples name their `picture` and whether it is `flipped`."""

    num_pictures: int
    flips: bool
    with_images: bool

    def picture(self, i: int, flipped: bool = False) -> Tensor: ...


class LatentCache:
    """Posterior moments of all pictures of a data set, which from then on leaves the pictures out of its samples.

    The posterior is still sampled in every step: the same distribution as encoding anew.
    """

    PIXELS = 2**19  # encoded at a time: two pictures of 512², 128 of 64²

    @torch.no_grad()
    def __init__(self, model: LatentDiffusion, dataset: PictureSet) -> None:
        keys = [(i, f) for i in range(dataset.num_pictures) for f in ((False, True) if dataset.flips else (False,))]
        self._flips = dataset.flips
        self._is_gaussian = True
        parts = []
        size = max(1, self.PIXELS // dataset.picture(0)[0].numel())
        for start in tqdm(range(0, len(keys), size), desc="encoding pictures", disable=len(keys) <= 2 * size):
            batch = torch.stack([dataset.picture(i, flipped) for i, flipped in keys[start : start + size]])
            posterior = model.encode_first_stage(batch)
            self._is_gaussian = isinstance(posterior, DiagonalGaussianDistribution)
            parts.append(posterior.parameters if self._is_gaussian else posterior)
        self._moments = torch.cat(parts)
        dataset.with_images = False

    @property
    def shape(self) -> torch.Size:
        """Of a picture's latents, (C, H, W)."""
        _, channels, *size = self._moments.shape
        return torch.Size((channels // 2 if self._is_gaussian else channels, *size))

    def posterior(self, pictures: Tensor, flipped: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """The posterior of pictures (B,), flipped where `flipped` (B,) says so."""
        rows = pictures * 2 + flipped.long() if self._flips else pictures
        moments = self._moments[to_device(rows, self._moments.device)]
        return DiagonalGaussianDistribution(moments) if self._is_gaussian else moments

    @torch.no_grad()
    def standardize(self, first_stage: AutoencoderKL) -> None:
        """Give latents mean 0 and standard deviation 1 in every channel, by changing the 1x1 convolutions of a KL
        first stage: what it reconstructs stays the same."""
        mean, logvar = self._moments.chunk(2, dim=1)
        shift = mean.mean(dim=(0, 2, 3))  # (C,)
        scale = 1 / mean.std(dim=(0, 2, 3))
        self._moments = torch.cat(
            [(mean - per_channel(shift)) * per_channel(scale), logvar + 2 * per_channel(scale).log()], dim=1
        )
        encode, decode = first_stage.quant_conv, first_stage.post_quant_conv
        channels = len(shift)
        encode.bias[:channels].sub_(shift).mul_(scale)
        encode.weight[:channels].mul_(scale.view(-1, 1, 1, 1))
        encode.bias[channels:].add_(2 * scale.log())
        decode.bias.add_(decode.weight[:, :, 0, 0].float() @ shift)
        decode.weight.div_(scale.view(1, -1, 1, 1))


def per_channel(channels: Tensor) -> Tensor:
    """A value for each channel (C,), shaped (1, C, 1, 1)."""
    return channels.view(1, -1, 1, 1)
