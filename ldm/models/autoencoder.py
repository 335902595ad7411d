"""First stages: images (B, 3, H, W) in [-1, 1] to latents (B, z, H/f, W/f) and back."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.util import seed_step

logger = logging.getLogger(__name__)

Encoded = TypeVar("Encoded")  # a tensor, or a distribution


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


class FirstStage(pl.LightningModule, ABC):
    """Base of the KL and VQ autoencoders: the two networks, reconstruction training, decoding."""

    ignored_keys = {
        "lossconfig": "training from scratch uses L1 + MSE and the regulariser's own weight",
        "monitor": "the last checkpoint is kept",
        "colorize_nlabels": "only the segmentation models of LDM use it",
    }

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int, image_key: str, mse_weight: float) -> None:
        super().__init__()
        self.image_key = image_key
        self.mse_weight = mse_weight
        self.learning_rate = 1e-4
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    @property
    def downsampling(self) -> int:
        """f: how many pixels one latent element is wide."""
        return 2 ** (len(self.encoder.down) - 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def in_range(self, function: Callable[[Tensor], Encoded], x: Tensor) -> Encoded:
        """Return `encode` or `decode` of x, of any dtype, computed in this network's own.

        Where float16 is too narrow for a finite x, the network becomes float32, once, and says so in the log.
        """
        dtype = next(self.parameters()).dtype
        result = function(x.to(dtype))
        values: Any = result.parameters if isinstance(result, DiagonalGaussianDistribution) else result
        if dtype != torch.float16 or values.isfinite().all() or not x.isfinite().all():
            return result
        logger.warning("The first stage (VAE) overflows in float16; from now on it works in float32.")
        return function(x.to(next(self.float().parameters()).dtype))

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor | DiagonalGaussianDistribution:
        """Return the latents of images, or their posterior."""

    @abstractmethod
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (reconstructions of images, the regulariser's value as a scalar to be added to the loss)."""

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


class AutoencoderKL(FirstStage):
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

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        reconstructions, posterior = self(images, sample_posterior=self.training)
        return reconstructions, self.kl_weight * posterior.kl().mean() / images[0].numel()


class VQModelInterface(FirstStage):
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
        beta: float = 0.25,
    ) -> None:
        try:
            from taming.modules.vqvae.quantize import VectorQuantizer2
        except ImportError as error:
            raise ImportError("A VQ first stage needs the extra 'vq': pip install -e '.[vq]'.") from error
        super().__init__(ddconfig, embed_dim, image_key, mse_weight)
        self.quantize = VectorQuantizer2(n_embed, embed_dim, beta=beta)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.quantize(z)[0])

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quantized, commitment, _ = self.quantize(self.encode(images))
        return super().decode(quantized), commitment


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
