"""Prompts as token slots, encoded by the text transformer when a timestep asks for them.

Shapes: B batch, S stages, L tokens, D width of the text transformer, N rows of slots, R rows of learned vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.conditioning.context import Conditioning, Context
from ldm.util import to_device


class SlotEncoder:
    """Encodes token slots with the learned vectors of one moment; None, and with gradients: those of each call.

    Two are equal when they give the same contexts, so that their prompts can be encoded in one batch.

    Args:
        encode: slots (N, L), vectors (R, D) or None -> contexts (N, L, D).
    """

    __hash__ = None

    def __init__(self, encode: Callable[[Tensor, Tensor | None], Tensor], vectors: Tensor | None) -> None:
        self.encode, self.vectors = encode, vectors

    def __call__(self, slots: Tensor) -> Tensor:
        return self.encode(slots, None if torch.is_grad_enabled() else self.vectors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SlotEncoder) or self.encode != other.encode:
            return False
        if self.vectors is None or other.vectors is None:
            return self.vectors is other.vectors
        return self.vectors.shape == other.vectors.shape and torch.equal(self.vectors, other.vectors)


class PromptConditioning(Conditioning):
    """Prompts as token slots (S, B, L), encoded when a timestep asks for them.

    While gradients are wanted, only the rows that a batch needs are encoded: one for each sample, whatever S is.
    Otherwise all distinct rows are encoded in one batch at the first use, and remembered.

    Args:
        slots: on the CPU; they are moved to `device`.
        encode_slots: slots (N, L) -> contexts (N, L, D).
    """

    def __init__(
        self,
        slots: Tensor,
        encode_slots: Callable[[Tensor], Tensor],
        num_timesteps: int = 1000,
        device: torch.device | str | None = None,
    ) -> None:
        constant = bool((slots == slots[:1]).all())  # before the move: nothing here waits for a device
        self._host_slots = slots[:1] if constant else slots
        self.slots = to_device(self._host_slots, device)
        super().__init__(None, slots.shape[1], len(self.slots), num_timesteps)
        self._encode_slots = encode_slots
        self._distinct: tuple[Tensor, Tensor] | None = None

    def at(self, t: int | Tensor) -> Context:
        if torch.is_grad_enabled():
            return Context.of(self._encode_slots(self.rows(t)))
        return super().at(t)

    def of_bucket(self, bucket: int) -> Context:
        # with gradients nothing is remembered: the learned vectors change from step to step
        return self._encode(bucket) if torch.is_grad_enabled() else super().of_bucket(bucket)

    def rows(self, t: int | Tensor) -> Tensor:
        """The slots (B, L) that the batch needs at timestep t, an int or (B,)."""
        if not isinstance(t, Tensor):
            return self.slots[self.bucket(int(t))]
        self._check_batch(t)
        stage = self.bucket(t)
        return self.slots[stage.to(self.slots.device), torch.arange(self.batch_size, device=self.slots.device)]

    def _encode(self, stage: int) -> Context:
        # a method: a function that holds `self` would keep the contexts in memory until the garbage collector comes
        if torch.is_grad_enabled():
            return Context.of(self._encode_slots(self.slots[stage]))
        if self._distinct is None:
            encode_together(self)
        contexts, place = self._distinct
        return Context.of(contexts[place[stage]])


def encode_together(*conditionings: Conditioning) -> None:
    """Encode the distinct rows of prompts in one batch, where they are prompts of the same encoder.

    Without gradients only: with them nothing is remembered.
    """
    prompts = [c for c in conditionings if isinstance(c, PromptConditioning) and c._distinct is None]
    if torch.is_grad_enabled() or not prompts:
        return
    encode = prompts[0]._encode_slots
    prompts = [c for c in prompts if c._encode_slots == encode and c.slots.shape[-1] == prompts[0].slots.shape[-1]]
    rows = torch.cat([c._host_slots.flatten(0, 1) for c in prompts])
    distinct, place = torch.unique(rows, dim=0, return_inverse=True)  # on the CPU: not every device can
    device = prompts[0].slots.device
    contexts = encode(to_device(distinct, device))
    places = to_device(place, device).split([c.slots.shape[0] * c.slots.shape[1] for c in prompts])
    for conditioning, own in zip(prompts, places, strict=True):
        conditioning._distinct = contexts, own.unflatten(0, conditioning.slots.shape[:2])
