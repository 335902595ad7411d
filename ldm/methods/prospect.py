"""ProSpect's generator block: S stage embeddings from the embedding of one word (Zhang et al. 2023, section 4)."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.modules.attention import CrossAttention, FeedForward


class GeneratorBlock(nn.Module):
    """The reference's transformer block from the initial word's embedding (1, D) to S vectors (S, D).

    x = e + A1(LN1(e)); x = x + A2(LN2(x), context e); S·D outputs = FF(LN3(x)), without a residual around FF. The
    sequence has one token, so both softmaxes are 1: only the value and output projections of A1 and A2 matter,
    and `to_q`, `to_k` and `norm2` exist for the checkpoint's layout. 31,477,248 parameters at S = 10, D = 768.
    """

    def __init__(self, width: int, num_stages: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_stages = num_stages
        self.attn1 = CrossAttention(width, None, heads, dim_head, dropout)
        self.ff = FeedForward(width, width * num_stages, dropout)
        self.attn2 = CrossAttention(width, width, heads, dim_head, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, initial: Tensor) -> Tensor:
        e = initial.unsqueeze(0)  # (1, 1, D): a batch of one sequence of one token
        x = e + self.attn1(self.norm1(e))
        x = x + self.attn2(self.norm2(x), e)
        return self.ff(self.norm3(x)).view(self.num_stages, -1)  # (S, D)
