"""CLIP's text transformer (Radford et al. 2021), with the key names of the Stable Diffusion checkpoint.

It takes input embeddings rather than token ids, so that learned vectors can stand anywhere in a prompt.
Shapes: B prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import attend

KeyValue = tuple[Tensor, Tensor]
LogitBias = float | Mapping[int, Sequence[float]]  # of a prefix; layer -> a number for each of its P keys
NO_PREFIX: Mapping[int, KeyValue] = MappingProxyType({})


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text transformer; the defaults are CLIP ViT-L/14, the one of Stable Diffusion v1."""

    vocab_size: int = 49408
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act must be 'quick_gelu' or 'gelu', not '{self.hidden_act}'.")


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention with biases; (B, L, D) -> (B, L, D)."""

    attention_backend = "auto"  # see `ldm.modules.attention.set_attention`

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor, prefix: KeyValue | None = None, logit_bias: float | Sequence[float] = 0.0) -> Tensor:
        """With a `prefix`, keys and values (P, heads, d) each, every token also reads these, by `logit_bias` more."""
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(p, "b l (h d) -> b h l d", h=self.heads) for p in projections)
        if prefix is None:
            out = attend(q, k, v, causal=True, backend=self.attention_backend)
        else:
            k, v = (torch.cat([_before(own, x), y], dim=2) for own, y in zip(prefix, (k, v), strict=True))
            bias = _prefix_bias(x.shape[1], len(prefix[0]), logit_bias, q)
            out = attend(q, k, v, bias=bias, backend=self.attention_backend)
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)"))

    def forward_shared(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, for first tokens (N, s, D) that G variants of the others (G, N, L - s, D) have in common."""
        groups, shared = len(after), before.shape[1]
        q, k, v = (
            rearrange(
                torch.cat([layer(before).expand(groups, -1, -1, -1), layer(after)], dim=2),
                "g b l (h d) -> (g b) h l d",
                h=self.heads,
            )
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(q, k, v, causal=True, backend=self.attention_backend)
        out = rearrange(out, "(g b) h l d -> g b l (h d)", g=groups)
        return self.out_proj(out[0, :, :shared]), self.out_proj(out[:, :, shared:])


def _before(prefix: Tensor, x: Tensor) -> Tensor:
    """Return a prefix (P, heads, d) for the prompts x (B, L, D): (B, heads, P, d)."""
    return prefix.to(x.dtype).transpose(0, 1).expand(len(x), -1, -1, -1)


def _prefix_bias(length: int, prefix_length: int, logit_bias: float | Sequence[float], like: Tensor) -> Tensor:
    """Return what is added to the logits (L, P + L): `logit_bias` for the prefix, the causal mask for the tokens."""
    each = [logit_bias] * prefix_length if isinstance(logit_bias, int | float) else logit_bias
    columns = [like.new_full((length, 1), bias) for bias in each]
    return torch.cat([*columns, like.new_full((length, length), float("-inf")).triu(1)], dim=1)


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

    def forward(self, x: Tensor, prefix: KeyValue | None = None, logit_bias: float | Sequence[float] = 0.0) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), prefix, logit_bias)
        return x + self.mlp(self.layer_norm2(x))

    def forward_shared(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, in two parts; see `CLIPAttention.forward_shared`."""
        attended = self.self_attn.forward_shared(self.layer_norm1(before), self.layer_norm1(after))
        before, after = before + attended[0], after + attended[1]
        return before + self.mlp(self.layer_norm2(before)), after + self.mlp(self.layer_norm2(after))


class CLIPEmbeddings(nn.Module):
    """The tables of token embeddings (vocabulary, D) and position embeddings (positions, D)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)


class CLIPEncoder(nn.Module):
    """Only adds the level `layers` of the checkpoint's key names."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))


class CLIPTextTransformer(nn.Module):
    """Input embeddings (B, L, D) -> last hidden states (B, L, D), before the final norm; L at most 77."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        nn.init.normal_(self.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)

    @property
    def token_table(self) -> Tensor:
        """Token embeddings (vocabulary, D)."""
        return self.embeddings.token_embedding.weight

    def forward(
        self, inputs: Tensor, prefix: Mapping[int, KeyValue] = NO_PREFIX, logit_bias: LogitBias = 0.0
    ) -> Tensor:
        """Return the hidden states (B, L, D) before `final_layer_norm`.

        Args:
            inputs: token embeddings (B, L, D).
            prefix: layer -> keys and values (P, heads, d) that all tokens of that layer read, too (CatVersion).
            logit_bias: added to the logits of the prefix: one number, or layer -> one for each of its P keys.
        """
        return self.run_layers(self.enter(inputs), 0, len(self.encoder.layers), prefix, logit_bias)

    def forward_shared(self, inputs: Tensor, shared: int) -> Tensor:
        """Return the hidden states (G, N, L, D) for inputs whose first `shared` tokens are the same in all G variants.

        No token reads a later one, so these rows are computed once.
        """
        x = self.enter(inputs)
        before, after = x[0, :, :shared], x[:, :, shared:]
        for layer in self.encoder.layers:
            before, after = cast(CLIPLayer, layer).forward_shared(before, after)
        return torch.cat([before.expand(len(x), -1, -1, -1), after], dim=2)

    def enter(self, inputs: Tensor) -> Tensor:
        """Return the first layer's input (B, L, D): token and position embeddings."""
        return inputs + self.embeddings.position_embedding.weight[: inputs.shape[-2]]

    def run_layers(
        self, x: Tensor, first: int, end: int, prefix: Mapping[int, KeyValue] = NO_PREFIX, logit_bias: LogitBias = 0.0
    ) -> Tensor:
        """Return the output (B, L, D) of layer `end` - 1 for x, the input of layer `first`."""
        for index in range(first, end):
            bias = logit_bias.get(index, ()) if isinstance(logit_bias, Mapping) else logit_bias
            x = self.encoder.layers[index](x, prefix.get(index), bias)
        return x


class CLIPTextModel(nn.Module):
    """Only adds the level `text_model` of the checkpoint's key names."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
