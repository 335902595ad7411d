"""Interfaces of the learned parts of a prompt: learned tokens and learned prefixes.

A method of personalisation is one of these (docs/extending.md). The frozen model knows no method; it asks for the
vectors of a timestep, and methods whose answers change at other places of time say so by their `bucket`.
Shapes: B timesteps or prompts, N rows of slots, L tokens, D width of the text transformer, R rows of learned vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TokenVectors(NamedTuple):
    """Embeddings of learned tokens.

    Args:
        e: (layers, B, R, D): `layers` 1, or one for each cross-attention layer of the U-Net; B 1, or one for each
            timestep that was asked for.
        residual: like e, or None: added to the last hidden state where the token stands, for the values of
            cross-attention only; in units of that state's norm (NeTI's textual bypass).
    """

    e: Tensor
    residual: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[TokenVectors]) -> TokenVectors:
        """Join along R; parts without layers, timesteps or residual are repeated for those of the others."""
        sizes = [max(part.e.shape[axis] for part in parts) for axis in (0, 1)]
        e = torch.cat([part.e.expand(*sizes, -1, -1) for part in parts], dim=2)
        if all(part.residual is None for part in parts):
            return TokenVectors(e)
        residuals = [torch.zeros_like(part.e) if part.residual is None else part.residual for part in parts]
        return TokenVectors(e, torch.cat([r.expand(*sizes, -1, -1) for r in residuals], dim=2))


class LearnedTokens(Protocol):
    """Vectors for a placeholder: Textual Inversion, P+, ProSpect, NeTI."""

    @property
    def num_layers(self) -> int:
        """1, or as many as the U-Net has cross-attention layers."""

    @property
    def num_rows(self) -> int:
        """R."""

    def rows_at(self, stage: int, num_stages: int) -> list[int]:
        """Return the rows that stand at the placeholder in a stage, one for each consecutive token."""

    def bucket(self, t: int) -> int:
        """Return the part of time that timestep t lies in: equal bucket, equal vectors."""

    def vectors(self, t: Tensor) -> TokenVectors:
        """Return the vectors at timesteps t (B,), on the device of t."""


class LearnedPrefix(Protocol):
    """Keys and values that every token of some text layers reads, too: CatVersion."""

    logit_bias: float

    def key_values(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Return text layer -> (K, V), each (P, heads, d)."""


@dataclass(frozen=True, eq=False)
class Learned:
    """Everything learned that prompts read at one moment; what is loaded later does not change it.

    Args:
        tokens: in the order of their rows in the table of all learned vectors.
        prefixes: stacked in this order.
        truncation: hidden values that a token which `truncates` keeps (NeTI); None keeps all.
    """

    tokens: tuple[LearnedTokens, ...] = ()
    prefixes: tuple[LearnedPrefix, ...] = ()
    truncation: int | None = None

    def bucket(self, t: int) -> tuple[int, ...]:
        """Return what tells timesteps apart: equal buckets, equal vectors."""
        return tuple(tokens.bucket(t) for tokens in self.tokens)

    @property
    def changes_with_time(self) -> bool:
        """True where the table of vectors changes with the timestep; ProSpect's holds those of all stages."""
        return any(tokens.bucket(0) != tokens.bucket(999) for tokens in self.tokens)

    @property
    def num_layers(self) -> int:
        return max((tokens.num_layers for tokens in self.tokens), default=1)

    def vectors(self, t: Tensor) -> TokenVectors | None:
        """Return the table of all learned vectors at timesteps t (B,); None where there is none."""
        cut = [] if self.truncation is None else [self.truncation]
        parts = [tokens.vectors(t, *cut) if truncates(tokens) else tokens.vectors(t) for tokens in self.tokens]
        return TokenVectors.cat(parts) if parts else None

    @property
    def prefix(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Text layer -> keys and values (P, heads, d) of all prefixes, one behind the other."""
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for prefix in self.prefixes:
            for layer, pair in prefix.key_values().items():
                found.setdefault(layer, []).append(pair)
        return {layer: (torch.cat([k for k, _ in p]), torch.cat([v for _, v in p])) for layer, p in found.items()}

    @property
    def logit_bias(self) -> float | Mapping[int, Sequence[float]]:
        """Number that is added to the logits of `prefix`; layer -> one for each of its keys, where concepts differ."""
        biases = {prefix.logit_bias for prefix in self.prefixes}
        if len(biases) < 2:
            return next(iter(biases), 0.0)
        each: dict[int, list[float]] = {}
        for prefix in self.prefixes:
            for layer, (k, _) in prefix.key_values().items():
                each.setdefault(layer, []).extend([prefix.logit_bias] * len(k))
        return each


def truncates(tokens: object) -> bool:
    """Return whether the vectors of a token have a tail that can be left out: `vectors(t, truncation)`."""
    return getattr(tokens, "truncates", False)


NOTHING_LEARNED = Learned()
