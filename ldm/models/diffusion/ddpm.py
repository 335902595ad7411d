"""Latent diffusion (Rombach et al. 2022): the model, its prompts, and its first stage.

With a `personalization_config` only the embedding manager is trained, against the frozen model (ProSpect,
Zhang et al. 2023). Without one the U-Net is trained from scratch, with the text transformer if
`cond_stage_trainable`. Its loss, and what Lightning calls, are in `fitting.py`.

Shapes: B batch, C latent channels, H W latent height and width, L tokens, D width of the text transformer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import load_weights, read_state_dict
from ldm.conditioning.context import Conditioning, Context, Projected, as_conditioning
from ldm.conditioning.encoding import PromptConditioning, SlotEncoder
from ldm.conditioning.prompts import PromptReader, Words
from ldm.memory import check_weights
from ldm.models.diffusion.acceleration import FixedUNet
from ldm.models.diffusion.balance import LossBalance
from ldm.models.diffusion.fitting import Fitting
from ldm.models.diffusion.latents import LatentCodec
from ldm.models.diffusion.schedule import at, make_betas, schedule_buffers, vlb_weights
from ldm.native import Native
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

Cond = Conditioning | Context | Tensor | Sequence[Tensor]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DiffusionWrapper(nn.Module):
    """Only adds the level `diffusion_model` of the checkpoint's key names."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = unet


