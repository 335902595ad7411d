"""Prompts as token slots, encoded by the text transformer when a timestep asks for them.

Shapes: B batch, S stages, L tokens, D width of the text transformer, N rows of slots, R rows of learned vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.conditioning.context import Conditioning, Context
from ldm.conditioning.learned import Learned
from ldm.conditioning.stages import timesteps_of
from ldm.util import to_device


class SlotEncoder(NamedTuple):
    """Encodes token slots with what was learned or loaded at one moment.

    Args:
        encode: slots (N, L), timesteps (1 or N,), learned, number of first tokens without a learned one -> context.
    """

    encode: Callable[[Tensor, Tensor, Learned, int], Context]
    learned: Learned

    def __call__(self, slots: Tensor, t: Tensor, plain: int = 0) -> Context:
        return self.encode(slots, t, self.learned, plain)

    def joins(self, other: SlotEncoder) -> bool:
        """Return whether the rows of both can be encoded in one batch: prompts of `other` read nothing else."""
        if self.encode != other.encode or self.learned.prefixes != other.learned.prefixes:
            return False
        if not other.learned.tokens:  # plain prompts, which need no contexts of their own for the layers
            return self.learned.num_layers == 1
        return (self.learned.tokens, self.learned.truncation) == (other.learned.tokens, other.learned.truncation)


class PromptConditioning(Conditioning):
    """Prompts as token slots (S, B, L), encoded when a timestep asks for them.

    While gradients are wanted, only the rows that a batch needs are encoded: one for each sample, whatever S is.
    Otherwise all distinct rows are encoded in one batch at the first use, and remembered; vectors that change with the
    timestep (NeTI) are encoded for one timestep after the other, and only the latest context is kept.

    Args:
        slots: on the CPU; they are moved to `device`.
    """

    def __init__(
        self,
        slots: Tensor,
        encoder: SlotEncoder,
        num_timesteps: int = 1000,
        device: torch.device | str | None = None,
    ) -> None:
        constant = bool((slots == slots[:1]).all())  # before the move: nothing here waits for a device
        self._host_slots = slots[:1] if constant else slots
        self.slots = to_device(self._host_slots, device)
        super().__init__(None, slots.shape[1], len(self.slots), num_timesteps)
        self._encoder = encoder
        self._changes = encoder.learned.changes_with_time and bool((slots < 0).any())
        # tokens before the first learned one, of all prompts; known here, so that no step waits for the device
        self._plain = int((slots < 0).any(dim=1).any(dim=0).long().cumsum(0).eq(0).sum())
        self._distinct: tuple[Context, Tensor] | None = None  # contexts of the distinct rows; (S, B) where they stand
        self._latest: tuple[tuple[int, ...], Context] | None = None

    def at(self, t: int | Tensor) -> Context:
        if not torch.is_grad_enabled() and not self._changes:
            return super().at(t)
        if torch.is_grad_enabled() or isinstance(t, Tensor):
            timesteps = t if isinstance(t, Tensor) else self._timesteps(t)
            return self._encoder(self.rows(t), timesteps, self._plain)
        return self._of_timestep(t)

    def of_bucket(self, bucket: int) -> Context:
        if torch.is_grad_enabled() or self._changes:  # nothing is remembered: vectors change from step to step
            return self.at(timesteps_of(bucket, self.num_buckets, self.num_timesteps).start)
        if bucket not in self._memo:
            if self._distinct is None:
                encode_together(self)
            contexts, place = self._distinct  # type: ignore[misc]  # which has been filled
            self._memo[bucket] = contexts.map(lambda x: x[..., place[bucket], :, :])
        return self._memo[bucket]

    def differs(self, t: int, other: int) -> list[bool]:
        return (self._host_slots[self.bucket(t)] != self._host_slots[self.bucket(other)]).any(1).tolist()

    def rows(self, t: int | Tensor) -> Tensor:
        """Return the slots (B, L) that the batch needs at timestep t, an int or (B,)."""
        if not isinstance(t, Tensor):
            return self.slots[self.bucket(int(t))]
        self._check_batch(t)
        stage = self.bucket(t)
        return self.slots[stage.to(self.slots.device), torch.arange(self.batch_size, device=self.slots.device)]

    def _timesteps(self, t: int) -> Tensor:
        return torch.full((1,), t, device=self.slots.device)

    def _of_timestep(self, t: int) -> Context:
        """Return the context of a timestep that has one of its own; prompts that are equal are encoded once."""
        stage = self.bucket(t)
        key = stage, *self._encoder.learned.bucket(t)
        if self._latest is None or self._latest[0] != key:
            distinct, place = torch.unique(self._host_slots[stage], dim=0, return_inverse=True)
            context = self._encoder(to_device(distinct, self.slots.device), self._timesteps(t), self._plain)
            place = to_device(place, self.slots.device)
            self._latest = key, context.map(lambda x: x[..., place, :, :])
        return self._latest[1]


class JoinedPrompts(Conditioning, ABC):
    """Prompts whose contexts become one, the same object as before while none of theirs changes."""

    def __init__(self, parts: Sequence[Conditioning], batch_size: int) -> None:
        super().__init__(None, batch_size, parts[0].num_buckets, parts[0].num_timesteps)
        self._parts = parts
        self._latest: tuple[list[Context], Context] | None = None

    @abstractmethod
    def join(self, contexts: Sequence[Context]) -> Context: ...

    def at(self, t: int | Tensor) -> Context:
        contexts = [part.at(t) for part in self._parts]
        if self._latest is None or any(new is not old for new, old in zip(contexts, self._latest[0], strict=True)):
            self._latest = contexts, self.join(contexts)
        return self._latest[1]

    def of_bucket(self, bucket: int) -> Context:
        return self.at(timesteps_of(bucket, self.num_buckets, self.num_timesteps).start)


class Rows(JoinedPrompts):
    """Several prompts as one batch, in their order: a source beside its edit."""

    def __init__(self, *parts: Conditioning) -> None:
        super().__init__(parts, sum(part.batch_size for part in parts))

    def join(self, contexts: Sequence[Context]) -> Context:
        return Context.cat(*contexts)


class LayeredPrompt(JoinedPrompts):
    """Prompts that differ from U-Net layer to U-Net layer (P+).

    Args:
        layers: for each cross-attention layer in order of execution, a conditioning, and which of its layers is read.
    """

    def __init__(self, layers: Sequence[tuple[Conditioning, int]]) -> None:
        super().__init__([prompt for prompt, _ in layers], layers[0][0].batch_size)
        self._read = [layer for _, layer in layers]

    def join(self, contexts: Sequence[Context]) -> Context:
        pairs = [context.layer(layer) for context, layer in zip(contexts, self._read, strict=True)]
        k = torch.stack([k for k, _ in pairs])
        return Context(k, k if all(k is v for k, v in pairs) else torch.stack([v for _, v in pairs]))


class Modulated(Conditioning):
    """A prompt whose context a learned change replaces at some timesteps."""

    def __init__(
        self, cond: Conditioning, change: Callable[[Context, int], Context], timesteps: Collection[int]
    ) -> None:
        super().__init__(None, cond.batch_size, 1, cond.num_timesteps)
        self._cond, self._change, self._timesteps = cond, change, timesteps

    def at(self, t: int | Tensor) -> Context:
        t = int(t)
        context = self._cond.at(t)
        return self._change(context, t) if t in self._timesteps else context


def encode_together(*conditionings: Conditioning) -> None:
    """Encode the distinct rows of prompts in one batch, where they are prompts of the same encoder.

    Without gradients only: with them nothing is remembered.
    """
    prompts = [c for c in conditionings if isinstance(c, PromptConditioning) and c._distinct is None and not c._changes]
    if torch.is_grad_enabled() or not prompts:
        return
    prompts.sort(key=lambda c: not c._encoder.learned.tokens)  # plain prompts last
    first = prompts[0]
    prompts = [c for c in prompts if first._encoder.joins(c._encoder) and c.slots.shape[-1] == first.slots.shape[-1]]
    rows = torch.cat([c._host_slots.flatten(0, 1) for c in prompts])
    distinct, place = torch.unique(rows, dim=0, return_inverse=True)  # on the CPU: not every device can
    device = first.slots.device
    t, plain = torch.zeros(1, dtype=torch.long, device=device), min(c._plain for c in prompts)
    contexts = first._encoder(to_device(distinct, device), t, plain)
    places = to_device(place, device).split([c.slots.shape[0] * c.slots.shape[1] for c in prompts])
    for conditioning, own in zip(prompts, places, strict=True):
        conditioning._distinct = contexts, own.unflatten(0, conditioning.slots.shape[:2])
