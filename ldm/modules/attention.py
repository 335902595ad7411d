"""Attention of the U-Net and of ProSpect's generator block, in the CompVis key layout.

Shapes: B batch, N query tokens (H·W inside the U-Net), L context tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioning.context import Context, Projected
from ldm.modules.diffusionmodules.util import zero_module

# Up to this many query-key pairs the CPU's plain products train faster than the fused kernel (docs/benchmarks.md).
PLAIN_ATTENTION_PAIRS = 2**17
PLAIN_ATTENTION_PAIRS_HALF = 2**20


class Site(NamedTuple):
    """The attention that an `AttentionHook` is called for."""

    layer: int  # number of the transformer block in order of execution, 0 … 15 in Stable Diffusion v1
    is_cross: bool  # to the prompt; False for attention of the image to itself
    t: int = -1  # raw timestep of the U-Net call; -1 where the caller did not say


# Probabilities (B, heads, N, L) at a site -> those that are used in their place, of the same shape.
# One that has a method `wants(site, queries)` is called only where that returns True; elsewhere attention stays fused.
AttentionHook = Callable[[Tensor, Site], Tensor]


def is_wanted(hook: AttentionHook, site: Site, queries: int) -> bool:
    """Return whether a hook is to be called at a site of so many query tokens."""
    wants = getattr(hook, "wants", None)
    return wants is None or wants(site, queries)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    hook: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax attention; q (B, heads, N, d), k and v (B, heads, L, d) -> (B, heads, N, d).

    Args:
        causal: query i reads keys 0 … i only.
        bias: added to the logits, broadcastable to (B, heads, N, L).
        hook: is given the probabilities (B, heads, N, L) and returns those to be used; without one they are not made.
        backend: `plain` products, PyTorch's `fused` attention, or `auto`: fused, except where its backward pass on
            the CPU is slower than plain products (measured 1.6 times for a training step of the demo model).
    """
    if backend == "auto":
        limit = PLAIN_ATTENTION_PAIRS if q.dtype == torch.float32 else PLAIN_ATTENTION_PAIRS_HALF
        few = q.shape[-2] * k.shape[-2] <= limit
        backend = "plain" if q.device.type == "cpu" and q.requires_grad and few else "fused"
    if backend == "fused" and hook is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    probabilities = scores.softmax(dim=-1)
    return (probabilities if hook is None else hook(probabilities)) @ v


def set_attention(module: nn.Module, backend: str) -> None:
    """Choose how all attention inside `module` is computed: `auto`, `plain` or `fused`; see `attend`."""
    for part in module.modules():
        if hasattr(type(part), "attention_backend"):
            part.attention_backend = backend  # type: ignore[assignment]


class GEGLU(nn.Module):
    """x · gelu(gate) from one projection (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of inner width 4·dim, then a linear layer to `dim_out`; (…, dim) -> (…, dim_out)."""

    def __init__(self, dim: int, dim_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, C) to `k_in`, `v_in` (B, L, D); to itself when they are None."""

    attention_backend = "auto"  # see `set_attention`

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        context_dim = context_dim or query_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(
        self,
        x: Tensor,
        k_in: Tensor | None = None,
        v_in: Tensor | None = None,
        projected: bool = False,
        hook: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """With `projected`, `k_in` and `v_in` are what `project` made of them; `hook` as in `attend`."""
        k_in = x if k_in is None else k_in
        v_in = k_in if v_in is None else v_in
        k, v = (k_in, v_in) if projected else self.project(k_in, v_in)
        out = attend(self._heads(self.to_q(x)), k, v, hook=hook, backend=self.attention_backend)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def project(self, k_in: Tensor, v_in: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, heads, L, d) of `k_in`, `v_in` (B, L, D)."""
        return self._heads(self.to_k(k_in)), self._heads(self.to_v(v_in))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each before a residual sum."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, context_dim: int, layer_index: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head, dropout)
        self.ff = FeedForward(dim, dim, dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.layer_index = layer_index

    def forward(self, x: Tensor, context: Context | Projected, hook: AttentionHook | None = None) -> Tensor:
        queries = x.shape[1]
        x = self.attn1(self.norm1(x), hook=self._at(hook, False, queries)) + x
        k, v = context.layer(self.layer_index)
        projected = isinstance(context, Projected)
        x = self.attn2(self.norm2(x), k, v, projected, self._at(hook, True, queries)) + x
        return self.ff(self.norm3(x)) + x

    def _at(self, hook: AttentionHook | None, is_cross: bool, queries: int) -> Callable[[Tensor], Tensor] | None:
        site = Site(self.layer_index, is_cross)
        if hook is None or not is_wanted(hook, site, queries):
            return None
        return lambda probabilities: hook(probabilities, site)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the H·W positions of a feature map; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        dim_head: int,
        depth: int,
        context_dim: int,
        first_layer_index: int,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, dim_head, context_dim, first_layer_index + i, dropout)
            for i in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Context | Projected, hook: AttentionHook | None = None) -> Tensor:
        height = x.shape[-2]
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context, hook)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height))
