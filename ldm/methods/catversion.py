"""CatVersion: keys and values that every token of the last text layers reads, too (Zhao et al. 2023).

Shapes: P prefix length, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.methods.base import LearnedModule, Metadata, Start, Tensors
from ldm.util import usual_torch

TEXT_LAYERS, HEADS, HEAD_WIDTH = (9, 10, 11), 12, 64  # of Stable Diffusion v1's text transformer
FLAT = len(TEXT_LAYERS) * 2 * HEADS * HEAD_WIDTH  # values of a released prefix of length 1
PREFIX = "prefix"  # the tensor of a concept
LAYERS, LOGIT_BIAS = "catversion.text_layers", "catversion.logit_bias"  # in its metadata


class CatVersionPrefix(LearnedModule):
    """A learned prefix of the text transformer's self-attention.

    Args:
        text_layers: layers of the text transformer that read it; the reference's are the last three of twelve.
        heads, head_width: of the text transformer.
        length: P.
        logit_bias: added to the prefix's logits: 1 in the reference, whose mask is extended with ones, and therefore
            in its released files; 0 is the plain softmax.
    """

    method = "catversion"

    def __init__(
        self, text_layers: tuple[int, ...], heads: int, head_width: int, length: int, logit_bias: float
    ) -> None:
        super().__init__()
        self.text_layers, self.logit_bias = text_layers, logit_bias
        # (text layers, K and V, P, heads, d)
        self.prefix = nn.Parameter(torch.randn(len(text_layers), 2, length, heads, head_width))

    @property
    def width(self) -> int:
        """D of the text transformer."""
        return self.prefix.shape[3] * self.prefix.shape[4]

    def check_fits(self, text_layers: int, heads: int) -> None:
        """Raise `ValueError` unless a text transformer has the layers and heads of this prefix."""
        if max(self.text_layers) >= text_layers or self.prefix.shape[3] != heads:
            own = f"text layers {', '.join(map(str, self.text_layers))} of {self.prefix.shape[3]} heads"
            theirs = f"this model has {text_layers} layers of {heads}: it was learned for another base model"
            raise ValueError(f"This concept ({self.method}) is for {own}, but {theirs}.")

    def key_values(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return text layer -> (K, V), each (P, heads, d)."""
        return {layer: (k, v) for layer, (k, v) in zip(self.text_layers, self.prefix, strict=True)}

    def to_concept(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {PREFIX: self.prefix.detach()}, _describe(self.text_layers, self.logit_bias)

    @torch.no_grad()
    def start_from(self, tensors: Tensors, metadata: Metadata) -> None:
        other = load_prefix(tensors, metadata)
        if (other.prefix.shape, other.to_concept()[1]) != (self.prefix.shape, self.to_concept()[1]):
            raise ValueError("its prefix has other layers, sizes or logit bias than this run's.")
        self.prefix.copy_(other.prefix)


def learn_prefix(start: Start, length: int = 1, layers: int = 3, logit_bias: float = 1.0) -> CatVersionPrefix:
    """Return a prefix for the last `layers` layers of the model's text transformer, drawn from N(0, 1)."""
    which = tuple(range(max(0, start.text_layers - layers), start.text_layers))
    return CatVersionPrefix(which, start.heads, start.word.shape[-1] // start.heads, length, logit_bias)


def check_prefix(tensors: Tensors) -> None:
    """Raise `ValueError` unless a concept holds `prefix`, floats of shape (text layers, 2, P, heads, width)."""
    prefix = tensors.get(PREFIX, torch.empty(0))
    if len(tensors) != 1 or prefix.ndim != 5 or prefix.shape[1] != 2 or 0 in prefix.shape:
        raise ValueError(f"its tensors ({', '.join(tensors) or 'none'}) are no CatVersion prefix.")


@usual_torch()
def load_prefix(tensors: Tensors, metadata: Metadata) -> CatVersionPrefix:
    """Return the frozen prefix of a concept.

    Raises:
        ValueError: its layers or logit bias are missing or do not fit.
    """
    values = tensors[PREFIX]
    try:
        layers, bias = tuple(map(int, metadata[LAYERS].split(","))), float(metadata[LOGIT_BIAS])
        fits = len(layers) == len(set(layers)) == len(values) and min(layers) >= 0 and math.isfinite(bias)
    except (KeyError, ValueError):
        fits = False
    if not fits:
        count = f"those of {len(values)} layers"
        raise ValueError(f"it does not say its text layers and logit bias, {count} ({LAYERS}, {LOGIT_BIAS}).")
    prefix = CatVersionPrefix(layers, values.shape[3], values.shape[4], values.shape[2], bias)
    with torch.no_grad():
        prefix.prefix.copy_(values)
    return prefix.requires_grad_(False)


def from_adapter(flat: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a concept keeps of the reference's vector (P·4608,), whose slowest axis is the position.

    Raises:
        ValueError: a length that such a prefix does not have.
    """
    if flat.ndim != 1 or not len(flat) or len(flat) % FLAT:
        what = f"its prefix of shape {tuple(flat.shape)} is not a multiple of {FLAT} values"
        raise ValueError(f"{what}: it is for another text transformer than that of Stable Diffusion v1.")
    values = flat.view(-1, len(TEXT_LAYERS), 2, HEADS, HEAD_WIDTH).permute(1, 2, 0, 3, 4)
    return {PREFIX: values}, _describe(TEXT_LAYERS, 1.0)


def _describe(text_layers: Sequence[int], logit_bias: float) -> dict[str, str]:
    return {LAYERS: ",".join(map(str, text_layers)), LOGIT_BIAS: repr(logit_bias)}
