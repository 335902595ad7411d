"""Encoder and decoder of the first stage (Rombach et al. 2022, appendix), in the CompVis key layout.

Shapes: images (B, 3, H, W) in [-1, 1]; latents (B, z, H/f, W/f) with f = 2^(levels - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import attend
from ldm.modules.diffusionmodules.util import Upsample


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
    """The blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, channels: Sequence[int], attention: bool, groups: int, dropout: float) -> None:
        super().__init__()
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.block = nn.ModuleList(ResnetBlock(c_in, c_out, groups, dropout) for c_in, c_out in pairs)
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) for _, c_out in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class _Coder(nn.Module):
    """Base of encoder and decoder: the `ddconfig` of the YAML files."""

    _build: Callable[..., None]  # makes the layers

    # part of the reference's ddconfig; `out_ch` belongs to the decoder, `double_z` to the encoder
    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        in_channels: int,
        z_channels: int,
        resolution: int,
        attn_resolutions: Sequence[int] = (),
        out_ch: int = 3,
        double_z: bool = True,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        resolutions = [resolution // 2**i for i in range(len(widths))]
        self._build(
            widths=widths,
            attention=[r in attn_resolutions for r in resolutions],
            blocks=num_res_blocks,
            in_channels=in_channels,
            out_channels=out_ch,
            z_channels=z_channels,
            double_z=double_z,
            groups=norm_num_groups,
            dropout=dropout,
        )


class Encoder(_Coder):
    """Images (B, 3, H, W) -> features (B, 2z, H/f, W/f), before the 1x1 `quant_conv`."""

    def _build(self, widths, attention, blocks, in_channels, z_channels, double_z, groups, dropout, **_) -> None:
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):
            level = Level([previous] + [width] * blocks, attention[i], groups, dropout)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            previous = width
        self.mid = Middle(previous, groups, dropout)
        self.norm_out = normalize(previous, groups)
        self.conv_out = nn.Conv2d(previous, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.get_submodule("downsample")(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(_Coder):
    """Latents (B, z, h, w), after the 1x1 `post_quant_conv`, -> images (B, 3, f·h, f·w), not clamped."""

    def _build(self, widths, attention, blocks, out_channels, z_channels, groups, dropout, **_) -> None:
        previous = widths[-1]
        self.conv_in = nn.Conv2d(z_channels, previous, 3, padding=1)
        self.mid = Middle(previous, groups, dropout)
        levels: list[Level] = []
        for i in reversed(range(len(widths))):
            level = Level([previous] + [widths[i]] * (blocks + 1), attention[i], groups, dropout)
            if i > 0:
                level.upsample = Upsample(widths[i])
            levels.insert(0, level)  # numbered from fine to coarse, as in the checkpoint
            previous = widths[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = normalize(previous, groups)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.get_submodule("upsample")(h)
        return self.conv_out(F.silu(self.norm_out(h)))
