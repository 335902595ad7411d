"""A table of free vectors for stages and U-Net layers.

Textual Inversion has 1 stage and 1 layer, P+ (XTI) 1 and 16, ProSpect without its block 10 and 1; any other works, too.
Shapes: S stages, n consecutive tokens, D width of the text transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.learned import TokenVectors
from ldm.conditioning.stages import matching_stage
from ldm.methods.base import LearnedModule, Metadata, Start, Tensors

TABLE = "table"  # the tensor of a concept with layers or several tokens
VECTORS = "vectors"  # the tensor of a concept of stage vectors


class Table(LearnedModule):
    """Vectors (S, layers, n, D), in the parameter `table` as (S, layers, D) where n is 1.

    Args:
        values: (S, layers, n, D).
        norm: if it is given, every vector is brought to this length.
    """

    norm: Tensor | None

    def __init__(self, values: Tensor, norm: Tensor | None = None) -> None:
        super().__init__()
        self.num_stages, self.num_layers, self.num_tokens, self.width = values.shape
        self.table = nn.Parameter((values.squeeze(2) if self.num_tokens == 1 else values).clone())
        self.register_buffer("norm", norm, persistent=False)

    @property
    def method(self) -> str:  # type: ignore[override]
        if self.num_layers == self.num_tokens == 1:
            return "prospect" if self.num_stages > 1 else "textual-inversion"
        return "xti" if self.num_stages == 1 and self.num_layers > 1 else TABLE

    @property
    def num_rows(self) -> int:
        return self.num_stages * self.num_tokens

    def rows_at(self, stage: int, num_stages: int) -> list[int]:
        first = matching_stage(stage, num_stages, self.num_stages) * self.num_tokens
        return list(range(first, first + self.num_tokens))

    def bucket(self, t: int) -> int:
        return 0

    def values(self) -> Tensor:
        """Return the vectors (S, layers, n, D)."""
        values = self.table.unsqueeze(2) if self.num_tokens == 1 else self.table
        return values if self.norm is None else F.normalize(values, dim=-1) * self.norm

    def vectors(self, t: Tensor) -> TokenVectors:
        """Return e (layers, 1, S·n, D): all stages' vectors, whatever the timesteps."""
        return TokenVectors(self.values().transpose(0, 1).flatten(1, 2).unsqueeze(1))

    def to_concept(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        values = self.values().detach()
        if self.num_layers == self.num_tokens == 1:
            return {VECTORS: values[:, 0, 0]}, {}
        return {TABLE: values}, {}

    @torch.no_grad()
    def start_from(self, tensors: Tensors, metadata: Metadata) -> None:
        start = load_table(tensors, metadata).values()
        if start.shape != self.values().shape:
            raise ValueError(f"it has vectors {_sizes(start)}; this run learns {_sizes(self.values())}.")
        self.table.add_(start.to(self.table).view_as(self.table) - self.table)


def _sizes(values: Tensor) -> str:
    stages, layers, tokens, width = values.shape
    return f"of {stages} stages, {layers} layers, {tokens} tokens and width {width}"


def learn_table(
    start: Start,
    stages: int | None = None,
    layers: bool = False,
    tokens: int = 1,
    spread: float = 1.0,
    norm: Tensor | None = None,
) -> Table:
    """Return a table that starts at the initial word, its vectors apart by noise of `spread` times its deviation.

    Args:
        stages: S; None takes the model's. A table with one vector starts at the word itself.
        layers: a vector for each cross-attention layer.
    """
    shape = (stages or start.num_stages, start.num_layers if layers else 1, tokens, start.word.shape[-1])
    noise = torch.randn(shape) * start.word.std()
    return Table(start.word + (spread if shape[:3] != (1, 1, 1) else 0.0) * noise, norm)


def check_table(tensors: Tensors) -> None:
    """Raise `ValueError` unless a concept holds `table`, floats of shape (stages, layers, tokens, width)."""
    table = tensors.get(TABLE, torch.empty(0))
    if len(tensors) != 1 or table.ndim != 4 or 0 in table.shape or not table.is_floating_point():
        raise ValueError(f"its tensors ({', '.join(tensors) or 'none'}) are no table (stages, layers, tokens, width).")


def load_table(tensors: Tensors, metadata: Metadata) -> Table:
    """Return the frozen table of a concept of stage vectors (S, D), or of a table (S, layers, n, D)."""
    values = tensors[VECTORS][:, None, None] if VECTORS in tensors else tensors[TABLE]
    return Table(values).requires_grad_(False)
