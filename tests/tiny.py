"""The tiny model of the golden records: weights and contexts rebuilt bit for bit from their names.

`tests/golden/README.md` gives the recipe and says what was recorded. Nothing here depends on `ldm`, so that a
mistake there cannot hide itself.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GOLDEN / "tiny-a.yaml"
META: dict[str, Any] = json.loads((GOLDEN / "meta.json").read_text(encoding="utf-8"))
TOKENIZER = GOLDEN / "tokenizer"
# What `version: tiny-a` stands for in the configuration.
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
UNET, FIRST_STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
ATTENTION = "embedding_manager.attention."

TOKEN_TABLE = f"{TEXT}embeddings.token_embedding.weight"
EMBEDDING_WIDTH = 768


def uniform(key: str, numel: int, seed: int = 0, start: int = 0) -> np.ndarray:
    """`numel` float32 values in [-1, 1), functions of `key`, `seed` and their place (from `start`) only."""
    generator = np.random.PCG64(crc32(key.encode("utf-8")) + seed * 2**32)
    raw = generator.advance(start).random_raw(numel)
    # 24 random bits are exact in float32, and so are the scaling and the shift: no rounding anywhere.
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)


def bound_and_offset(key: str, shape: tuple[int, ...]) -> tuple[np.float32, np.float32]:
    """The half-width and the centre of the uniform distribution of the weight called `key`."""
    if key.endswith("token_embedding.weight"):
        return np.float32(1), np.float32(0)
    if key.endswith("position_embedding.weight"):
        return np.float32(0.5), np.float32(0)
    if len(shape) >= 2:
        return np.float32(math.sqrt(3 / math.prod(shape[1:]))), np.float32(0)
    if key.endswith("weight"):
        return np.float32(0.25), np.float32(1)
    return np.float32(0.1), np.float32(0)


def tiny_tensor(key: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The float32 weight called `key` (its full name in a checkpoint), of the given shape."""
    bound, offset = bound_and_offset(key, tuple(shape))
    values = uniform(key, math.prod(shape), seed)
    values *= bound
    values += offset
    return torch.from_numpy(values).reshape(tuple(shape))


def fill(module: nn.Module, prefix: str, seed: int = 0) -> nn.Module:
    """Overwrites every parameter of `module` in place; `prefix` + its name is the checkpoint key. Returns it.

    Buffers stay as they are. Example: `fill(unet, "model.diffusion_model.")`.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tiny_tensor(prefix + name, tuple(parameter.shape), seed))
    return module


def write_checkpoint(model: nn.Module, path: Path, seed: int = 0) -> None:
    """Write the weights of U-Net, first stage and text transformer for a model of these sizes (any device)."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = {
        name: tiny_tensor(name, shape, seed)
        for name, shape in shapes.items()
        if name.startswith((UNET, FIRST_STAGE, TEXT))
    }
    save_file(weights, path, metadata={"format": "pt"})


def token_rows(ids: list[int], seed: int = 0) -> Tensor:
    """Rows of the tiny token table without building it, (len(ids), 768). `initial_embeddings`: [11798]."""
    rows = [uniform(TOKEN_TABLE, EMBEDDING_WIDTH, seed, start=i * EMBEDDING_WIDTH) for i in ids]
    return torch.from_numpy(np.stack(rows))


@cache
def _context(name: str) -> Tensor:
    values = uniform(f"context.{name}", 77 * EMBEDDING_WIDTH) * np.float32(math.sqrt(3))
    return torch.from_numpy(values).reshape(1, 77, EMBEDDING_WIDTH)


def context(name: str) -> Tensor:
    """The made-up text context `name` ("stage0" … "stage9", "uncond", "unet", "unet2"), (1, 77, 768)."""
    return _context(name).clone()


def stage_contexts() -> list[Tensor]:
    """The made-up context of each of the ten stages, (1, 77, 768) each."""
    return [context(f"stage{i}") for i in range(10)]


def checksum(weights: nn.Module | Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What `META["checksums"]` holds for a module: sha256 and numel.

    The hash runs over the sorted checkpoint keys: each key's bytes, then its little-endian float32 values.
    """
    named = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
    digest, numel = hashlib.sha256(), 0
    for name in sorted(named):
        values = named[name].detach().to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
        digest.update((prefix + name).encode("utf-8"))
        digest.update(values.data)
        numel += values.size
    return {"sha256": digest.hexdigest(), "numel": numel}


@cache
def _golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden(name: str) -> dict[str, Tensor]:
    """The recorded tensors of "schedule", "vae", "unet", "embedding_manager", "text", "train" or "sample".

    The file is read once; the tensors are shared, so a test that changes one in place clones it first.
    """
    return dict(_golden(name))


def close(ours: Tensor, recorded: Tensor) -> None:
    """Latents or images are equal up to 1e-4 of the largest value."""
    torch.testing.assert_close(ours, recorded, rtol=0, atol=1e-4 * recorded.abs().max().item())


class Recorder:
    """Keeps what a step callback is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.pairs: list[Tensor] = []

    def __call__(self, step: int, t: int, x: Tensor, x_0: Tensor) -> None:
        self.steps.append((step, t))
        self.pairs.append(torch.cat([x, x_0]))
