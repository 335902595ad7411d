"""Conditioning of the U-Net: a prompt as a function of the timestep.

A prompt is never "a tensor" here. It is a `Conditioning`; `at(t)` gives the `Context` that one U-Net call reads.
Timesteps with the same `bucket` share one context: a plain prompt has one bucket, ProSpect has S.

Shapes: B batch, S stages, L tokens, D width of the text transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.conditioning.stages import Timestep, stage_of


class Context(NamedTuple):
    """Keys' and values' input of cross-attention: (B, L, D), or (16, B, L, D), one for each attention layer.

    `v` is the same object as `k` unless a method splits them.
    """

    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Context:
        return cls(tensor, tensor)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (k, v), each (B, L, D), for cross-attention layer `index` in order of execution."""
        return (self.k, self.v) if self.k.ndim == 3 else (self.k[index], self.v[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Context:
        k = function(self.k)
        return Context(k, k if self.v is self.k else function(self.v))

    def sample(self, i: int) -> Context:
        """Return the context of sample i of the batch alone."""
        return self.map(lambda x: x[..., i : i + 1, :, :])

    @staticmethod
    def cat(*parts: Context) -> Context:
        """Join along the batch; a part without layers is repeated for the layers of the others."""
        layers = max((part.k.shape[0] for part in parts if part.k.ndim == 4), default=0)

        def join(tensors: list[Tensor]) -> Tensor:
            return torch.cat([x.expand(layers, *x.shape) if layers and x.ndim == 3 else x for x in tensors], dim=-3)

        k = join([part.k for part in parts])
        shared = all(part.v is part.k for part in parts)
        return Context(k, k if shared else join([part.v for part in parts]))


class Projected(NamedTuple):
    """A context as the keys and values (B, heads, L, d) of each cross-attention layer, in order of execution.

    They depend on the prompt only, so they are kept while the bucket stays the same. `k` and `v` are the context's own.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    k: Tensor
    v: Tensor

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.layers[index]

    def tensors(self) -> list[Tensor]:
        return [*(x for pair in self.layers for x in pair), self.k, self.v]

    def clone(self) -> Projected:
        return Projected(tuple((k.clone(), v.clone()) for k, v in self.layers), self.k.clone(), self.v.clone())


class Conditioning:
    """A batch of prompts over time, with `num_buckets` distinct contexts.

    Args:
        encode: bucket (int) -> Context of the whole batch, called once for each; None in subclasses with their own
            `at` and `of_bucket`.
        batch_size: B.
        num_buckets: number of equal parts that the T timesteps are cut into; 1 for a plain prompt.
    """

    def __init__(
        self,
        encode: Callable[[int], Context] | None,
        batch_size: int,
        num_buckets: int = 1,
        num_timesteps: int = 1000,
    ) -> None:
        self._encode = encode
        self.batch_size, self.num_buckets, self.num_timesteps = batch_size, num_buckets, num_timesteps
        self._memo: dict[int, Context] = {}

    def bucket(self, t: Timestep) -> Timestep:
        """Return the part of time that raw DDPM timestep t (int or (B,)) lies in; equal bucket, equal context."""
        return stage_of(t, self.num_buckets, self.num_timesteps)

    def differs(self, t: int, other: int) -> list[bool]:
        """Return for each of the B prompts whether it has other words at timestep t than at the other one.

        Vectors that move with the timestep (NeTI) are the same words.
        """
        changed = self.at(t).k != self.at(other).k  # (B, L, D) or (layers, B, L, D)
        return changed.transpose(0, -3).flatten(1).any(1).tolist()

    def of_bucket(self, bucket: int) -> Context:
        if bucket not in self._memo:
            self._memo[bucket] = self._encode(bucket)  # type: ignore[misc]  # None only where this is overridden
        return self._memo[bucket]

    def at(self, t: int | Tensor) -> Context:
        """Return the context at timestep t: an int for the whole batch, or (B,) with one timestep for each sample."""
        if not isinstance(t, Tensor):
            return self.of_bucket(self.bucket(int(t)))
        self._check_batch(t)
        if self.num_buckets == 1:
            return self.of_bucket(0)
        buckets = self.bucket(t).tolist()
        if len(set(buckets)) == 1:
            return self.of_bucket(buckets[0])
        return Context.cat(*(self.of_bucket(bucket).sample(i) for i, bucket in enumerate(buckets)))

    def _check_batch(self, t: Tensor) -> None:
        if len(t) != self.batch_size:
            raise ValueError(f"{len(t)} timesteps were given for {self.batch_size} prompts.")

    def stages(self) -> list[Tensor]:
        """Return the keys' input of every bucket, entry 0 = end of generation: S tensors (B, L, D)."""
        return [self.of_bucket(bucket).k for bucket in range(self.num_buckets)]


Cond = Conditioning | Context | Tensor | Sequence[Tensor]  # what LDM code passes around as a prompt


def as_conditioning(cond: Cond, num_timesteps: int = 1000) -> Conditioning:
    """Return a `Conditioning` from what LDM code passes around: a tensor (B, L, D), or a list of S of them.

    Raises:
        TypeError, ValueError: something else.
    """
    if isinstance(cond, Conditioning):
        return cond
    if isinstance(cond, Context):
        return Conditioning(lambda _: cond, cond.k.shape[-3], 1, num_timesteps)
    if isinstance(cond, Tensor):
        if cond.ndim != 3:
            raise ValueError(f"A conditioning tensor must be (B, L, D), not {tuple(cond.shape)}.")
        return as_conditioning(Context.of(cond), num_timesteps)
    if isinstance(cond, Sequence) and cond and all(isinstance(x, Tensor) and x.ndim == 3 for x in cond):
        return Conditioning(lambda stage: Context.of(cond[stage]), cond[0].shape[0], len(cond), num_timesteps)
    raise TypeError(f"Conditioning must be a tensor (B, L, D) or a list of them, not {type(cond).__name__}.")
