"""Learn with latent diffusion: the model as a Lightning module.

With a `personalization_config` only the embedding manager is trained, against the frozen model (ProSpect,
Zhang et al. 2023). Without one the U-Net is trained from scratch, with the text transformer if
`cond_stage_trainable`.

Shapes: B batch, C latent channels, H W latent height and width, L tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.conditioning.context import Context
from ldm.conditioning.encoding import PromptConditioning
from ldm.conditioning.stages import timesteps_of
from ldm.models.autoencoder import cosine_to_zero
from ldm.models.diffusion.acceleration import Step, TensorStep
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.models.diffusion.latent_diffusion import DiffusionWrapper as DiffusionWrapper  # LDM has it here
from ldm.models.diffusion.latents import ImageSet, LatentCache
from ldm.models.diffusion.sampling import draw_noise
from ldm.models.first_stage import Posterior, mode_of
from ldm.util import mix_seed, to_device

logger = logging.getLogger(__name__)


def draw_sample(
    number: int, seed: int, timesteps: range, latent_shape: Sequence[int], validating: bool = False
) -> dict[str, Tensor]:
    """Draw a training sample's `t` (1,) from `timesteps`, and its `posterior_noise` and `noise` (1, C, H, W).

    They are functions of the run's seed and the sample's number only: a resumed run draws what the uninterrupted one
    would have drawn, in whatever batches.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, number, validating))
    t = torch.randint(timesteps.start, timesteps.stop, (1,), generator=generator, device="cpu")
    posterior_noise, noise = (draw_noise([generator], (1, *latent_shape), "cpu") for _ in range(2))
    return {"t": t, "posterior_noise": posterior_noise, "noise": noise}


