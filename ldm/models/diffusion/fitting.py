"""The loss of `LatentDiffusion`, and what Lightning calls of it: steps, optimizer, saving, and pictures to look at.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.stages import timesteps_of
from ldm.files.base_model import base_hash
from ldm.models.autoencoder import DiagonalGaussianDistribution, cosine_to_zero
from ldm.models.diffusion.acceleration import TensorStep
from ldm.models.diffusion.latents import LatentCache
from ldm.models.diffusion.schedule import at
from ldm.util import mix_seed, to_device

if TYPE_CHECKING:
    from ldm.conditioning.encoding import PromptConditioning
    from ldm.models.diffusion.ddpm import Cond
    from ldm.modules.embedding_manager import EmbeddingManager

logger = logging.getLogger(__name__)

CAPTURED = "cuda_graph is used for the training step."
NOT_CAPTURED = (
    "cuda_graph is not used for the training step: it needs a CUDA device, embeddings to learn, one process, "
    "no accumulation, and a precision that is not mixed."
)


class Fitting(pl.LightningModule):
    """The training side of a latent diffusion model, which is defined in `ddpm.py`."""

    embedding_manager: EmbeddingManager | None

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 1e-4
        self.seed = 23
        self.timesteps: Tensor | None = None  # (B,), of the latest batch
        self._latents: LatentCache | None = None
        self._captured: dict[Any, TensorStep] = {}  # by the sizes of their inputs; no submodules of this one
        self._prompts: tuple[Any, PromptConditioning] | None = None

    def on_fit_start(self) -> None:
        self._captured.clear()  # graphs of an earlier fit: the weights may have moved since
        if self.cuda_graph:
            with self.trainer.precision_plugin.forward_context():
                captures = self._captures("train")
            logger.info(CAPTURED if captures else NOT_CAPTURED)
        if not self.cache_latents:
            return
        datasets = getattr(self.trainer.datamodule, "datasets", {})
        if "train" in datasets and hasattr(datasets["train"], "num_pictures"):
            self._latents = LatentCache(self, datasets["train"])
            if self.standardize_latents and self.trainer.ckpt_path is None:
                self._latents.standardize(self.first_stage_model)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw on the host while the device works on the step before; the step itself never waits for the device."""
        if "sample" not in batch:
            return batch
        draw = self._draw(batch, self._latent_shape(batch), "train" if self.trainer.training else "val")
        if self.device.type == "cuda":
            draw = {name: values.pin_memory() for name, values in draw.items()}
        return {**batch, "draw": draw, "dropout_seed": self._dropout_seed(batch)}

    def _dropout_seed(self, batch: Mapping[str, Any]) -> int:
        # dropout takes no generator; seeding by the first sample of all processes' batches makes it, too, the same
        # in a resumed run and in every process; all processes validate on the same samples
        before = self.global_rank * len(batch["sample"]) if self._trainer is None or self._trainer.training else 0
        return mix_seed(self.seed, int(batch["sample"][0]) - before)

    def _latent_shape(self, batch: Mapping[str, Any]) -> torch.Size:
        if self.image_key not in batch:
            return self._latents.shape
        sides = batch[self.image_key].shape[1:3]
        return torch.Size((self.channels, *(side // self.first_stage_model.downsampling for side in sides)))

    def _draw(self, batch: Mapping[str, Any], x_start_shape: torch.Size, split: str) -> dict[str, Tensor]:
        """Timesteps and noises of a batch, on the host: a function of the seed and each sample's number only."""
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
        t, posterior_noise, noise = (torch.stack(column) for column in zip(*draws, strict=True))
        return {"t": t, "posterior_noise": posterior_noise, "noise": noise}

    def _draw_timestep(self, number: int, generator: torch.Generator) -> Tensor:
        """Uniform over all timesteps, or over those of stage `number` mod S."""
        first, last = 0, self.num_timesteps
        if self.time_sampling == "stages":
            own = timesteps_of(number % self.num_stages, self.num_stages, self.num_timesteps)
            first, last = own.start, own.stop
        return torch.randint(first, last, (), generator=generator)

    def posterior(self, batch: Mapping[str, Any]) -> DiagonalGaussianDistribution | Tensor:
        """The posterior of a batch's latents, from the cache or from the first stage."""
        if self.image_key in batch:
            return self.encode_first_stage(batch[self.image_key].permute(0, 3, 1, 2))
        return self._latents.posterior(batch["picture"], batch["flipped"])

    def shared_step(self, batch: Mapping[str, Any], split: str) -> tuple[Tensor, dict[str, Tensor]]:
        draw = batch.get("draw") or self._draw(batch, self._latent_shape(batch), split)
        t, noise, posterior_noise = (to_device(draw[name], self.device) for name in ("t", "noise", "posterior_noise"))
        self.timesteps = t
        z = self.get_first_stage_encoding(self.posterior(batch), posterior_noise)
        captions = tuple(batch[self.caption_key])
        if not torch.is_grad_enabled():
            return self.p_losses(z, self.get_learned_conditioning(captions), t, noise)
        cond = self._prompts_to_learn(captions)
        if self._captures(split):
            return self._captured_step(z, t, noise, cond.rows(t))
        return self.p_losses(z, cond, t, noise)

    def p_losses(
        self, x_start: Tensor, cond: Cond, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss and what is logged of it.

        Args:
            x_start: scaled latents (B, C, H, W).
            t: raw timesteps (B,) long.
            noise: standard normal (B, C, H, W).
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_noisy = self.q_sample(x_start, t, noise)
        prediction = self.apply_model(x_noisy, t, cond)
        target = noise
        if self.parameterization == "v":
            target = at(self.sqrt_alphas_cumprod, t) * noise - at(self.sqrt_one_minus_alphas_cumprod, t) * x_start
        per_sample = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
        prefix = "train" if self.training else "val"
        parts = {
            f"{prefix}/loss_simple": per_sample.mean(),
            f"{prefix}/loss_vlb": (self.lvlb_weights[t] * per_sample).mean(),
        }
        if self.balance is not None and self.training:
            per_sample = self.balance(per_sample, t / self.num_timesteps)
        loss = per_sample.mean()
        if self.embedding_reg_weight > 0 and self.embedding_manager is not None:
            regulariser = self.embedding_manager.distance_to_initial()
            parts[f"{prefix}/loss_emb_reg"] = regulariser
            loss = loss + self.embedding_reg_weight * regulariser
        parts[f"{prefix}/loss"] = loss
        return loss, {name: value.detach() for name, value in parts.items()}

    def _prompts_to_learn(self, captions: tuple[str, ...]) -> PromptConditioning:
        """The prompts of a step; read anew only where they are others than those of the step before."""
        key = captions, None if self.embedding_manager is None else self.embedding_manager.rows()
        if self._prompts is None or self._prompts[0] != key or self._prompts[1].slots.device != self.device:
            self._prompts = key, self.get_learned_conditioning(captions)
        return self._prompts[1]

    def _captures(self, split: str) -> bool:
        """Whether the step runs as a CUDA graph.

        With accumulation its gradients would be overwritten. PyTorch captures with several processes and under
        autocast on conditions of their own (more calls before; no cache of weights), so neither is tried.
        """
        trainer = self._trainer
        plain = trainer is None or (trainer.accumulate_grad_batches == 1 and trainer.world_size == 1)
        learns = self.embedding_manager is not None and split == "train"
        on_gpu = self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        return self.cuda_graph and on_gpu and learns and plain

    def _captured_step(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sizes = tuple(x.shape for x in inputs)
        if sizes not in self._captured:
            with torch.random.fork_rng([self.device], device_type="cuda"):  # warming up draws dropout
                self._captured[sizes] = TensorStep(self).capture(inputs)
        step = self._captured[sizes]
        return step.named(step(*inputs))

    def training_step(self, batch: Mapping[str, Any], _: int) -> Tensor:
        torch.manual_seed(batch["dropout_seed"] if "dropout_seed" in batch else self._dropout_seed(batch))
        loss, parts = self.shared_step(batch, "train")
        self.log_dict(parts, prog_bar=False, batch_size=len(batch["sample"]))
        self.log("loss", loss.detach(), logger=False)  # for the bar, which asks for it when it moves
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
            # Lightning clips gradients only for optimizers that are not fused
            clips = self._trainer is not None and self._trainer.gradient_clip_val
            fused = self.fused_adamw and not clips and self.device.type in ("cpu", "cuda")
            return torch.optim.AdamW(parameters, lr=self.learning_rate, fused=fused or None)
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.99))
        return {"optimizer": optimizer, "lr_scheduler": cosine_to_zero(optimizer, self.trainer)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seed"] = self.seed
        if self.embedding_manager is not None:
            kept = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("embedding_manager.")}
            checkpoint["state_dict"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        seed = checkpoint.get("seed", self.seed)
        if seed != self.seed:
            logger.warning("The run goes on with its own seed %d, not with %d.", seed, self.seed)
        self.seed = seed
        if self.embedding_manager is not None:
            self.strict_loading = False  # frozen weights are not in it

    def save_embeddings(self, path: str | Path) -> None:
        """Write what is learned as an embedding file, with where it came from."""
        if self.embedding_manager is None:
            return
        if self.base_model and "base_model_sha256" not in self.base_model:
            self.base_model["base_model_sha256"] = base_hash(self._base_path)
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
