"""Batches of pictures for experiments: texts that change from stage to stage, seeds that conditions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.world.rendered import RESOLUTION
from ldm.conditioning.context import Conditioning
from ldm.config import check_generates, load_config
from ldm.embeddings import load_concept
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.sampling import draw_noise, seeded_generators
from ldm.request import Request, model_facts

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


def check(
    config: str, ckpt: str, steps: int, scale: float, size: int = RESOLUTION, concepts: Mapping[str, str] | None = None
) -> None:
    """Find what `generate` could not do with a model, before its weights are read.

    Args:
        concepts: {placeholder: file}.

    Raises:
        ValueError: a number out of range, with the nearest usable one; or a concept that the model does not take.
    """
    settings = load_config(config, flag="--config")
    check_generates(settings)
    Request(ddim_steps=steps, scale=scale, height=size, width=size, concepts=concepts).for_model(model_facts(settings))
    for file in (concepts or {}).values():
        load_concept(file)


def staged(model: LatentDiffusion, texts: Sequence[Sequence[str]]) -> Conditioning:
    """Texts that each stage has of its own.

    Args:
        texts: S lists of B texts, entry 0 = end of generation; S need not be the model's number of stages, but
            must be a multiple of it where learned tokens stand in the texts.
    """
    buckets, batch = len(texts), len(texts[0])
    by_text = {key: model.get_learned_conditioning(list(key)) for key in {tuple(stage) for stage in texts}}

    def encode(bucket: int):
        return by_text[tuple(texts[bucket])].at(int((bucket + 0.5) * model.num_timesteps / buckets))

    return Conditioning(encode, batch, buckets, model.num_timesteps)


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    texts: Sequence[Sequence[str]],
    seeds: Sequence[int],
    steps: int = 50,
    scale: float = 2.5,
    size: int = RESOLUTION,
    batch_size: int = 64,
) -> Tensor:
    """Pictures (N, 3, size, size) in [-1, 1] for N seeds, by DDIM; picture n starts from the noise of seeds[n] alone.

    Args:
        texts: S lists of N texts, see `staged`.
        scale: guidance scale; 1 is none.
    """
    side = size // model.first_stage_model.downsampling
    sampler = DDIMSampler(model)
    pictures = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        shape = (model.channels, side, side)
        x_T = draw_noise(seeded_generators(list(seeds[part])), (len(seeds[part]), *shape), model.device)
        cond = staged(model, [stage[part] for stage in texts])
        uncond = None if scale == 1.0 else model.get_learned_conditioning([""] * len(x_T))
        latents, _ = sampler.sample(
            S=steps,
            batch_size=len(x_T),
            shape=shape,
            conditioning=cond,
            unconditional_guidance_scale=scale,
            unconditional_conditioning=uncond,
            x_T=x_T,
            verbose=False,
        )
        pictures.append(model.decode_first_stage(latents).clamp(-1, 1).cpu())
    return torch.cat(pictures)
