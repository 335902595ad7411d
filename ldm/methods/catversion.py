"""CatVersion: keys and values that every token of the last text layers reads, too (Zhao et al. 2023).

Shapes: P prefix length, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TEXT_LAYERS = (9, 10, 11)


class CatVersionPrefix(nn.Module):
    """A learned prefix of the text transformer's self-attention.

    Args:
        text_layers: layers of the text transformer that read it; the reference's are the last three of twelve.
        heads, head_width: of the text transformer.
        length: P.
        logit_bias: added to the prefix's logits: 1 in the reference, whose mask is extended with ones, and therefore
            in its released files; 0 is the plain softmax.
    """

    def __init__(
        self,
        text_layers: tuple[int, ...] = TEXT_LAYERS,
        heads: int = 12,
        head_width: int = 64,
        length: int = 1,
        logit_bias: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.text_layers, self.logit_bias = tuple(text_layers), logit_bias
        # (text layers, K and V, P, heads, d)
        start = torch.randn(len(text_layers), 2, length, heads, head_width, generator=generator)
        self.prefix = nn.Parameter(start)

    def key_values(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return text layer -> (K, V), each (P, heads, d)."""
        return {layer: (k, v) for layer, (k, v) in zip(self.text_layers, self.prefix, strict=True)}


def from_flat(flat: Tensor, num_layers: int = 3, heads: int = 12) -> Tensor:
    """Return the prefix (layers, 2, P, heads, d) of the reference's flat vector, whose slowest axis is the position.

    Raises:
        ValueError: a length that such a prefix does not have.
    """
    size = num_layers * 2 * heads * 64
    if flat.ndim != 1 or not len(flat) or len(flat) % size:
        raise ValueError(f"a prefix has a multiple of {size} values, not shape {tuple(flat.shape)}.")
    return flat.view(-1, num_layers, 2, heads, 64).permute(1, 2, 0, 3, 4)
