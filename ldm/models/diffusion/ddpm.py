"""Latent diffusion (Rombach et al. 2022): networks, prompts, loss and training step.

With a `personalization_config` only the embedding manager is trained, against the frozen model (ProSpect,
Zhang et al. 2023). Without one the U-Net is trained from scratch, with the text transformer if
`cond_stage_trainable`.

Shapes: B batch, C latent channels, H W latent height and width, L tokens, D width of the text transformer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import load_weights, read_base_model, read_state_dict
from ldm.conditioning.context import Cond, Context, Projected, as_conditioning
from ldm.conditioning.encoding import LayeredPrompt, PromptConditioning, SlotEncoder
from ldm.conditioning.learned import NOTHING_LEARNED, Learned
from ldm.conditioning.presets import Windows
from ldm.conditioning.prompts import PLACEHOLDER, PromptReader, Words, check_words
from ldm.methods.base import LearnedModule
from ldm.models.autoencoder import FirstStage, cosine_to_zero
from ldm.models.diffusion import latents
from ldm.models.diffusion.acceleration import FixedUNet, Step, TensorStep
from ldm.models.diffusion.balance import LossBalance
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.draws import Draws
from ldm.models.diffusion.latents import LatentCache, Posterior
from ldm.models.diffusion.options import DiffusionOptions
from ldm.models.diffusion.sampling import draw_noise
from ldm.models.diffusion.schedule import at, host_alphas_cumprod, make_betas, schedule_buffers, vlb_weights
from ldm.modules.attention import AttentionHook
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.request import ModelFacts
from ldm.util import instantiate_from_config, mix_seed, to_device, usual_torch

logger = logging.getLogger(__name__)

CAPTURED = "cuda_graph is used for the training step."
NOT_CAPTURED = (
    "cuda_graph is not used for the training step: it needs a CUDA device, embeddings to learn, one process, "
    "no accumulation, and a precision that is not mixed."
)


class DiffusionWrapper(nn.Module):
    """Only adds the level `diffusion_model` of the checkpoint's key names."""

    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.diffusion_model = unet


