"""First stages: images (B, 3, H, W) in [-1, 1] to latents (B, z, H/f, W/f) and back.

Lightning is not imported here, so that generating starts quickly; `ldm.models.autoencoder` trains these networks.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import AutoencoderSizes, Decoder, Encoder

logger = logging.getLogger(__name__)


class DiagonalGaussianDistribution:
    """A normal distribution per latent element, from `moments` (B, 2z, h, w): mean, then log-variance."""

    def __init__(self, moments: Tensor) -> None:
        self.parameters = moments
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Return mean + std · noise; `noise` (B, z, h, w) is standard normal, drawn from the global state if None."""
        noise = torch.randn_like(self.mean) if noise is None else noise.to(self.mean)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """Return the KL divergence from the standard normal, summed over an image: (B,)."""
        return 0.5 * (self.mean**2 + self.std**2 - 1.0 - self.logvar).sum(dim=(1, 2, 3))


Posterior = DiagonalGaussianDistribution | Tensor  # the latents themselves in a VQ first stage


def mode_of(posterior: Posterior) -> Tensor:
    """Return the most likely latents (B, z, h, w)."""
    return posterior if isinstance(posterior, Tensor) else posterior.mode()


class FirstStage(nn.Module, ABC):
    """Base of the KL and VQ first stages: encoder and decoder."""

    ignored_keys = {
        "lossconfig": "training from scratch uses L1 + MSE and the regulariser's own weight",
        "monitor": "the last checkpoint is kept",
        "colorize_nlabels": "only the segmentation models of LDM use it",
    }
    quant_conv: nn.Conv2d

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int, image_key: str, mse_weight: float) -> None:
        super().__init__()
        self.image_key = image_key
        self.mse_weight = mse_weight
        sizes = AutoencoderSizes(**ddconfig)
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)
        self.post_quant_conv = nn.Conv2d(embed_dim, sizes.z_channels, 1)

    @property
    def downsampling(self) -> int:
        """f: how many pixels one latent element is wide."""
        return 2 ** (len(self.encoder.down) - 1)

    def moments(self, x: Tensor) -> Tensor:
        """Return what `posterior` takes, (B, 2z or z, h, w), of images."""
        return self.quant_conv(self.encoder(x))

    @abstractmethod
    def posterior(self, moments: Tensor) -> Posterior:
        """Return the posterior of the latents."""

    def encode(self, x: Tensor) -> Posterior:
        return self.posterior(self.moments(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def in_range(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `moments` or `decode` of x, of any dtype, as float32, computed in this network's own dtype.

        Where float16 is too narrow for a finite x, the network becomes float32, once, and says so in the log.
        """
        dtype = self.post_quant_conv.weight.dtype
        result = function(x.to(dtype)).float()
        if dtype != torch.float16 or result.isfinite().all() or not x.isfinite().all():
            return result
        logger.warning("The first stage (VAE) overflows in float16; from now on it works in float32.")
        self.float()
        return function(x.float())

    @abstractmethod
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (reconstructions of images, the regulariser's value as a scalar to be added to the loss)."""


class KLFirstStage(FirstStage):
    """KL autoencoder; parameters as in the reference's `first_stage_config`.

    `kl_weight` weighs the KL divergence per pixel value, `mse_weight` the squared error beside L1.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        image_key: str = "image",
        kl_weight: float = 1e-6,
        mse_weight: float = 1.0,
    ) -> None:
        super().__init__(ddconfig, embed_dim, image_key, mse_weight)
        self.kl_weight = kl_weight
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)

    def posterior(self, moments: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(moments)

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        posterior = self.posterior(self.moments(x))
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        reconstructions, posterior = self(images, sample_posterior=self.training)
        return reconstructions, self.kl_weight * posterior.kl().mean() / images[0].numel()


class VQFirstStage(FirstStage):
    """VQ autoencoder with taming-transformers' quantizer (extra `vq`), latents taken before quantization.

    Keys as in LDM's VQ first stages: `quantize.embedding.weight` (n_embed, embed_dim).

    Raises:
        ImportError: the extra is not installed.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        image_key: str = "image",
        mse_weight: float = 1.0,
    ) -> None:
        try:
            from taming.modules.vqvae.quantize import VectorQuantizer2
        except ImportError as error:
            raise ImportError("A VQ first stage needs the extra 'vq': pip install -e '.[vq]'.") from error
        super().__init__(ddconfig, embed_dim, image_key, mse_weight)
        self.quantize = VectorQuantizer2(n_embed, embed_dim, beta=0.25)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)

    def posterior(self, moments: Tensor) -> Tensor:
        return moments

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.quantize(z)[0])

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quantized, commitment, _ = self.quantize(self.moments(images))
        return super().decode(quantized), commitment
