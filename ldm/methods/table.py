"""A table of free vectors for stages and U-Net layers.

Textual Inversion has 1 stage and 1 layer, P+ (XTI) 1 and 16, ProSpect without its block 10 and 1; any other works, too.

Shapes: S stages, n consecutive tokens, D width of the text transformer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.conditioning.learned import TokenVectors


class Table(nn.Module):
    """Vectors (S, layers, n, D), held in the parameter `table` as (S, layers, D) where n is 1.

    Args:
        start: initial values, (S, layers, n, D).
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.num_stages, self.num_layers, self.num_tokens, _ = start.shape
        self.table = nn.Parameter((start.squeeze(2) if self.num_tokens == 1 else start).clone())

    def bucket(self, t: int) -> int:
        return 0

    def vectors(self, t: Tensor) -> TokenVectors:
        """Return e (layers, 1, S·n, D): all stages' vectors, whatever the timesteps."""
        full = self.table.view(self.num_stages, self.num_layers, self.num_tokens, -1)
        return TokenVectors(full.transpose(0, 1).flatten(1, 2).unsqueeze(1).to(t.device))


def initial_table(word: Tensor, num_stages: int, num_layers: int, num_tokens: int, spread: float = 0.0) -> Tensor:
    """Return (S, layers, n, D) copies of a word's embedding (1, D), apart by noise of `spread` times its deviation."""
    noise = torch.randn(num_stages, num_layers, num_tokens, word.shape[-1]) * word.std()
    return word + spread * noise