class LatentDiffusion(pl.LightningModule):
    """A U-Net on the latents of a first stage, told by a text transformer what to show.

    Args:
        unet_config, first_stage_config, cond_stage_config: the networks, each with `target` and `params`.
        personalization_config: the embedding manager; None trains the networks.
        options: the fields of `DiffusionOptions`.

    Raises:
        ValueError, ConfigError, CheckpointError: an unknown choice, or parts that do not fit each other.
    """

    options_type = DiffusionOptions
    ignored_keys = {
        "num_timesteps_cond": "there is one conditioning for all timesteps, chosen by stage",
        "log_every_t": "samplers report every step through a callback",
        "conditioning_key": "conditioning is always cross-attention",
        "monitor": "the last checkpoint is kept",
        "use_ema": "averaged weights come from the callback ldm.training.callbacks.AveragedWeights",
        "scheduler_config": "the learning rate is constant when embeddings are learned",
        "unfreeze_model": "frozen weights stay frozen",
        "model_lr": "frozen weights stay frozen",
        "image_size": "latents of any size are taken",
    }

    # what `load_model_from_config` finds in the configuration and beside the weights
    facts = ModelFacts()
    presets: Mapping[str, Sequence[int]] = Windows()

    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    lvlb_weights: Tensor
    first_stage_model: FirstStage
    cond_stage_model: FrozenCLIPEmbedder

    @usual_torch(keep_meta=True)
    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        personalization_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = opt = DiffusionOptions(**options)
        self.parameterization = opt.parameterization
        self.num_timesteps, self.num_stages = opt.timesteps, opt.prospect_stages
        self.channels, self.scale_factor = opt.channels, opt.scale_factor
        self.image_key, self.caption_key = opt.first_stage_key, opt.cond_stage_key
        self.cond_stage_trainable = opt.cond_stage_trainable and personalization_config is None
        self.fused_adamw, self.decode_batch = opt.fused_adamw, opt.decode_batch
        self.learning_rate = 1e-4
        self.seed = 23
        self.base_model: dict[str, str] = {}
        self.timesteps: Tensor | None = None  # (B,), of the latest training batch
        self.losses: Tensor | None = None  # (B,), of the latest training batch
        self._latents: LatentCache | None = None
        self._prompts: tuple[Any, PromptConditioning] | None = None  # of the latest training batch
        self._read_below: dict[tuple[str, int], Tensor] = {}  # caption, text layer -> what it reads (L, D)
        self._captured: dict[Any, TensorStep] = {}  # by the sizes of their inputs; no submodules of this one

        betas = make_betas(opt.linear_start, opt.linear_end, opt.timesteps)
        self.host_alphas_cumprod = host_alphas_cumprod(betas)  # samplers never ask the device for it
        for name, buffer in schedule_buffers(betas).items():
            self.register_buffer(name, buffer)
        self.register_buffer("lvlb_weights", vlb_weights(betas), persistent=False)
        self.balance = LossBalance() if opt.balanced_loss else None
        # with a checkpoint the weights are built without memory and then taken from the file
        with torch.device("meta") if opt.ckpt_path else contextlib.nullcontext():
            self.model = DiffusionWrapper(instantiate_from_config(unet_config))
            self.first_stage_model = instantiate_from_config(first_stage_config)
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if (takes := self.model.diffusion_model.in_channels) != opt.channels:
            raise ValueError(f"channels is {opt.channels}, but the U-Net takes {takes} (in_channels).")
        if opt.ckpt_path:
            self.init_from_ckpt(opt.ckpt_path, opt.dtype)
        self.load_parts(opt.first_stage_ckpt, opt.cond_stage_ckpt)
        self._freeze(learns_embeddings=personalization_config is not None)
        self.embedding_manager = self._make_manager(personalization_config)
        self.accelerate(opt.compile_unet, opt.cuda_graph)

    # --- weights -----------------------------------------------------------------------------------------------

    def init_from_ckpt(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Load the weights of a base model; see `ldm.checkpoint` for formats and errors."""
        state, self.base_model = read_base_model(path, dtype)
        load_weights(self, state, path)

    def load_parts(self, first_stage_ckpt: str | None = None, cond_stage_ckpt: str | None = None) -> None:
        """Load the parts that other runs trained, from their checkpoints."""
        if first_stage_ckpt:
            load_weights(self.first_stage_model, read_state_dict(first_stage_ckpt), first_stage_ckpt)
        if cond_stage_ckpt:
            prefix = "cond_stage_model."
            state = read_state_dict(cond_stage_ckpt)
            state = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
            load_weights(self.cond_stage_model, state, cond_stage_ckpt)

    def _freeze(self, learns_embeddings: bool) -> None:
        """Freeze every part that is not trained, and hold it in `frozen_dtype`."""
        frozen = {
            self.first_stage_model: True,
            self.model: learns_embeddings,
            self.cond_stage_model: not self.cond_stage_trainable,
        }
        for part, stays in frozen.items():
            if stays:
                part.eval().requires_grad_(False).to(self.options.dtype)
        if self.options.channels_last:
            for part in (self.model, self.first_stage_model):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _make_manager(self, config: Mapping[str, Any] | None) -> EmbeddingManager | None:
        if config is None:
            return None
        sizes = {"num_stages": self.num_stages, "num_layers": self.model.diffusion_model.num_attention_layers}
        manager = instantiate_from_config(config, embedder=self.cond_stage_model, **sizes)
        manager.base_model = self.base_model
        if (start := self.options.embedding_manager_ckpt) is not None:
            manager.start_from(start) if manager.learning else manager.load(start)
        return manager

    def accelerate(self, compile_unet: bool | str = False, cuda_graph: bool = False) -> None:
        """Choose how the U-Net is called: as it is, compiled (in a mode of torch.compile), or captured in a CUDA graph
        (other devices: as it is). The first call of each size takes long (compiling: about a minute); it then serves
        all stages, prompts and seeds."""
        self.cuda_graph = cuda_graph
        self._captured.clear()
        mode = "cuda_graph" if cuda_graph else "reduce-overhead" if compile_unet is True else compile_unet
        self._fixed_unet = FixedUNet(self.model.diffusion_model, mode) if mode else None

    def train(self, mode: bool = True) -> LatentDiffusion:
        super().train(mode)
        for module in (self.model, self.first_stage_model, self.cond_stage_model):
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    @property
    def size_unit(self) -> int:
        """Pixels that the height and width of images must be multiples of: 64 for Stable Diffusion v1."""
        return self.first_stage_model.downsampling * self.model.diffusion_model.downsampling

    @contextlib.contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Averaged weights, as LDM code asks for them; a frozen model has only the ones it has."""
        yield

    # --- first stage -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_first_stage(self, images: Tensor) -> Posterior:
        """Return the posterior of the latents of images (B, 3, f·H, f·W) in [-1, 1]."""
        return latents.encode(self.first_stage_model, images.to(self.device))

    def get_first_stage_encoding(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents (B, C, H, W): a sample of the posterior, by `noise` (B, C, H, W) if it is given."""
        return self.scale_factor * (posterior if isinstance(posterior, Tensor) else posterior.sample(noise))

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Return float32 images (B, 3, f·H, f·W), about [-1, 1], not clamped, for scaled latents z (B, C, H, W)."""
        return latents.decode(self.first_stage_model, (z / self.scale_factor).to(self.device), self.decode_batch)

    def __repr__(self) -> str:
        """Return one line, where `nn.Module` would list hundreds of layers; `print(model.model)` does."""
        total = sum(parameter.numel() for parameter in self.parameters())
        base = self.base_model.get("base_model", "no base model")
        names = ", ".join([] if self.embedding_manager is None else self.embedding_manager.loaded) or "none"
        where = f"{self.num_stages} stages, {self.model.diffusion_model.dtype} on {self.device}"
        return f"LatentDiffusion({base}: {total / 1e6:.1f} M parameters, {where}; concepts: {names})"

    # --- prompts -----------------------------------------------------------------------------------------------

    def get_learned_conditioning(
        self,
        prompts: str | Sequence[str],
        prospect_words: Words | None = None,
        legacy_word_tokens: bool = False,
        truncation: int | None = None,
    ) -> PromptConditioning:
        """Return a batch of prompts, each with the same `prospect_words` (S entries; see `ldm.conditioning.prompts`).

        Args:
            truncation: hidden values of NeTI's mapper that are kept, as a slice `[:truncation]`; None keeps all 128.

        Raises:
            ValueError: `prospect_words` of the wrong length or with a wrong entry.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        slots = self.prompt_reader().read(prompts, prospect_words, legacy_word_tokens)
        # what is loaded now, as for the reader, whatever another thread loads meanwhile
        encoder = SlotEncoder(self.encode_slots, self.learned_now(truncation))
        return PromptConditioning(slots, encoder, self.num_timesteps, self.device)

    def prompt_reader(self, plain: bool = False) -> PromptReader:
        """Return what turns prompts into token slots, with what is learned or loaded now; `plain` without it."""
        manager, encoder = self.embedding_manager, self.cond_stage_model
        rows = {} if manager is None or plain else manager.rows()
        return PromptReader(encoder.tokenizer, rows, self.num_stages, encoder.max_length)

    def learned_now(self, truncation: int | None = None) -> Learned:
        """Return everything learned that prompts read at this moment."""
        return NOTHING_LEARNED if self.embedding_manager is None else self.embedding_manager.learned_now(truncation)

    def get_layered_conditioning(
        self, prompts: str | Sequence[str], layer_words: Words, truncation: int | None = None
    ) -> LayeredPrompt:
        """Return a batch of prompts that differ from U-Net layer to U-Net layer (P+).

        Args:
            layer_words: an entry for each cross-attention layer, in order of execution: a text that takes the place
                of `*`, the number of the layer whose learned token does, or None for the prompt as it is.

        Raises:
            ValueError: `layer_words` of the wrong length or with a wrong entry.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        count = self.model.diffusion_model.num_attention_layers
        by_text: dict[str | None, PromptConditioning] = {}
        layers = []
        for layer, word in enumerate(check_words(layer_words, count, "layer")):
            text, read = (word, layer) if not isinstance(word, int) else (None, word)
            if text not in by_text:
                texts = prompts if text is None else [prompt.replace(PLACEHOLDER, text) for prompt in prompts]
                by_text[text] = self.get_learned_conditioning(texts, truncation=truncation)
            layers.append((by_text[text], read))
        return LayeredPrompt(layers)

    def get_unconditional(self, negative: str = "", count: int = 1) -> PromptConditioning:
        """Return `count` times the plain text that guidance leads away from, every concept switched off."""
        slots = self.prompt_reader(plain=True).read([negative] * count)
        plain = SlotEncoder(self.encode_slots, NOTHING_LEARNED)
        return PromptConditioning(slots, plain, self.num_timesteps, self.device)

    def encode_slots(self, slots: Tensor, t: Tensor, learned: Learned | None = None, plain: int = 0) -> Context:
        """Return the context of token slots (N, L), with what is learned at timesteps t (1 or N,) in its places.

        Args:
            learned: None is what is learned or loaded now.
            plain: how many tokens at the beginning are no learned ones in any row.
        """
        learned = self.learned_now() if learned is None else learned
        vectors = learned.vectors(t)
        return self.cond_stage_model.encode(slots, vectors, learned.prefix, learned.logit_bias, plain)

    # --- diffusion ---------------------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise latents to timesteps t (B,): sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (Ho et al. 2020, eq. 4)."""
        return at(self.sqrt_alphas_cumprod, t) * x_start + at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def apply_model(
        self, x_noisy: Tensor, t: Tensor, cond: Cond | Projected, hook: AttentionHook | None = None
    ) -> Tensor:
        """Return what the U-Net predicts, float32 (B, C, H, W), for latents at raw timesteps t (B,).

        A `hook` is called in every attention (see `ldm.modules.attention`), and needs the U-Net as it is.
        """
        if not isinstance(cond, Projected):
            cond = as_conditioning(cond, self.num_timesteps).at(t)
        if hook is not None:
            return self.model.diffusion_model(x_noisy, t, cond, hook)
        unet = self._fixed_unet or self.model.diffusion_model
        return unet(x_noisy, t, cond)

    def project_context(self, context: Context) -> Projected:
        """Return the keys and values of all cross-attention layers, for `apply_model` in a context's place."""
        return self.model.diffusion_model.project(context)

    def to_eps(self, prediction: Tensor, x_noisy: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise, whatever the parameterization (v: Salimans and Ho 2022, appendix D)."""
        if self.parameterization == "eps":
            return prediction
        return at(self.sqrt_alphas_cumprod, t) * prediction + at(self.sqrt_one_minus_alphas_cumprod, t) * x_noisy

    def p_losses(self, x_start: Tensor, cond: Cond, t: Tensor, noise: Tensor | None = None) -> Step:
        """Return the training loss, and the values to be logged beside `losses`, those of the samples (B,).

        Args:
            x_start: scaled latents (B, C, H, W).
            t: raw timesteps (B,) long.
            noise: standard normal (B, C, H, W).
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        prediction = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        target = noise
        if self.parameterization == "v":
            target = at(self.sqrt_alphas_cumprod, t) * noise - at(self.sqrt_one_minus_alphas_cumprod, t) * x_start
        per_sample = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
        prefix = "train" if self.training else "val"
        parts = {
            "losses": per_sample,
            f"{prefix}/loss_simple": per_sample.mean(),
            f"{prefix}/loss_vlb": (self.lvlb_weights[t] * per_sample).mean(),
        }
        if self.balance is not None and self.training:
            per_sample = self.balance(per_sample, t / self.num_timesteps)
        loss = per_sample.mean()
        weight = self.options.embedding_reg_weight
        if weight > 0 and self.embedding_manager is not None:
            regulariser = self.embedding_manager.distance_to_initial()
            parts[f"{prefix}/loss_emb_reg"] = regulariser
            loss = loss + weight * regulariser
        parts[f"{prefix}/loss"] = loss
        return loss, {name: value.detach() for name, value in parts.items()}

    # --- training ----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("Learning needs gradients, which torch.inference_mode() switches off; fit outside of it.")
        self._read_below.clear()  # another device, perhaps
        self._captured.clear()  # graphs of an earlier fit: the weights may have moved since
        if self.cuda_graph:
            with self.trainer.precision_plugin.forward_context():
                captures = self._captures("train")
            logger.info(CAPTURED if captures else NOT_CAPTURED)
        datasets = self._datasets()
        if self.options.cache_latents and "train" in datasets and hasattr(datasets["train"], "with_images"):
            self._latents = LatentCache(self.encode_first_stage, datasets["train"])
            if self.options.standardize_latents and self.trainer.ckpt_path is None:
                self._latents.standardize(self.first_stage_model)  # type: ignore[arg-type]  # KL only

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
        by_stage = self.options.time_sampling == "stages"
        draws = Draws(self.seed, self.num_stages, self.num_timesteps, by_stage)
        return draws.batch(batch["sample"].tolist(), self._latent_shape(batch), validating=split == "val")

    def _latent_shape(self, batch: Mapping[str, Any]) -> torch.Size:
        if self.image_key not in batch and self._latents is not None:
            return self._latents.shape
        sides = batch[self.image_key].shape[1:3]
        return torch.Size((self.channels, *(side // self.first_stage_model.downsampling for side in sides)))

    def _dropout_seed(self, batch: Mapping[str, Any]) -> int:
        # dropout takes no generator; seeding by the first sample of all processes' batches makes it, too, the same
        # in a resumed run and in every process; all processes validate on the same samples
        before = self.global_rank * len(batch["sample"]) if self._trainer is None or self._trainer.training else 0
        return mix_seed(self.seed, int(batch["sample"][0]) - before)

    def posterior(self, batch: Mapping[str, Any]) -> Posterior:
        """Return the posterior of a batch's latents, from the cache or from the first stage."""
        if self.image_key not in batch and self._latents is not None:
            return self._latents.posterior(batch["image_number"], batch["flipped"])
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
                self._captured[sizes] = TensorStep(self).capture(inputs)
        step = self._captured[sizes]
        return step.named(step(*inputs))

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

    @property
    def learned(self) -> LearnedModule | None:
        """The module that is being learned; None otherwise."""
        return None if self.embedding_manager is None else self.embedding_manager.learned

    @property
    def learned_parameters(self) -> nn.Module:
        """The embedding manager, whose parameters are what is learned."""
        if self.embedding_manager is None:
            raise ValueError("This model has no personalization_config, so nothing is learned beside its networks.")
        return self.embedding_manager

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
        z = self.get_first_stage_encoding(latents.mode(self.posterior(batch)))[:N]
        captions = list(batch[self.caption_key])[: len(z)]
        images = {"reconstruction": self.decode_first_stage(z)}
        if self.image_key in batch:
            images["inputs"] = batch[self.image_key][:N].permute(0, 3, 1, 2)
        generators = [torch.Generator().manual_seed(mix_seed(self.seed, i)) for i in range(len(z))]
        x_T = draw_noise(generators, z.shape, self.device)
        cond = self.get_learned_conditioning(captions)
        uncond = self.get_unconditional(count=len(z))
        for name, guidance in {"samples": 1.0, "samples_scaled": scale}.items():
            z, _ = DDIMSampler(self).sample(
                S=ddim_steps,
                batch_size=len(x_T),
                shape=tuple(x_T.shape[1:]),
                conditioning=cond,
                unconditional_guidance_scale=guidance,
                unconditional_conditioning=uncond,
                x_T=x_T,
                verbose=False,
            )
            images[name] = self.decode_first_stage(z)
        return images
