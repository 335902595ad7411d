"""Many generations in one process: memory does not grow."""

import gc
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import torch

from ldm.embeddings import Concept, save_concept
from ldm.generate import main

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

ALLOWED = 1024  # bytes a generation; one context of the small model has 16 kB, one picture 12 kB


@pytest.fixture
def concept(demo_model: "LatentDiffusion", tmp_path: Path) -> Path:
    save_concept(Concept(torch.ones(10, demo_model.embedding_manager.width)), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def slope(values: list[int]) -> tuple[float, float]:
    """Growth of `values` from one to the next by least squares, and its standard error.

    Memory comes in steps and stays, so that neighbours are not independent: the error is that of means of ten.
    """
    means = np.array(values[: len(values) // 10 * 10], dtype=float).reshape(-1, 10).mean(axis=1)
    x = np.arange(len(means)) * 10.0
    (growth, _), residuals, *_ = np.polyfit(x, means, 1, full=True)
    spread = math.sqrt(float(residuals[0]) / (len(means) - 2)) if len(residuals) else 0.0
    return float(growth), spread / math.sqrt(((x - x.mean()) ** 2).sum())


def memory_over(model: "LatentDiffusion", concept: Path, count: int, warm_up: int) -> list[int]:
    """Resident bytes after each of `count` generations, with other prompts, stages, seeds and a concept each time."""
    process = psutil.Process()
    sizes = []
    for i in range(warm_up + count):
        main(
            "*",
            prospect_words=[i % 10] * 5 + [f"a star number {i}"] * 5,
            concepts={"*": concept},
            model=model,
            ddim_steps=1,
            scale=2.0,
            height=64,
            width=64,
            seed=i,
            progress=False,
        )
        if i >= warm_up:
            sizes.append(process.memory_info().rss)
    return sizes


def tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_generation_leaves_nothing_behind(demo_model: "LatentDiffusion", concept: Path) -> None:
    """Nor anything that waits for the garbage collector: on a GPU that would be memory that is missed."""
    memory_over(demo_model, concept, count=2, warm_up=0)
    gc.collect()
    before = tensors()
    gc.disable()
    try:
        memory_over(demo_model, concept, count=3, warm_up=0)
        assert tensors() == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_thousand_generations_do_not_grow(demo_model: "LatentDiffusion", concept: Path) -> None:
    """The warm-up is long because the allocator finds its size in steps of a megabyte."""
    growth, error = slope(memory_over(demo_model, concept, count=1000, warm_up=300))
    print(f"growth: {growth:.0f} ± {error:.0f} bytes a generation")
    assert error < ALLOWED, "too noisy to tell"
    assert growth + 2 * error < ALLOWED, f"{growth:.0f} ± {error:.0f} bytes a generation"