class LatentDiffusion(DiffusionModel, pl.LightningModule):
    """A `DiffusionModel` to be trained; arguments and errors are those of that class."""

    learning_rate = 1e-4
    seed = 23
    timesteps: Tensor | None = None  # (B,), of the latest training batch
    losses: Tensor | None = None  # (B,), of the latest training batch
    _latents: LatentCache | None = None
    _prompts: tuple[Any, PromptConditioning] | None = None  # of the latest training batch

    @cached_property
    def _read_below(self) -> dict[tuple[str, int], Tensor]:
        """Caption, text layer -> what that layer reads (L, D)."""
        return {}

    @cached_property
    def _captured(self) -> dict[Any, TensorStep]:
        """Training steps by the sizes of their inputs; no submodules of this one."""
        return {}

    def on_fit_start(self) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("Learning needs gradients, which torch.inference_mode() switches off; fit outside of it.")
        self._read_below.clear()  # another device, perhaps
        self._captured.clear()  # graphs of an earlier fit: the weights may have moved since
        if self.cuda_graph:
            with self.trainer.precision_plugin.forward_context():
                captures = self._captures("train")
            logger.info(
                "cuda_graph is used for the training step."
                if captures
                else "cuda_graph is not used for the training step: it needs a CUDA device, embeddings to learn, one "
                "process, no accumulation, and a precision that is not mixed."
            )
        dataset: Any = self._datasets().get("train")
        if self.options.cache_latents and hasattr(dataset, "with_images"):
            latents = self.cache_latents(dataset)
            if self.options.standardize_latents and self.trainer.ckpt_path is None:
                latents.standardize(self.first_stage_model)  # type: ignore[arg-type]  # KL only

    def cache_latents(self, dataset: ImageSet) -> LatentCache:
        """Encode all images of a data set, which from then on are no part of its samples."""
        self._latents = LatentCache(self.encode_moments, dataset)
        return self._latents

    def _datasets(self) -> Mapping[str, Any]:
        return getattr(getattr(self.trainer, "datamodule", None), "datasets", {})

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw on the host while the device works on the step before; the step itself never waits for the device."""
        if "sample" not in batch:
            return batch
        draw = self._draw(batch, "train" if self.trainer.training else "val")
        if self.device.type == "cuda":
            draw = {name: values.pin_memory() for name, values in draw.items()}
        return {**batch, "draw": draw, "dropout_seed": self._dropout_seed(batch)}

    def _draw(self, batch: Mapping[str, Any], split: str) -> dict[str, Tensor]:
        """Return the timesteps and noise samples of a batch, on the host."""
        if self._latents is not None and self.image_key not in batch:
            height, width = self._latents.moments.shape[2:]
        else:
            height, width = (side // self.first_stage_model.downsampling for side in batch[self.image_key].shape[1:3])
        samples = []
        for number in batch["sample"].tolist():
            timesteps = range(self.num_timesteps)
            if self.options.time_sampling == "stages":
                timesteps = timesteps_of(number % self.num_stages, self.num_stages, self.num_timesteps)
            shape = (self.channels, height, width)
            samples.append(draw_sample(number, self.seed, timesteps, shape, validating=split == "val"))
        return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}

    def _dropout_seed(self, batch: Mapping[str, Any]) -> int:
        # dropout takes no generator; seeding by the first sample of all processes' batches makes it, too, the same
        # in a resumed run and in every process; all processes validate on the same samples
        before = self.global_rank * len(batch["sample"]) if self._trainer is None or self._trainer.training else 0
        return mix_seed(self.seed, int(batch["sample"][0]) - before)

    def posterior(self, batch: Mapping[str, Any]) -> Posterior:
        """Return the posterior of a batch's latents, from the cache or from the first stage."""
        if self.image_key not in batch and self._latents is not None:
            moments = self._latents.of(batch["image_number"], batch["flipped"])
            return self.first_stage_model.posterior(moments)
        return self.encode_first_stage(batch[self.image_key].permute(0, 3, 1, 2))

    def shared_step(self, batch: Mapping[str, Any], split: str) -> Step:
        """Return the loss of a batch, and the values to be logged."""
        draw = batch.get("draw") or self._draw(batch, split)
        t, noise, posterior_noise = (to_device(draw[name], self.device) for name in ("t", "noise", "posterior_noise"))
        self.timesteps = t
        z = self.get_first_stage_encoding(self.posterior(batch), posterior_noise)
        captions = tuple(batch[self.caption_key])
        if not torch.is_grad_enabled():
            return self.p_losses(z, self.get_learned_conditioning(captions), t, noise)
        cond = self._prompts_to_learn(captions)
        if self._captures(split):
            return self._captured_step(z, t, noise, cond.rows(t))
        return self.p_losses(z, self._from_below(captions) or cond, t, noise)

    def _prompts_to_learn(self, captions: tuple[str, ...]) -> PromptConditioning:
        """Return the prompts of a step, read anew only where they differ from those of the step before."""
        manager, learned = self.embedding_manager, self.learned_now()
        key = captions, None if manager is None else manager.rows(), learned.tokens, learned.prefixes
        if self._prompts is None or self._prompts[0] != key or self._prompts[1].slots.device != self.device:
            self._prompts = key, self.get_learned_conditioning(captions)
        return self._prompts[1]

    def _from_below(self, captions: tuple[str, ...]) -> Context | None:
        """Return the context of captions by the layers with a prefix alone; None where something else is learned."""
        learned = self.learned_now()
        if not self.options.cache_text or not learned.prefixes or learned.tokens:
            return None
        layer, encoder, reader = min(learned.prefix), self.cond_stage_model, self.prompt_reader(plain=True)
        for key in {(caption, layer) for caption in captions} - self._read_below.keys():
            slots = reader.read([key[0]])[0].to(self.device)  # alone: its last digits do not depend on other captions
            self._read_below[key] = encoder.read_below(slots, layer)[0]
        hidden = torch.stack([self._read_below[caption, layer] for caption in captions])
        return encoder.encode_above(hidden, layer, learned.prefix, learned.logit_bias)

    def _captures(self, split: str) -> bool:
        """Return whether the step runs as a CUDA graph.

        With accumulation its gradients would be overwritten. PyTorch captures with several processes and under
        autocast on conditions of their own (more calls before; no cache of weights), so neither is tried.
        """
        trainer = self._trainer
        plain = trainer is None or (trainer.accumulate_grad_batches == 1 and trainer.world_size == 1)
        learns = self.embedding_manager is not None and split == "train"
        on_gpu = self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        return self.cuda_graph and on_gpu and learns and plain

    def _captured_step(self, *inputs: Tensor) -> Step:
        sizes = tuple(x.shape for x in inputs)
        if sizes not in self._captured:
            with torch.random.fork_rng([self.device], device_type="cuda"):  # warming up draws dropout
                self._captured[sizes] = TensorStep(self.embedding_manager, self._loss_of_tensors).capture(inputs)
        step = self._captured[sizes]
        return step.named(step(*inputs))

    def _loss_of_tensors(self, z: Tensor, t: Tensor, noise: Tensor, slots: Tensor) -> Step:
        return self.p_losses(z, self.encode_slots(slots, t), t, noise)

    def training_step(self, batch: Mapping[str, Any], _: int) -> Tensor:
        torch.manual_seed(batch["dropout_seed"] if "dropout_seed" in batch else self._dropout_seed(batch))
        loss, parts = self.shared_step(batch, "train")
        self.losses = parts.pop("losses")
        self.log_dict(parts, prog_bar=False, batch_size=len(batch["sample"]))
        self.log("loss", loss.detach(), logger=False)  # for the bar, which asks for it when it moves
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], _: int) -> None:
        parts = self.shared_step(batch, "val")[1]
        del parts["losses"]
        # there are no averaged weights to compare with: the reference logs the same values under both names
        parts |= {f"{name}_ema": value for name, value in parts.items()}
        self.log_dict(parts, batch_size=len(batch["sample"]))

    def trainable_parameters(self) -> list[nn.Parameter]:
        if self.embedding_manager is not None:
            return self.embedding_manager.embedding_parameters()
        text = list(self.cond_stage_model.parameters()) if self.cond_stage_trainable else []
        return [*self.model.parameters(), *text]

    def configure_optimizers(self) -> Any:
        """Return AdamW: at a constant rate for embeddings; with warm-up and decay to zero for training from scratch."""
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
            logger.warning("The run keeps its own seed %d, not %d.", seed, self.seed)
        self.seed = seed
        if self.embedding_manager is not None:
            self.strict_loading = False  # frozen weights are not in it

    def save_embeddings(self, path: str | Path) -> None:
        """Write the learned embeddings as a concept file, with where they came from."""
        if self.embedding_manager is None:
            return
        captions = getattr(self._datasets().get("train"), "templates", ["{}"])
        described = {} if captions == ["{}"] else {"captions": "\n".join(captions)}
        self.embedding_manager.save(path, step=str(self.trainer.global_step), **described, **self.base_model)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 4, split: str = "train", ddim_steps: int = 50, scale: float = 5.0
    ) -> dict[str, Tensor]:
        """Return images to look at during training, (N, 3, H, W) each; samples start from fixed noise."""
        z = self.get_first_stage_encoding(mode_of(self.posterior(batch)))[:N]
        captions = list(batch[self.caption_key])[: len(z)]
        images = {"reconstruction": self.decode_first_stage(z)}
        if self.image_key in batch:
            images["inputs"] = batch[self.image_key][:N].permute(0, 3, 1, 2)
        generators = [torch.Generator().manual_seed(mix_seed(self.seed, i)) for i in range(len(z))]
        x_T = draw_noise(generators, z.shape, self.device)
        cond, uncond = self.get_learned_conditioning(captions), self.get_unconditional(count=len(z))
        sampler = DDIMSampler(self)
        sampler.make_schedule(ddim_steps)
        for name, guidance in {"samples": 1.0, "samples_scaled": scale}.items():
            images[name] = self.decode_first_stage(sampler.decode(x_T, cond, ddim_steps, guidance, uncond))
        return images
