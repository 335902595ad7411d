"""Attention of the U-Net and of ProSpect's generator block, in the CompVis key layout.

Shapes: B batch, N query tokens (H·W inside the U-Net), L context tokens, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioning import Context
from ldm.modules.diffusionmodules.util import zero_module

# Up to this many query-key pairs the CPU's plain products are used for training; more would cost memory.
PLAIN_ATTENTION_PAIRS = 2**20


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention; q (B, heads, N, d), k and v (B, heads, L, d) -> (B, heads, N, d).

    PyTorch's fused attention, except where its backward pass on the CPU is slower than plain products (measured
    1.6 times for a whole training step of the demo model).
    """
    if q.device.type == "cpu" and q.requires_grad and q.shape[-2] * k.shape[-2] <= PLAIN_ATTENTION_PAIRS:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


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

    def __init__(self, dim: int, dim_out: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, C) to `k_in`, `v_in` (B, L, D); to itself when they are None."""

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

    def forward(self, x: Tensor, k_in: Tensor | None = None, v_in: Tensor | None = None) -> Tensor:
        k_in = x if k_in is None else k_in
        v_in = k_in if v_in is None else v_in
        projections = self.to_q(x), self.to_k(k_in), self.to_v(v_in)
        q, k, v = (rearrange(p, "b n (h d) -> b h n d", h=self.heads) for p in projections)
        return self.to_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each before a residual sum."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, context_dim: int, layer_index: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.layer_index = layer_index

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), *context.layer(self.layer_index)) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the H·W positions of a feature map; (B, C, H, W) -> (B, C, H, W).

    `first_layer_index` numbers the cross-attention layers of a U-Net in order of execution.
    """

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

    def forward(self, x: Tensor, context: Context) -> Tensor:
        height = x.shape[-2]
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height))
