"""The names of a diffusers Stable Diffusion v1 folder, in the CompVis checkpoint's names.

Both layouts describe the same three networks, so this is renaming and nothing else, except that the
autoencoder's attention projections are 1×1 convolutions (C, C, 1, 1) in CompVis and linear maps (C, C) in
diffusers. Block numbers are counted from the keys, so any number of levels and of ResNet blocks works.

Sources: parameter names of `UNet2DConditionModel`, `AutoencoderKL` (diffusers) and `CLIPTextModel`
(transformers); the numbering of input_blocks and output_blocks follows LDM's `UNetModel.__init__`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."

_STEMS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
_SUFFIXES = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")
# Modules by diffusers' names: of a network ("") and of its kinds of blocks; those that are not here are called alike.
_UNET_NAMES = {
    "": {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    },
    "resnets": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
}
_VAE_NAMES = {
    "": {"conv_norm_out": "norm_out"},
    "resnets": {"conv_shortcut": "nin_shortcut"},
    "attentions": {  # the second spelling is that of diffusers before 0.15
        "group_norm": "norm",
        **dict.fromkeys(("to_q", "query"), "q"),
        **dict.fromkeys(("to_k", "key"), "k"),
        **dict.fromkeys(("to_v", "value"), "v"),
        **dict.fromkeys(("to_out.0", "proj_attn"), "proj_out"),
    },
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_PROJECTION = re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$")

Sizes = Counter[tuple[str, int, str]]  # (down | mid | up, level, kind of block) → how many


def find_weights(folder: Path) -> dict[str, Path]:
    """Return the weight file of each part: full precision before half, safetensors before pickle.

    Raises:
        ValueError: a part is missing, or it is for Stable Diffusion XL; the message reads on after the folder's name.
    """
    if (folder / "text_encoder_2").is_dir():
        raise ValueError("holds Stable Diffusion XL (it has text_encoder_2/)")
    files: dict[str, Path] = {}
    for part, stems in _STEMS.items():
        candidates = [folder / part / f"{stem}.{suffix}" for suffix in _SUFFIXES for stem in stems]
        found = next(filter(Path.is_file, candidates), None)
        if found is None:
            raise ValueError(f"has no {part}/{candidates[0].name} (nor a .bin or fp16 variant of it)")
        files[part] = found
    return files


def to_compvis(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the state dicts of `unet`, `vae` and `text_encoder` as one CompVis state dict; tensors are not copied.

    Keys that Stable Diffusion v1 does not have stay, for `load_weights` to list.
    """
    renamed: dict[str, Tensor] = {}
    for part, (prefix, rename) in _RENAMERS.items():
        blocks = {match.groups()[:4] for match in map(_BLOCK.search, parts[part]) if match}
        sizes = Counter((side, int(level or 0), kind) for side, level, kind, _ in blocks)
        for key, tensor in parts[part].items():
            name = prefix + rename(key, sizes)
            is_linear = part == "vae" and tensor.ndim == 2 and _VAE_PROJECTION.search(name)
            renamed[name] = tensor[:, :, None, None] if is_linear else tensor
    return renamed


def _renamed(
    key: str, sizes: Sizes, names: Mapping[str, Mapping[str, str]], place: Callable[[str, int, str, int, Sizes], str]
) -> str:
    """Return a key of CompVis; `place` says where a block is there."""
    match = _BLOCK.fullmatch(key)
    side, level, kind, number, inner = match.groups() if match else ("", 0, "", 0, key)
    if kind in names:
        module, _, parameter = inner.rpartition(".")
        inner = f"{names[kind].get(module, module)}.{parameter}"
    return f"{place(side, int(level or 0), kind, int(number), sizes)}.{inner}" if match else inner


def _unet_place(side: str, level: int, kind: str, number: int, sizes: Sizes) -> str:
    if side == "mid":
        return f"middle_block.{2 * number + (kind == 'attentions')}"
    if side == "down":  # block 0 is conv_in; each level holds its ResNet blocks, then its downsampler
        before = (sizes["down", i, "resnets"] + sizes["down", i, "downsamplers"] for i in range(level))
        stack, start = "input_blocks", 1 + sum(before)
    else:
        stack, start = "output_blocks", sum(sizes["up", i, "resnets"] for i in range(level))
    if kind in ("resnets", "attentions"):
        return f"{stack}.{start + number}.{int(kind == 'attentions')}"
    last = start + sizes[side, level, "resnets"]
    # the upsampler sits in its level's last block, behind the attention where there is one
    behind = 2 if sizes["up", level, "attentions"] else 1
    return f"{stack}.{last}.0" if kind == "downsamplers" else f"{stack}.{last - 1}.{behind}"


def _vae_place(side: str, level: int, kind: str, number: int, sizes: Sizes) -> str:
    if kind in ("downsamplers", "upsamplers"):
        own = f"{side}sample"
    else:
        own = f"{'attn' if kind == 'attentions' else 'block'}{'_' if side == 'mid' else '.'}{number + (side == 'mid')}"
    if side == "up":  # CompVis counts the decoder's levels from the finest
        level = max(i for where, i, _ in sizes if where == "up") - level
    return f"mid.{own}" if side == "mid" else f"{side}.{level}.{own}"


def _unet_name(key: str, sizes: Sizes) -> str:
    return _renamed(key, sizes, _UNET_NAMES, _unet_place)


def _vae_name(key: str, sizes: Sizes) -> str:
    if key.startswith(("quant_conv.", "post_quant_conv.")):
        return key
    half, _, inside = key.partition(".")  # encoder or decoder
    return f"{half}.{_renamed(inside, sizes, _VAE_NAMES, _vae_place)}"


def _text_name(key: str, sizes: Sizes) -> str:
    return key.removeprefix("text_model.")  # transformers 5 saves without it


_RENAMERS: dict[str, tuple[str, Callable[[str, Sizes], str]]] = {
    "unet": (UNET, _unet_name),
    "vae": (VAE, _vae_name),
    "text_encoder": (TEXT, _text_name),
}
