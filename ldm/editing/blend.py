"""Local blend: outside the named words' places an edit keeps the source's latents (Hertz et al. 2022).

Shapes: B rows, the source first; H W latent height and width, h w of maps; L tokens; N steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class LocalBlend:
    """The mask of an edit, which may change the image at the places of some words, summed up over all steps so far.

    Args:
        tokens: for each of N steps, 1 at the tokens of the words whose places may change, (B, L).
        subtract: the same of words whose places stay as they are; None for no such.
        start: the first step that is blended.
        threshold, subtract_threshold: of a map's largest value.
    """

    tokens: Sequence[Tensor]
    subtract: Sequence[Tensor] | None = None
    start: int = 0
    threshold: float = 0.3
    subtract_threshold: float = 0.3
    strengths: list[Tensor] = field(default_factory=list)  # (B, 1, h, w), of `tokens` and of `subtract`

    def __call__(self, x: Tensor, maps: Sequence[Tensor], step: int) -> Tensor:
        """Return latents x (B, C, H, W) after a step, the source's outside the mask.

        Args:
            maps: edited ones of this step, each (B, heads, h · w, L).
        """
        size = x.shape[-2:]
        chosen = [self.tokens[step], *([] if self.subtract is None else [self.subtract[step]])]
        now = [word_strength(maps, tokens, size) for tokens in chosen]
        self.strengths = [sum(pair) for pair in zip(self.strengths, now, strict=True)] if self.strengths else now  # type: ignore[misc]
        if step < self.start:
            return x
        return x[:1] + self.mask(size).to(x) * (x - x[:1])

    def mask(self, size: Sequence[int]) -> Tensor:
        """Return where rows may change, bool (B, 1, H, W)."""
        mask = _union(word_mask(self.strengths[0], size, self.threshold, pool=True))
        if self.subtract is None:
            return mask
        return mask & ~_union(word_mask(self.strengths[1], size, self.subtract_threshold, pool=False))


def word_strength(maps: Sequence[Tensor], tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Return the summed maps of tokens (B, L), mean over layers and heads: (B, 1, h, w)."""
    chosen = tokens.to(maps[0])[:, None, None]
    strength = torch.cat([(m * chosen).sum(dim=-1) for m in maps], dim=1).mean(dim=1)  # (B, h · w)
    factor = round((size[0] * size[1] / strength.shape[-1]) ** 0.5)
    return strength.unflatten(1, (size[0] // factor, size[1] // factor)).unsqueeze(1)


def word_mask(strength: Tensor, size: Sequence[int], threshold: float, pool: bool) -> Tensor:
    """Return where strengths (B, 1, h, w) are large, bool (B, 1, H, W); no token selects nothing."""
    if pool:
        strength = F.max_pool2d(strength, 3, stride=1, padding=1)
    strength = F.interpolate(strength, size=tuple(size))
    return strength / strength.amax(dim=(2, 3), keepdim=True) > threshold


def _union(mask: Tensor) -> Tensor:
    return mask[:1] | mask
