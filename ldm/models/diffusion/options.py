"""Options in `model.params` of a configuration, beside the networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DiffusionOptions:
    """Options of `LatentDiffusion`: the reference's keys, and these.

    Args:
        parameterization: what the U-Net predicts, `eps` (Stable Diffusion v1) or `v` (Salimans and Ho 2022).
        ckpt_path: base model (.ckpt, .safetensors, diffusers folder). None: random weights.
        first_stage_ckpt, cond_stage_ckpt: for training from scratch, the runs that trained these parts.
        standardize_latents: training from scratch: fold into the first stage what gives its latents mean 0 and
            standard deviation 1 in every channel (LDM's `scale_by_std`, but for each channel).
        embedding_manager_ckpt: concept to start from, or to generate with.
        frozen_dtype: float32, float16 or bfloat16, the precision in which frozen weights are held and used.
        channels_last: memory format of the convolutions' weights.
        cache_latents: encode every image once (posterior moments, for each flip); the posterior is still sampled in
            every step.
        cache_text: a learned prefix (CatVersion) begins in a high text layer; the layers below it are run once for
            each caption.
        time_sampling: `uniform` (the reference), or `stages`: sample n is trained at a random timestep of stage
            n mod S, so that every stage has its turn.
        balanced_loss: training from scratch: divide the loss by its running mean at that noise level.
        fused_adamw: PyTorch's fused kernel for the embeddings' optimizer.
        decode_batch: images that the first stage decodes at a time, when memory is short; None for all.
        compile_unet: torch.compile the U-Net; true or a mode, `reduce-overhead` (what true means) or `max-autotune`.
        cuda_graph: capture the U-Net call, and the training step, in CUDA graphs: no compilation to wait for.

    Raises:
        ValueError: a value out of its range, or an unknown choice.
    """

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
    parameterization: str = "eps"
    ckpt_path: str | None = None
    first_stage_ckpt: str | None = None
    cond_stage_ckpt: str | None = None
    standardize_latents: bool = False
    embedding_manager_ckpt: str | None = None
    frozen_dtype: str = "float32"
    channels_last: bool = False
    cache_latents: bool = True
    cache_text: bool = True
    time_sampling: str = "uniform"
    balanced_loss: bool = False
    fused_adamw: bool = True
    decode_batch: int | None = None
    compile_unet: bool | str = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        choices = {
            "parameterization": ("eps", "v"),
            "frozen_dtype": tuple(DTYPES),
            "time_sampling": ("uniform", "stages"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, not '{getattr(self, name)}'.")
        for name in ("timesteps", "prospect_stages"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}.")
        if self.decode_batch is not None and self.decode_batch < 1:
            raise ValueError(f"decode_batch must be at least 1, or left out for all at once, not {self.decode_batch}.")
        if self.compile_unet and self.cuda_graph:
            raise ValueError("compile_unet uses CUDA graphs of its own; choose it or cuda_graph.")

    @property
    def dtype(self) -> torch.dtype:
        """`frozen_dtype` as PyTorch's."""
        return DTYPES[self.frozen_dtype]
