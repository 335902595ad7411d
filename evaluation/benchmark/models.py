"""The model that is measured, and copies of it for each way to run it, which share what they can."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from evaluation.benchmark.switches import dtype_name
from ldm.config import instantiate_from_config, load_config
from ldm.modules.attention import set_attention

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"demo": "configs/demo/finetune.yaml", "sd-v1": "configs/stable-diffusion/v1-finetune.yaml"}
DEMO_WEIGHTS = "models/demo/model.safetensors"
# random weights give words no meaning, so any vocabulary of the size will do
VOCABULARY = "tests/golden/tokenizer"


def read_config(size: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration of that size; its tokenizer is named by its full path."""
    config = load_config(ROOT / CONFIGS[size], overrides=overrides)
    key = "model.params.cond_stage_config.params.tokenizer"
    OmegaConf.update(config, key, str(ROOT / (VOCABULARY if size == "sd-v1" else OmegaConf.select(config, key))))
    return config


def build_model(size: str, device: torch.device, overrides: Sequence[str] = ()) -> LatentDiffusion:
    """Return the small model that ships, or one of Stable Diffusion v1's shape with random weights; float32.

    Raises:
        ConfigError, ValueError: overrides that do not fit.
    """
    config = read_config(size, overrides)
    params = config.model.params
    if size == "demo":
        params.ckpt_path = str(ROOT / DEMO_WEIGHTS)
    learning = params.personalization_config.params
    if learning.get("method") is None:  # what differs from step to step could not be compared
        learning.dropout = 0.0
    torch.manual_seed(0)
    model = instantiate_from_config(config.model)
    _fill_zeros(model)
    model.unet_sizes = OmegaConf.to_container(params.unet_config.params)  # for networks of other libraries
    return model.to(device)


def meta_model(size: str = "sd-v1", **params: Any) -> LatentDiffusion:
    """Return a model of `demo` or `sd-v1` size on the meta device; `params` go over `model.params`."""
    config = read_config(size)
    for key, value in {"ckpt_path": None, **params}.items():
        OmegaConf.update(config, f"model.params.{key}", value)
    with torch.device("meta"):
        return instantiate_from_config(config.model).to("meta")


@torch.no_grad()
def _fill_zeros(model: nn.Module) -> None:
    """Fill weights that begin as zero with random values, so that no layer is without effect."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def variant(base: LatentDiffusion, switches: frozenset[str]) -> LatentDiffusion:
    """Return a copy with the switches set; it shares the frozen weights of the same precision and memory format."""
    shared = {id(p): p for part in frozen_parts(base) for p in part.parameters()}
    model = copy.deepcopy(base, shared)
    for part in frozen_parts(model):
        convert(part, dtype_of(switches), "channels_last" in switches)
    model.model.requires_grad_("frozen" not in switches)
    if "shared_rows" not in switches:
        model.cond_stage_model.share_rows_from = None
    model.cond_stage_model.token_table.requires_grad_("token_table" not in switches)
    model.fused_adamw = "fused_adamw" in switches
    model.decode_batch = 1 if "decode_slices" in switches else None
    chosen = "auto" if "attention" in switches else "plain"
    set_attention(model, "fused" if "fused_attention" in switches else chosen)
    mode = "max-autotune" if "max_autotune" in switches else "compile" in switches
    model.accelerate(mode, "cuda_graph" in switches)
    return model


def dtype_of(switches: frozenset[str]) -> torch.dtype:
    return getattr(torch, dtype_name(switches))


def frozen_parts(model: LatentDiffusion) -> tuple[nn.Module, ...]:
    return model.model, model.first_stage_model, model.cond_stage_model


def convert(part: nn.Module, dtype: torch.dtype, channels_last: bool) -> None:
    """Put new parameters in place of shared ones; `Module.to` would change those of all copies."""
    for module in part.modules():
        for name, x in module._parameters.items():
            if x is not None:
                layout = torch.channels_last if channels_last and x.ndim == 4 else torch.preserve_format
                new = x.detach().to(dtype, memory_format=layout)
                module._parameters[name] = nn.Parameter(new, requires_grad=False)
