"""Does a model draw what its captions say? Counted with the attribute classifier on the rendered world."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluation.judges import AttributeJudge
from evaluation.pictures import generate
from evaluation.world.rendered import caption, random_attributes, render
from ldm.config import load_config
from ldm.generate import load_model_from_config

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


@lru_cache(maxsize=2)
def load(config: str, ckpt: str, stages: int | None = None) -> LatentDiffusion:
    """The frozen model, once in each process; `stages` replaces the configuration's number of stages."""
    settings = load_config(config)
    if stages is not None:
        settings.model.params.prospect_stages = stages
    return load_model_from_config(settings, ckpt)


@lru_cache(maxsize=1)
def load_judge(path: str) -> AttributeJudge:
    return AttributeJudge(path)


def follow_captions(
    config: str, ckpt: str, classifier: str, seed: int, count: int, held_out: bool, steps: int, scale: float
) -> dict[str, np.ndarray]:
    """Pictures of `count` random captions, and whether each attribute is the caption's: `correct` bool (N, F)."""
    attributes = random_attributes(count, seed, held_out)
    captions = [caption(row) for row in attributes]
    pictures = generate(load(config, ckpt), [captions], [seed * 100_000 + i for i in range(count)], steps, scale)
    correct = load_judge(classifier).read(pictures) == attributes
    return {"correct": correct.numpy(), "pictures": to_bytes(pictures), "captions": np.array(captions)}


@torch.no_grad()
def judge_itself(
    config: str, ckpt: str, classifier: str, seed: int, count: int, held_out: bool
) -> dict[str, np.ndarray]:
    """Whether the classifier reads rendered pictures, and the first stage's reconstructions, right: bool (N, F)."""
    attributes = random_attributes(count, seed, held_out)
    pictures = render(attributes, range(seed * 100_000, seed * 100_000 + count))
    model, judge = load(config, ckpt), load_judge(classifier)
    parts = [
        model.decode_first_stage(model.get_first_stage_encoding(model.encode_first_stage(part).mode()))
        for part in pictures.split(64)
    ]
    return {
        "rendered": (judge.read(pictures) == attributes).numpy(),
        "reconstructed": (judge.read(torch.cat(parts).cpu()) == attributes).numpy(),
    }


def to_bytes(pictures: torch.Tensor) -> np.ndarray:
    """(N, 3, R, R) in [-1, 1] to uint8 (N, R, R, 3)."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
