"""Batches of images for experiments: prompts that change from stage to stage, seeds that conditions share.

Shapes: N images, R pixels a side, S stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evaluation.world.attributes import RESOLUTION
from ldm.conditioning.context import Conditioning, Context
from ldm.config import check_generates, load_config
from ldm.generate import SAMPLERS, load_model_from_config
from ldm.models.diffusion.sampling import draw_noise, seeded_generators
from ldm.request import Request, model_facts

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import DiffusionModel


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, as in `ldm.request.Request`; a sequence of scales has one for each stage."""

    steps: int = 50
    scale: float | Sequence[float] = 2.5
    sampler: str = "ddim"
    spacing: str | None = None

    def request(self, **others: Any) -> Request:
        """Return a request for it; raises `ValueError` for what cannot be."""
        values = asdict(self)
        return Request(ddim_steps=values.pop("steps"), **values, **others)


@lru_cache(maxsize=2)
def load(config: str, ckpt: str, stages: int | None = None) -> DiffusionModel:
    """Return the frozen model, built once in each process; `stages` replaces the configuration's number of stages."""
    settings = load_config(config, flag="--config")
    if stages is not None:
        settings.model.params.prospect_stages = stages
    return load_model_from_config(settings, ckpt, lightning=False)


def load_concepts(model: DiffusionModel, concepts: Mapping[str, Any]) -> None:
    if model.embedding_manager is None:
        raise ValueError("This model has no personalization_config, so concepts cannot be loaded into it.")
    model.embedding_manager.load(dict(concepts))


def check(
    config: str, ckpt: str, sampling: Sampling, size: int = RESOLUTION, concepts: Mapping[str, str] | None = None
) -> None:
    """Raise `ValueError`, with the remedy, for what `sample` could not do with a model, before work starts."""
    settings = load_config(config, flag="--config")
    check_generates(settings)
    sampling.request(height=size, width=size, concepts=concepts).for_model(model_facts(settings))
    if concepts:
        load_concepts(load(config, ckpt), concepts)


def staged(model: DiffusionModel, texts: Sequence[Sequence[str]]) -> Conditioning:
    """Return the conditioning of S lists of N texts, entry 0 = end of sampling (low noise).

    S need not be the model's number of stages, but must be a multiple of it where learned tokens stand in the texts.
    """
    buckets, batch = len(texts), len(texts[0])
    by_text = {key: model.get_learned_conditioning(list(key)) for key in {tuple(stage) for stage in texts}}

    def encode(bucket: int) -> Context:
        return by_text[tuple(texts[bucket])].at(int((bucket + 0.5) * model.num_timesteps / buckets))

    return Conditioning(encode, batch, buckets, model.num_timesteps)


@torch.no_grad()
def decode(model: DiffusionModel, latents: Tensor, batch_size: int = 64) -> Tensor:
    """Return images (N, 3, R, R) in [-1, 1] on the CPU."""
    parts = latents.split(batch_size)
    return torch.cat([model.decode_first_stage(part.to(model.device)).clamp(-1, 1).cpu() for part in parts])


@torch.no_grad()
def sample(
    model: DiffusionModel,
    texts: Sequence[Sequence[str]],
    seeds: Sequence[int],
    sampling: Sampling,
    size: int = RESOLUTION,
    batch_size: int = 64,
) -> Tensor:
    """Return latents (N, C, H, W) on the CPU for N seeds and texts (see `staged`)."""
    side = size // model.first_stage_model.downsampling
    shape = (model.channels, side, side)
    sampler, latents = SAMPLERS[sampling.sampler](model), []
    is_guided = sampling.request().is_guided
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        x_T = draw_noise(seeded_generators(list(seeds[part])), (len(seeds[part]), *shape), model.device)
        found, _ = sampler.sample(
            S=sampling.steps,
            batch_size=len(x_T),
            shape=shape,
            conditioning=staged(model, [stage[part] for stage in texts]),
            unconditional_guidance_scale=sampling.scale,
            unconditional_conditioning=model.get_unconditional(count=len(x_T)) if is_guided else None,
            x_T=x_T,
            verbose=False,
            spacing=sampling.spacing,
        )
        latents.append(found.cpu())
    return torch.cat(latents)


def encode(model: DiffusionModel, images: Tensor) -> Tensor:
    """Return the most probable latents, unscaled, of images (N, 3, R, R) in [-1, 1]."""
    posterior = model.encode_first_stage(images)
    return posterior if isinstance(posterior, Tensor) else posterior.mode()


def to_bytes(images: Tensor) -> np.ndarray:
    """Return images (N, 3, R, R) in [-1, 1] as uint8 (N, R, R, 3)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def from_bytes(images: np.ndarray) -> Tensor:
    """Return images uint8 (N, R, R, 3) as (N, 3, R, R) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
