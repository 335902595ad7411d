"""ProSpect's generator block: S stage embeddings from the embedding of one word (Zhang et al. 2023, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.learned import TokenVectors
from ldm.conditioning.stages import matching_stage
from ldm.methods.base import LearnedModule, Metadata, Start, Tensors
from ldm.methods.table import VECTORS
from ldm.modules.attention import CrossAttention, FeedForward
from ldm.util import without_weights


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


class ProSpect(GeneratorBlock, LearnedModule):
    """The generator block on the initial word: S vectors for a placeholder.

    Args:
        norm: `free` (the reference), or `word`: every vector keeps the length of the initial embedding.
    """

    method = "prospect"
    num_layers = 1
    word: Tensor

    def __init__(self, start: Start, dropout: float = 0.1, norm: str = "free") -> None:
        super().__init__(start.word.shape[-1], start.num_stages, dropout=dropout)
        self.norm = norm
        self.register_buffer("word", start.word, persistent=False)

    @property
    def num_rows(self) -> int:
        return self.num_stages

    def rows_at(self, stage: int, num_stages: int) -> list[int]:
        return [matching_stage(stage, num_stages, self.num_stages)]

    def bucket(self, t: int) -> int:
        return 0

    def values(self) -> Tensor:
        """Return the vectors (S, D)."""
        vectors = self(self.word)
        return F.normalize(vectors, dim=-1) * self.word.norm() if self.norm == "word" else vectors

    def vectors(self, t: Tensor) -> TokenVectors:
        """Return e (1, 1, S, D): all stages' vectors, whatever the timesteps."""
        return TokenVectors(self.values()[None, None])

    @torch.no_grad()
    def to_concept(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        was_training = self.training
        self.eval()
        vectors = self.values()
        self.train(was_training)
        return {VECTORS: vectors}, {}

    @torch.no_grad()
    def start_from(self, tensors: Tensors, metadata: Metadata) -> None:
        vectors, width = tensors[VECTORS], self.word.shape[-1]
        if vectors.shape != (self.num_stages, width):
            own = f"{self.num_stages} of width {width}"
            raise ValueError(f"it has {len(vectors)} stages of width {vectors.shape[1]}; this run learns {own}.")
        was_training = self.training
        self.eval()
        difference = vectors.to(self.word.device) - self(self.word)
        self.ff.net[2].get_parameter("bias").add_(difference.flatten())
        self.train(was_training)


def check_vectors(tensors: Tensors) -> None:
    """Raise `ValueError` unless a concept holds what ProSpect learns: `vectors`, floats of shape (S, D)."""
    vectors = tensors.get(VECTORS, torch.empty(0))
    if len(tensors) != 1 or vectors.ndim != 2 or 0 in vectors.shape or not vectors.is_floating_point():
        found = ", ".join(f"{name} ({x.dtype} of {tuple(x.shape)})" for name, x in list(tensors.items())[:4])
        raise ValueError(f"an embedding is one tensor of floats (stages, width), not {found or 'none'}.")


@torch.no_grad()
def generate_vectors(parameters: Mapping[str, Tensor], initial: Tensor | None) -> Tensor:
    """Return the vectors (S, D) of a saved block for the initial embedding (1, D), without dropout.

    Args:
        parameters: the block's state dict; S and D are those of its tensors.

    Raises:
        ValueError: they are not a block's, or there is no initial embedding.
    """
    if initial is None or initial.ndim != 2 or len(initial) != 1:
        what = "missing" if initial is None else f"of shape {tuple(initial.shape)}"
        raise ValueError(f"initial_embeddings is {what}, not (1, width); use a file of ProSpect.")
    width = max(initial.shape[1], 1)
    found = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    inner, rows = (next(iter(found.get(name, ())), 0) for name in ("attn1.to_q.weight", "ff.net.2.weight"))
    with without_weights():
        # One token: the softmax over it is 1 however the inner width is cut into heads.
        block = GeneratorBlock(width, max(rows // width, 1), heads=1, dim_head=max(inner, 1))
    try:
        block.load_state_dict({name: tensor.detach().float() for name, tensor in parameters.items()}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"its network is not ProSpect's generator ({reason}); use a file of ProSpect.") from error
    return block.eval()(initial.detach().float())
