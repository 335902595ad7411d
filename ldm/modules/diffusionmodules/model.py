"""Encoder and decoder of the first stage (Rombach et al. 2022, appendix), in the CompVis key layout.

Shapes: images (B, 3, H, W) in [-1, 1]; latents (B, z, H/f, W/f) with f = 2^(levels - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.util import Upsample


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """The `ddconfig` of a configuration.

    Args:
        ch, ch_mult: the width of each level is `ch` times its multiple, from fine to coarse.
        attn_resolutions: sides in pixels of the levels with attention, for images of `resolution`.
        double_z: the encoder gives mean and log-variance.
    """

    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    in_channels: int
    z_channels: int
    resolution: int
    attn_resolutions: Sequence[int] = ()
    out_ch: int = 3
    double_z: bool = True
    dropout: float = 0.0
    norm_num_groups: int = 32

    @property
    def levels(self) -> list[tuple[int, bool]]:
        """Width of each level and whether it has attention, from fine to coarse."""
        return [(self.ch * m, self.resolution // 2**i in self.attn_resolutions) for i, m in enumerate(self.ch_mult)]


def normalize(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, around a skip; (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = normalize(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalize(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions; (B, C, H, W) -> (B, C, H, W)."""

    attention_backend = "fused"  # see `ldm.modules.attention.set_attention`

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = normalize(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # contiguous: the fused kernels need it, and without them all pairs of positions would be in memory
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c").contiguous() for layer in (self.q, self.k, self.v))
        h = attend(q, k, v, backend=self.attention_backend)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """Halve H and W: pad right and bottom by one, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups, dropout)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks at one resolution, each followed by attention where the level has it, and the way to the next one."""

    def __init__(self, channels: Sequence[int], attention: bool, groups: int, dropout: float) -> None:
        super().__init__()
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.block = nn.ModuleList(ResnetBlock(c_in, c_out, groups, dropout) for c_in, c_out in pairs)
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) if attention else nn.Identity() for _, c_out in pairs)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, 2z, H/f, W/f), before the 1x1 `quant_conv`."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        groups, dropout, blocks = sizes.norm_num_groups, sizes.dropout, sizes.num_res_blocks
        channels = sizes.levels[0][0]
        self.conv_in = nn.Conv2d(sizes.in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (width, attention) in enumerate(sizes.levels):
            level = Level([channels] + [width] * blocks, attention, groups, dropout)
            if i < len(sizes.levels) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            channels = width
        self.mid = Middle(channels, groups, dropout)
        self.norm_out = normalize(channels, groups)
        self.conv_out = nn.Conv2d(channels, (1 + sizes.double_z) * sizes.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents (B, z, h, w), after the 1x1 `post_quant_conv`, -> images (B, 3, f·h, f·w), not clamped."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        groups, dropout, blocks = sizes.norm_num_groups, sizes.dropout, sizes.num_res_blocks
        channels = sizes.levels[-1][0]
        self.conv_in = nn.Conv2d(sizes.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, groups, dropout)
        self.up = nn.ModuleList()
        for i, (width, attention) in reversed(list(enumerate(sizes.levels))):
            level = Level([channels] + [width] * (blocks + 1), attention, groups, dropout)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.insert(0, level)  # numbered from fine to coarse, as in the checkpoint
            channels = width
        self.norm_out = normalize(channels, groups)
        self.conv_out = nn.Conv2d(channels, sizes.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
