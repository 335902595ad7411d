"""CLIP's text transformer (Radford et al. 2021), with the key names of the Stable Diffusion checkpoint.

It takes input embeddings rather than token ids, so that learned vectors can stand anywhere in a prompt.
Shapes: B prompts, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import attend


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text transformer; the defaults are CLIP ViT-L/14, the one of Stable Diffusion v1.

    Raises:
        ValueError: the width is not a multiple of the heads, or the activation is unknown.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} attention heads."
            )
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act must be 'quick_gelu' or 'gelu', not '{self.hidden_act}'.")


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention with biases; (B, L, D) -> (B, L, D)."""

    attention_backend = "auto"  # see `ldm.modules.attention.set_attention`

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(p, "b l (h d) -> b h l d", h=self.heads) for p in projections)
        out = attend(q, k, v, self.attention_backend, causal=True)
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)"))


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class CLIPLayer(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextTransformer(nn.Module):
    """Input embeddings (B, L, D) -> last hidden states after the final norm (B, L, D); L at most 77."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, config.hidden_size),
                "position_embedding": nn.Embedding(config.max_position_embeddings, config.hidden_size),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))}
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        for embedding in self.embeddings.values():
            nn.init.normal_(embedding.weight, std=0.02)

    @property
    def token_table(self) -> Tensor:
        """Token embeddings (vocabulary, D)."""
        return self.embeddings["token_embedding"].weight

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs + self.embeddings["position_embedding"].weight[: inputs.shape[1]]
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    """Only adds the level `text_model` of the checkpoint's key names."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
