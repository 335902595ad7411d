"""Latent diffusion (Rombach et al. 2022): networks, prompts and loss.

Lightning is not imported here, so that generating starts quickly; `ldm.models.diffusion.ddpm` trains the model.

Shapes: B batch, C latent channels, H W latent height and width, L tokens, D width of the text transformer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import load_weights, read_base_model, read_state_dict
from ldm.conditioning.context import Cond, Context, Projected, as_conditioning
from ldm.conditioning.encoding import LayeredPrompt, PromptConditioning, SlotEncoder
from ldm.conditioning.learned import NOTHING_LEARNED, Learned
from ldm.conditioning.presets import Windows
from ldm.conditioning.prompts import PromptReader
from ldm.methods.base import LearnedModule
from ldm.models.diffusion.acceleration import FixedUNet, Step
from ldm.models.diffusion.balance import LossBalance
from ldm.models.diffusion.options import DiffusionOptions
from ldm.models.diffusion.schedule import at, make_betas, schedule_buffers, vlb_weights
from ldm.models.first_stage import FirstStage, Posterior
from ldm.modules.attention import AttentionHook
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.request import PLACEHOLDER, ModelFacts, Words, check_words
from ldm.util import instantiate_from_config, usual_torch, without_weights


class DiffusionWrapper(nn.Module):
    """Only adds the level `diffusion_model` of the checkpoint's key names."""

    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.diffusion_model = unet