class LatentDiffusion(LatentCodec, Fitting):
    """Parameters as in the reference's YAML, and these:

    Args:
        parameterization: what the U-Net predicts, `eps` (Stable Diffusion v1) or `v` (Salimans and Ho 2022).
        ckpt_path: base model (.ckpt, .safetensors, diffusers folder). None: random weights.
        first_stage_ckpt, cond_stage_ckpt: for training from scratch, the runs that trained these parts.
        standardize_latents: training from scratch: fold into the first stage what gives its latents mean 0 and
            standard deviation 1 in every channel (LDM's `scale_by_std`, but for each channel).
        embedding_manager_ckpt: concept to start from, or to generate with.
        frozen_dtype: float32, float16 or bfloat16, the precision in which frozen weights are held and used.
        channels_last: memory format of the convolutions' weights.
        cache_latents: encode every picture once (posterior moments, for each flip); the posterior is still
            sampled in every step.
        time_sampling: `uniform` (the reference), or `stages`: sample n is trained at a random timestep of stage
            n mod S, so that every stage has its turn.
        balanced_loss: training from scratch: divide the loss by its running mean at that noise level.
        fused_adamw: PyTorch's fused kernel for the embeddings' optimizer.
        decode_batch: pictures that the first stage decodes at a time, when memory is short; None for all.
        compile_unet: torch.compile the U-Net; see `accelerate`.
        cuda_graph: capture the U-Net call, and the training step, in CUDA graphs; see `accelerate`.

    Raises:
        ValueError: an unknown choice, or parts that do not fit each other.
    """

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

    native = Native()  # what `load_model_from_config` finds in the configuration

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        personalization_config: Mapping[str, Any] | None = None,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        timesteps: int = 1000,
        channels: int = 4,
        scale_factor: float = 0.18215,
        prospect_stages: int = 10,
        first_stage_key: str = "image",
        cond_stage_key: str = "caption",
        cond_stage_trainable: bool = False,
        embedding_reg_weight: float = 0.0,
        parameterization: str = "eps",
        ckpt_path: str | None = None,
        first_stage_ckpt: str | None = None,
        cond_stage_ckpt: str | None = None,
        standardize_latents: bool = False,
        embedding_manager_ckpt: str | None = None,
        frozen_dtype: str = "float32",
        channels_last: bool = False,
        cache_latents: bool = True,
        time_sampling: str = "uniform",
        balanced_loss: bool = False,
        fused_adamw: bool = True,
        decode_batch: int | None = None,
        compile_unet: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        if parameterization not in ("eps", "v"):
            raise ValueError(f"parameterization must be 'eps' or 'v', not '{parameterization}'.")
        if frozen_dtype not in DTYPES:
            raise ValueError(f"frozen_dtype must be one of {', '.join(DTYPES)}, not '{frozen_dtype}'.")
        for name, count in (("timesteps", timesteps), ("prospect_stages", prospect_stages)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}.")
        if time_sampling not in ("uniform", "stages"):
            raise ValueError(f"time_sampling must be 'uniform' or 'stages', not '{time_sampling}'.")
        self.time_sampling = time_sampling
        if decode_batch is not None and decode_batch < 1:
            raise ValueError(f"decode_batch must be at least 1, or left out for all at once, not {decode_batch}.")
        self.parameterization = parameterization
        self.num_timesteps = timesteps
        self.channels = channels
        self.scale_factor = scale_factor
        self.num_stages = prospect_stages
        self.image_key, self.caption_key = first_stage_key, cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable and personalization_config is None
        self.embedding_reg_weight = embedding_reg_weight
        self.cache_latents = cache_latents
        self.standardize_latents = standardize_latents
        self.fused_adamw, self.decode_batch = fused_adamw, decode_batch
        self.base_model: dict[str, str] = {}

        betas = make_betas(linear_start, linear_end, timesteps)
        for name, buffer in schedule_buffers(betas).items():
            self.register_buffer(name, buffer)
        self.register_buffer("lvlb_weights", vlb_weights(betas), persistent=False)
        self.balance = LossBalance() if balanced_loss else None

        # with a checkpoint the weights are built without memory and then taken from the file
        with torch.device("meta") if ckpt_path else contextlib.nullcontext():
            self.model = DiffusionWrapper(instantiate_from_config(unet_config))
            self.first_stage_model = instantiate_from_config(first_stage_config)
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if self.model.diffusion_model.in_channels != channels:
            raise ValueError(
                f"channels is {channels}, but the U-Net takes {self.model.diffusion_model.in_channels} (in_channels)."
            )
        if ckpt_path:
            check_weights(self, DTYPES[frozen_dtype])
            self.init_from_ckpt(ckpt_path, DTYPES[frozen_dtype])
        self.load_parts(first_stage_ckpt, cond_stage_ckpt)
        self._freeze_parts(DTYPES[frozen_dtype], learns_embeddings=personalization_config is not None)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.first_stage_model.to(memory_format=torch.channels_last)

        self.embedding_manager = None
        if personalization_config is not None:
            self.embedding_manager = instantiate_from_config(
                personalization_config, embedder=self.cond_stage_model, num_stages=prospect_stages
            )
            self.embedding_manager.base_path = Path(ckpt_path) if ckpt_path else None
            if embedding_manager_ckpt and self.embedding_manager.learning:
                self.embedding_manager.start_from(embedding_manager_ckpt)
            elif embedding_manager_ckpt:
                self.embedding_manager.load(embedding_manager_ckpt)
        self.accelerate(compile_unet, cuda_graph)

    def accelerate(self, compile_unet: bool = False, cuda_graph: bool = False) -> None:
        """Choose how the U-Net is called: as it is, compiled, captured in a CUDA graph (other devices: as it is), or
        both. The first call of each size takes long (compiling: a minute or more); it then serves all stages,
        prompts and seeds."""
        self.cuda_graph = cuda_graph
        self._captured.clear()
        unet = self.model.diffusion_model
        self._fixed_unet = FixedUNet(unet, compile_unet, cuda_graph) if compile_unet or cuda_graph else None

    @property
    def size_unit(self) -> int:
        """What the height and width of pictures, in pixels, must be multiples of: 64 for Stable Diffusion v1."""
        return self.first_stage_model.downsampling * self.model.diffusion_model.downsampling

    def load_parts(self, first_stage_ckpt: str | None = None, cond_stage_ckpt: str | None = None) -> None:
        """Take the parts that other runs trained, from their checkpoints."""
        if first_stage_ckpt:
            load_weights(self.first_stage_model, read_state_dict(first_stage_ckpt), first_stage_ckpt)
        if cond_stage_ckpt:
            prefix = "cond_stage_model."
            state = read_state_dict(cond_stage_ckpt)
            state = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
            load_weights(self.cond_stage_model, state, cond_stage_ckpt)

    def _freeze_parts(self, dtype: torch.dtype, learns_embeddings: bool) -> None:
        """Freeze, and hold in `dtype`, every part that is not trained."""
        frozen = {
            self.first_stage_model: True,
            self.model: learns_embeddings,
            self.cond_stage_model: not self.cond_stage_trainable,
        }
        for part, stays in frozen.items():
            if stays:
                part.eval().requires_grad_(False).to(dtype)

    def train(self, mode: bool = True) -> LatentDiffusion:
        super().train(mode)
        for module in (self.model, self.first_stage_model, self.cond_stage_model):
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def init_from_ckpt(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Take the weights of a base model; see `ldm.checkpoint` for formats and errors."""
        load_weights(self, read_state_dict(path, dtype), path)
        self.base_model = {"base_model": Path(path).name}
        self._base_path = Path(path)

    # --- prompts -----------------------------------------------------------------------------------------------

    def get_learned_conditioning(
        self,
        prompts: str | Sequence[str],
        prospect_words: Words | None = None,
        legacy_word_tokens: bool = False,
    ) -> Conditioning:
        """A batch of prompts, each with the same `prospect_words` (S entries; see `ldm.conditioning.prompts`).

        Raises:
            ValueError: `prospect_words` of the wrong length or with a wrong entry.
        """
        manager = self.embedding_manager
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoder = self.cond_stage_model
        rows = manager.rows() if manager is not None else {}
        reader = PromptReader(encoder.tokenizer, rows, self.num_stages, encoder.max_length)
        slots = reader.read(prompts, prospect_words, legacy_word_tokens)
        # outside learning, the vectors are those of now, as `rows` is, whatever another thread loads meanwhile
        vectors = manager.vectors() if rows and not torch.is_grad_enabled() else None
        return PromptConditioning(slots, SlotEncoder(self.encode_slots, vectors), self.num_timesteps, self.device)

    def encode_slots(self, slots: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Contexts (N, L, D) of token slots (N, L), with `vectors` (R, D) in the learned places.

        None: what is learned or loaded now.
        """
        if vectors is None and self.embedding_manager is not None:
            vectors = self.embedding_manager.vectors()
        return self.cond_stage_model(slots, vectors)

    # --- diffusion ---------------------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Latents noised to timesteps t (B,): sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (Ho et al. 2020, eq. 4)."""
        return at(self.sqrt_alphas_cumprod, t) * x_start + at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the U-Net predicts, float32 (B, C, H, W), for latents at raw timesteps t (B,)."""
        if not isinstance(cond, Projected):
            cond = as_conditioning(cond, self.num_timesteps).at(t)
        unet = self._fixed_unet or self.model.diffusion_model
        return unet(x_noisy, t, cond)

    def project_context(self, context: Context) -> Projected:
        """Keys and values of all cross-attention layers, which may take a context's place in `apply_model`."""
        return self.model.diffusion_model.project(context)

    def to_eps(self, prediction: Tensor, x_noisy: Tensor, t: Tensor) -> Tensor:
        """The predicted noise, whatever the parameterization (v: Salimans and Ho 2022, appendix D)."""
        if self.parameterization == "eps":
            return prediction
        return at(self.sqrt_alphas_cumprod, t) * prediction + at(self.sqrt_one_minus_alphas_cumprod, t) * x_noisy

    @contextlib.contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Averaged weights, as LDM code asks for them; a frozen model has only the ones it has."""
        yield
