"""What Lightning calls of `LatentDiffusion`: steps, optimizer, saving, and pictures to look at.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import file_hash
from ldm.models.autoencoder import DiagonalGaussianDistribution, cosine_to_zero
from ldm.models.diffusion.latents import LatentCache

if TYPE_CHECKING:
    from ldm.modules.embedding_manager import EmbeddingManager


class Fitting(pl.LightningModule):
    """The training side of a latent diffusion model, which is defined in `ddpm.py`."""

    embedding_manager: EmbeddingManager | None

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 1e-4
        self.seed = 23
        self._latents: LatentCache | None = None

    def on_fit_start(self) -> None:
        if not self.cache_latents:
            return
        datasets = getattr(self.trainer.datamodule, "datasets", {})
        if "train" in datasets and hasattr(datasets["train"], "num_pictures"):
            self._latents = LatentCache(self, datasets["train"])
            if self.standardize_latents and self.trainer.ckpt_path is None:
                self._latents.standardize(self.first_stage_model)

    def _draw(self, batch: Mapping[str, Any], x_start_shape: torch.Size, split: str) -> dict[str, Tensor]:
        """Timesteps and noises of a batch: a function of the seed and each sample's running number only."""
        draws = []
        for number in batch["sample"].tolist():
            generator = torch.Generator().manual_seed(mix_seed(self.seed, number, split == "val"))
            draws.append(
                (
                    self._draw_timestep(number, generator),
                    torch.randn(x_start_shape, generator=generator),
                    torch.randn(x_start_shape, generator=generator),
                )
            )
        t, posterior_noise, noise = (torch.stack(column).to(self.device) for column in zip(*draws, strict=True))
        return {"t": t, "posterior_noise": posterior_noise, "noise": noise}

    def _draw_timestep(self, number: int, generator: torch.Generator) -> Tensor:
        """Uniform over all timesteps, or over those of stage `number` mod S."""
        first, last = 0, self.num_timesteps
        if self.time_sampling == "stages":
            stage = number % self.num_stages
            first, last = (-(-i * self.num_timesteps // self.num_stages) for i in (stage, stage + 1))
        return torch.randint(first, last, (), generator=generator)

    def posterior(self, batch: Mapping[str, Any]) -> DiagonalGaussianDistribution | Tensor:
        """The posterior of a batch's latents, from the cache or from the first stage."""
        if self.image_key in batch:
            return self.encode_first_stage(batch[self.image_key].permute(0, 3, 1, 2))
        return self._latents.posterior(batch["picture"], batch["flipped"])

    def shared_step(self, batch: Mapping[str, Any], split: str) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.posterior(batch)
        shape = (posterior.mean if isinstance(posterior, DiagonalGaussianDistribution) else posterior).shape[1:]
        draw = self._draw(batch, shape, split)
        z = self.get_first_stage_encoding(posterior, draw["posterior_noise"])
        cond = self.get_learned_conditioning(batch[self.caption_key])
        return self.p_losses(z, cond, draw["t"], draw["noise"])

    def training_step(self, batch: Mapping[str, Any], _: int) -> Tensor:
        # dropout takes no generator; seeding by the sample makes it, too, the same in a resumed run
        torch.manual_seed(mix_seed(self.seed, int(batch["sample"][0])))
        loss, parts = self.shared_step(batch, "train")
        self.log_dict(parts, prog_bar=False, batch_size=len(batch["sample"]))
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], _: int) -> None:
        parts = self.shared_step(batch, "val")[1]
        # there are no averaged weights to compare with: the reference logs the same values under both names
        parts |= {f"{name}_ema": value for name, value in parts.items()}
        self.log_dict(parts, batch_size=len(batch["sample"]))

    def trainable_parameters(self) -> list[nn.Parameter]:
        if self.embedding_manager is not None:
            return self.embedding_manager.embedding_parameters()
        text = list(self.cond_stage_model.parameters()) if self.cond_stage_trainable else []
        return [*self.model.parameters(), *text]

    def configure_optimizers(self) -> torch.optim.Optimizer | dict[str, Any]:
        """AdamW at a constant rate for embeddings; with warm-up and decay to zero for training from scratch."""
        parameters = self.trainable_parameters()
        if self.embedding_manager is not None:
            return torch.optim.AdamW(parameters, lr=self.learning_rate)
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.99))
        return {"optimizer": optimizer, "lr_scheduler": cosine_to_zero(optimizer, self.trainer)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seed"] = self.seed
        if self.embedding_manager is not None:
            kept = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("embedding_manager.")}
            checkpoint["state_dict"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seed = checkpoint.get("seed", self.seed)
        if self.embedding_manager is not None:
            self.strict_loading = False  # frozen weights are not in it

    def save_embeddings(self, path: str | Path) -> None:
        """Write what is learned as an embedding file, with where it came from."""
        if self.embedding_manager is None:
            return
        if self.base_model and "base_model_sha256" not in self.base_model:
            self.base_model["base_model_sha256"] = file_hash(self._base_path)
        self.embedding_manager.save(path, step=str(self.trainer.global_step), **self.base_model)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 4, split: str = "train", ddim_steps: int = 50, scale: float = 5.0
    ) -> dict[str, Tensor]:
        """Pictures to look at during training, (N, 3, H, W) each; samples start from fixed noise."""
        from ldm.models.diffusion.ddim import DDIMSampler

        z = self.get_first_stage_encoding(as_mode(self.posterior(batch)))[:N]
        captions = list(batch[self.caption_key])[: len(z)]
        pictures = {"reconstruction": self.decode_first_stage(z)}
        if self.image_key in batch:
            pictures["inputs"] = batch[self.image_key][:N].permute(0, 3, 1, 2)
        generators = [torch.Generator().manual_seed(mix_seed(self.seed, i)) for i in range(len(z))]
        x_T = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(self.device)
        sampler = DDIMSampler(self)
        cond = self.get_learned_conditioning(captions)
        uncond = self.get_learned_conditioning([""] * len(z))
        for name, guidance in {"samples": 1.0, "samples_scaled": scale}.items():
            latents, _ = sampler.sample(
                S=ddim_steps,
                batch_size=len(z),
                shape=tuple(z.shape[1:]),
                conditioning=cond,
                unconditional_guidance_scale=guidance,
                unconditional_conditioning=uncond,
                x_T=x_T,
                verbose=False,
            )
            pictures[name] = self.decode_first_stage(latents)
        return pictures


def as_mode(posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
    return posterior.mode() if isinstance(posterior, DiagonalGaussianDistribution) else posterior


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