class DiffusionModel(nn.Module):
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
    presets = Windows()

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
        self.base_model: dict[str, str] = {}

        betas = make_betas(opt.linear_start, opt.linear_end, opt.timesteps)
        # the float32 buffer on the host: samplers never ask the device for it
        self.host_alphas_cumprod = np.cumprod(1.0 - betas).astype(np.float32).astype(np.float64)
        for name, buffer in schedule_buffers(betas).items():
            self.register_buffer(name, buffer)
        self.register_buffer("lvlb_weights", vlb_weights(betas), persistent=False)
        self.balance = LossBalance() if opt.balanced_loss else None
        # with a checkpoint the weights are taken from the file
        with without_weights() if opt.ckpt_path else contextlib.nullcontext():
            self.model = DiffusionWrapper(instantiate_from_config(unet_config))
            self.first_stage_model = instantiate_from_config(first_stage_config)
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if (takes := self.model.diffusion_model.in_channels) != opt.channels:
            raise ValueError(f"channels is {opt.channels}, but the U-Net takes {takes} (in_channels).")
        self._load_weights()
        self._freeze(learns_embeddings=personalization_config is not None)
        self.embedding_manager = self._make_manager(personalization_config)
        self.accelerate(opt.compile_unet, opt.cuda_graph)

    # --- weights -----------------------------------------------------------------------------------------------

    def _load_weights(self) -> None:
        """Load the base model, and the parts that other runs trained, where the options name their files."""
        opt, prefix = self.options, "cond_stage_model."
        if opt.ckpt_path:
            state, self.base_model = read_base_model(opt.ckpt_path, opt.dtype)
            load_weights(self, state, opt.ckpt_path)
        if opt.first_stage_ckpt:
            load_weights(self.first_stage_model, read_state_dict(opt.first_stage_ckpt), opt.first_stage_ckpt)
        if opt.cond_stage_ckpt:
            state = read_state_dict(opt.cond_stage_ckpt)
            state = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
            load_weights(self.cond_stage_model, state, opt.cond_stage_ckpt)

    def _freeze(self, learns_embeddings: bool) -> None:
        """Freeze every part that is not trained, and hold it in `frozen_dtype`."""
        frozen: list[nn.Module] = [self.first_stage_model]
        frozen += [self.model] if learns_embeddings else []
        frozen += [] if self.cond_stage_trainable else [self.cond_stage_model]
        for part in frozen:
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
            manager.load(start) if manager.learned is None else manager.start_from(start)
        return manager

    def accelerate(self, compile_unet: bool | str = False, cuda_graph: bool = False) -> None:
        """Choose how the U-Net is called: as it is, compiled (in a mode of torch.compile), or captured in a CUDA graph
        (other devices: as it is). The first call of each size takes long (compiling: about a minute); it then serves
        all stages, prompts and seeds."""
        self.cuda_graph = cuda_graph
        mode = "cuda_graph" if cuda_graph else "reduce-overhead" if compile_unet is True else compile_unet
        self._fixed_unet = FixedUNet(self.model.diffusion_model, mode) if mode else None

    def train(self, mode: bool = True) -> DiffusionModel:
        super().train(mode)
        for module in (self.model, self.first_stage_model, self.cond_stage_model):
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    @property
    def size_unit(self) -> int:
        """Pixels that the height and width of images must be multiples of: 64 for Stable Diffusion v1."""
        return self.first_stage_model.downsampling * self.model.diffusion_model.downsampling

    @contextlib.contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Averaged weights, as LDM code asks for them; a frozen model has only the ones it has."""
        yield

    def __repr__(self) -> str:
        """Return one line, where `nn.Module` would list hundreds of layers; `print(model.model)` does."""
        total = sum(parameter.numel() for parameter in self.parameters())
        base = self.base_model.get("base_model", "no base model")
        names = ", ".join([] if self.embedding_manager is None else self.embedding_manager.loaded) or "none"
        where = f"{self.num_stages} stages, {self.model.diffusion_model.dtype} on {self.device}"
        return f"LatentDiffusion({base}: {total / 1e6:.1f} M parameters, {where}; concepts: {names})"

    # --- first stage -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> Tensor:
        """Return what the posterior of images (B, 3, f·H, f·W) in [-1, 1] is made of, float32."""
        return self.first_stage_model.in_range(self.first_stage_model.moments, images.to(self.device))

    def encode_first_stage(self, images: Tensor) -> Posterior:
        """Return the posterior of the latents of images (B, 3, f·H, f·W) in [-1, 1]."""
        return self.first_stage_model.posterior(self.encode_moments(images))

    def get_first_stage_encoding(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents (B, C, H, W): a sample of the posterior, by `noise` (B, C, H, W) if it is given."""
        return self.scale_factor * (posterior if isinstance(posterior, Tensor) else posterior.sample(noise))

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Return float32 images (B, 3, f·H, f·W), about [-1, 1], not clamped, for scaled latents z (B, C, H, W).

        `decode_batch` images are decoded at a time; one at a time where the device's memory does not hold them all.
        """
        z, first_stage = (z / self.scale_factor).to(self.device), self.first_stage_model

        def decode(size: int) -> Tensor:
            return torch.cat([first_stage.in_range(first_stage.decode, part) for part in z.split(size)])

        try:
            return decode(self.decode_batch or len(z))
        except torch.OutOfMemoryError:
            if len(z) == 1:
                raise
        return decode(1)

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
        return self._conditioning(slots, self.learned_now(truncation))

    def _conditioning(self, slots: Tensor, learned: Learned) -> PromptConditioning:
        return PromptConditioning(slots, SlotEncoder(self.encode_slots, learned), self.num_timesteps, self.device)

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
        return self._conditioning(self.prompt_reader(plain=True).read([negative] * count), NOTHING_LEARNED)

    def encode_slots(self, slots: Tensor, t: Tensor, learned: Learned | None = None, plain: int = 0) -> Context:
        """Return the context of token slots (N, L), with what is learned at timesteps t (1 or N,) in its places.

        Args:
            learned: None is what is learned or loaded now.
            plain: how many tokens at the beginning are no learned ones in any row.
        """
        learned = self.learned_now() if learned is None else learned
        return self.cond_stage_model.encode(slots, learned.vectors(t), learned.prefix, learned.logit_bias, plain)

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
        return (self._fixed_unet or self.model.diffusion_model)(x_noisy, t, cond)

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

    @property
    def learned(self) -> LearnedModule | None:
        """The module that is being learned; None otherwise."""
        return None if self.embedding_manager is None else self.embedding_manager.learned
