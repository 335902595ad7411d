"""The reference's recorded numbers (tests/golden) on any device and in any precision."""

from __future__ import annotations

import sys
from typing import Any

import torch
from omegaconf import OmegaConf

from evaluation.benchmark.models import ROOT
from ldm.config import instantiate_from_config, load_config
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion

# Relative distance of norms that a precision explains, on the tiny model.
BOUNDS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def tiny_model(device: torch.device, dtype: str) -> LatentDiffusion:
    """Return the tiny model of the records, with its weights made from their names."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    config = load_config(tiny.CONFIG)
    text = config.model.params.cond_stage_config.params
    text.text_config, text.tokenizer = tiny.TEXT_CONFIG, str(tiny.TOKENIZER)
    OmegaConf.update(config, "model.params.frozen_dtype", dtype)
    model = instantiate_from_config(config.model)
    tiny.fill(model.model.diffusion_model, tiny.UNET)
    tiny.fill(model.first_stage_model, tiny.FIRST_STAGE)
    tiny.fill(model.cond_stage_model.transformer.text_model, tiny.TEXT)
    tiny.fill(model.embedding_manager.attention, tiny.ATTENTION)
    model.embedding_manager.initial_embeddings.copy_(model.cond_stage_model.token_table[11798][None])  # teddy
    return model.to(device).eval()


@torch.no_grad()
def deviations(device: torch.device, dtype: str) -> list[dict[str, Any]]:
    """Return, for each part, the relative distance to the record and whether the precision explains it."""
    torch.backends.cudnn.allow_tf32 = False  # cuDNN's default rounds float32 to 10 bits
    model = tiny_model(device, dtype)
    manager: Any = model.embedding_manager
    import tiny

    unet, vae, sample = tiny.golden("unet"), tiny.golden("vae"), tiny.golden("sample")
    sampling = tiny.META["sampling"]
    prompt, (steps, scale) = tiny.META["prompts"][sampling["prompt"]], sampling["scales"][0]
    cond = model.get_learned_conditioning([prompt["prompt"]], prospect_words=prompt["prospect_words"])
    uncond = model.get_learned_conditioning([sampling["uc"]])
    t = torch.full((1,), 250, device=device)
    guidance = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond}
    latents, _ = DDIMSampler(model).sample(steps, 1, (4, 8, 8), cond, x_T=sample["x_T"], **guidance)
    name = next(key for key in sample if key.startswith(f"ddim.S{steps}.scale{scale}") and key.endswith(".latent"))
    found = {
        "embeddings": (manager.embeddings(), tiny.golden("embedding_manager")["placeholder_embeddings"]),
        "unet": (model.apply_model(unet["x"].to(device), t, tiny.context("unet").to(device)), unet["out.t250"]),
        "vae": (model.decode_first_stage(vae["mode_times_scale_factor"].to(device)), vae["decode_first_stage_of_that"]),
        "ddim": (latents, sample[name]),
    }
    rows = []
    for what, (ours, recorded) in found.items():
        distance = float((ours.float().cpu() - recorded).norm() / recorded.norm())
        rows.append({"what": what, "dtype": dtype, "deviation": distance, "ok": distance <= BOUNDS[dtype]})
    return rows
