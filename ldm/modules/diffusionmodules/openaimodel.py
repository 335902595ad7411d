"""The U-Net of latent diffusion, in the CompVis key layout (Rombach et al. 2022; Dhariwal and Nichol 2021).

Shapes: B batch, C channels, H W latent height and width, E width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.conditioning.context import Context, Projected
from ldm.modules.attention import AttentionHook, BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.util import Upsample, enter, leave, timestep_embedding, zero_module


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them; (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Block(nn.ModuleList):
    """The layers of one `input_blocks` / `middle_block` / `output_blocks` entry, each with what it needs."""

    def forward(
        self, x: Tensor, emb: Tensor, context: Context | Projected, hook: AttentionHook | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, hook)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Noise prediction with cross-attention; parameters as in the reference's `unet_config`.

    Args:
        attention_resolutions: downsampling factors at which attention is used (1 = full latent size).
        num_heads: heads of every attention layer, each `channels // num_heads` wide.
        use_checkpoint: recompute activations in the backward pass: less memory, about a third more time. Works
            with frozen weights.
        norm_num_groups: groups of every GroupNorm; 32 in Stable Diffusion.

    Raises:
        ValueError: a width is no multiple of the number of heads or groups.
    """

    ignored_keys = {
        "image_size": "the U-Net takes latents of any size",
        "use_spatial_transformer": "attention is always the spatial transformer",
        "legacy": "heads are always `channels // num_heads` wide, which is what `legacy: False` means",
    }

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        context_dim: int,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        num_heads: int = 8,
        transformer_depth: int = 1,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = [model_channels * m for m in channel_mult]
        if any(width % num_heads for width in widths):
            raise ValueError(f"The U-Net's widths {widths} must be multiples of num_heads={num_heads}.")
        self.in_channels, self.out_channels, self.context_dim = in_channels, out_channels, context_dim
        self.model_channels, self.dropout, self.use_checkpoint = model_channels, dropout, use_checkpoint
        self.downsampling = 2 ** (len(channel_mult) - 1)  # what latent height and width must be multiples of
        # of each attention layer in order of execution: down, mid or up, and how much smaller than the latents it is
        self.attention_places: list[tuple[str, int]] = []
        self._make_blocks(widths, num_res_blocks, attention_resolutions, num_heads, transformer_depth, norm_num_groups)

    def _make_blocks(
        self,
        widths: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        heads: int,
        depth: int,
        groups: int,
    ) -> None:
        emb, context_dim, dropout = 4 * self.model_channels, self.context_dim, self.dropout
        in_channels, model_channels = self.in_channels, self.model_channels

        def res(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, emb, groups, dropout)

        def attention(channels: int, place: str, level: int) -> SpatialTransformer:
            first = self.num_attention_layers
            self.attention_places += [(place, 2**level)] * depth
            dim_head = channels // heads
            return SpatialTransformer(channels, heads, dim_head, depth, context_dim, first, groups, dropout)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(in_channels, model_channels, 3, padding=1)])])
        skips = [model_channels]
        channels = model_channels
        for level, width in enumerate(widths):
            attends = 2**level in attention_resolutions
            for _ in range(num_res_blocks):
                block = Block([res(channels, width)] + ([attention(width, "down", level)] if attends else []))
                channels = width
                self.input_blocks.append(block)
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Block([Downsample(channels)]))
                skips.append(channels)

        self.middle_block = Block([
            res(channels, channels), attention(channels, "mid", len(widths) - 1), res(channels, channels)
        ])  # fmt: skip

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            attends = 2**level in attention_resolutions
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [res(channels + skips.pop(), width)]
                layers += [attention(width, "up", level)] if attends else []
                channels = width
                if level and i == num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Block(layers))

        self.out = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            zero_module(nn.Conv2d(channels, self.out_channels, 3, padding=1)),
        )

    @property
    def num_attention_layers(self) -> int:
        return len(self.attention_places)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.out.parameters()).dtype

    def project(self, context: Context) -> Projected:
        """Return the keys and values that all cross-attention layers make of a context, whatever x and t are."""
        context = context.map(lambda c: c.to(self.dtype))
        blocks = [module for module in self.modules() if isinstance(module, BasicTransformerBlock)]
        blocks.sort(key=lambda block: block.layer_index)
        layers = tuple(block.attn2.project(*context.layer(block.layer_index)) for block in blocks)
        return Projected(layers, *context)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Context | Projected, hook: AttentionHook | None = None
    ) -> Tensor:
        """Return the prediction (B, C_out, H, W), in float32, for noised latents x (B, C_in, H, W) at timesteps (B,).

        H and W must be multiples of 2^(levels - 1). `context` may be what `project` made of it. `hook` is called in
        every attention; without one the probabilities are never made.
        """
        dtype = self.dtype
        h = enter(x, dtype)
        if isinstance(context, Context):
            context = context.map(lambda c: enter(c, dtype))
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))  # (B, E)
        skips = []
        for block in self.input_blocks:
            h = self._run(block, h, emb, context, hook)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, context, hook)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb, context, hook)
        return leave(self.out(h), dtype)

    def _run(
        self, block: nn.Module, h: Tensor, emb: Tensor, context: Context | Projected, hook: AttentionHook | None
    ) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            # the state of the generators may not be read while a CUDA graph is captured
            draws = self.training and self.dropout > 0
            return checkpoint(block, h, emb, context, hook, use_reentrant=False, preserve_rng_state=draws)
        return block(h, emb, context, hook)
