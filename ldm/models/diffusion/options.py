"""Options in `model.params` of a configuration, beside the networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DiffusionOptions:
    """Options of `LatentDiffusion`; raises `ValueError` for a value out of its range, or an unknown choice."""

    # the reference's
    linear_start: float = 0.00085
    linear_end: float = 0.0120
    timesteps: int = 1000
    channels: int = 4
    scale_factor: float = 0.18215
    prospect_stages: int = 10
    first_stage_key: str = "image"
    cond_stage_key: str = "caption"
    cond_stage_trainable: bool = False
    embedding_reg_weight: float = 0.0
    parameterization: str = "eps"  # what the U-Net predicts: eps (Stable Diffusion v1) or v (Salimans and Ho 2022)
    ckpt_path: str | None = None  # base model (.ckpt, .safetensors, diffusers folder); None: random weights
    embedding_manager_ckpt: str | None = None  # concept to start from, or to generate with

    # training from scratch
    first_stage_ckpt: str | None = None  # of the run that trained this part
    cond_stage_ckpt: str | None = None
    standardize_latents: bool = False  # LDM's `scale_by_std` for each channel; it is folded into the first stage
    balanced_loss: bool = False  # divide the loss by its running mean at that noise level
    time_sampling: str = "uniform"  # or stages: sample n has a random timestep of stage n mod S

    # speed and memory (docs/benchmarks.md)
    frozen_dtype: str = "float32"  # in which frozen weights are held and used: float32, float16 or bfloat16
    channels_last: bool = False  # memory format of the convolutions' weights
    cache_latents: bool = True  # encode every image and flip once; the posterior is still sampled in every step
    cache_text: bool = True  # run the text layers below a learned prefix (CatVersion) once for each caption
    fused_adamw: bool = True  # PyTorch's fused kernel for the embeddings' optimizer
    decode_batch: int | None = None  # images that the first stage decodes at a time; None: all
    compile_unet: bool | str = False  # a mode of torch.compile; true is reduce-overhead
    cuda_graph: bool = False  # capture the U-Net call, and the training step, in CUDA graphs

    def __post_init__(self) -> None:
        choices = {"parameterization": ("eps", "v"), "frozen_dtype": DTYPES, "time_sampling": ("uniform", "stages")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not '{getattr(self, name)}'.")
        for name in ("timesteps", "prospect_stages", "decode_batch"):
            count = getattr(self, name)
            if count is not None and not (isinstance(count, int) and count >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}.")
        if self.compile_unet and self.cuda_graph:
            raise ValueError("compile_unet uses CUDA graphs of its own; choose it or cuda_graph.")

    @property
    def dtype(self) -> torch.dtype:
        """`frozen_dtype` as PyTorch's."""
        return DTYPES[self.frozen_dtype]
