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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."

_STEMS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
_SUFFIXES = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")
_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_MIDDLE = {
    "resnets.0": "middle_block.0",
    "attentions.0": "middle_block.1",
    "resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_OUTSIDE = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_VAE_MIDDLE = {"resnets.0": "mid.block_1", "attentions.0": "mid.attn_1", "resnets.1": "mid.block_2"}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {  # the second spelling is that of diffusers before 0.15
    "group_norm": "norm",
    **dict.fromkeys(("to_q", "query"), "q"),
    **dict.fromkeys(("to_k", "key"), "k"),
    **dict.fromkeys(("to_v", "value"), "v"),
    **dict.fromkeys(("to_out.0", "proj_attn"), "proj_out"),
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")
_VAE_PROJECTION = re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$")

Sizes = Counter[tuple[str, int, str]]  # (down | up, level, kind of block) → how many


def find_weights(folder: Path) -> dict[str, Path]:
    """Return the weight file of each part: full precision before half, safetensors before pickle.

    Raises:
        ValueError: not such a folder, or a part is missing; the message reads on after the folder's name.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError("is a folder without model_index.json")
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

    Raises:
        ValueError: keys that Stable Diffusion v1 does not have; the message lists them and reads on after the
            folder's name.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for part, (prefix, rename) in _RENAMERS.items():
        sizes = _count_blocks(parts[part])
        for key, tensor in parts[part].items():
            try:
                name = prefix + rename(key, sizes)
            except KeyError:
                unknown.append(f"{part}/{key}")
                continue
            is_linear = part == "vae" and tensor.ndim == 2 and _VAE_PROJECTION.search(name)
            renamed[name] = tensor[:, :, None, None] if is_linear else tensor
    if unknown:
        listing = ", ".join(unknown[:8]) + (", …" if len(unknown) > 8 else "")
        raise ValueError(f"has {len(unknown)} keys that Stable Diffusion v1 does not have: {listing}")
    return renamed


def _count_blocks(keys: Iterable[str]) -> Sizes:
    blocks = {match.groups()[:4] for match in map(_BLOCK.search, keys) if match}
    return Counter((side, int(level), kind) for side, level, kind, _ in blocks)


def _swap(key: str, table: Mapping[str, str]) -> str:
    """Rename the module of `module.weight` or `module.bias`; KeyError for one the table does not have."""
    module, _, parameter = key.rpartition(".")
    return f"{table[module]}.{parameter}"


def _unet_name(key: str, sizes: Sizes) -> str:
    if match := _MIDDLE.fullmatch(key):
        place, inner = match.groups()
        return f"{_UNET_MIDDLE[place]}.{_swap(inner, _UNET_RESNET) if place.startswith('resnets') else inner}"
    if not (match := _BLOCK.fullmatch(key)):
        return _swap(key, _UNET_OUTSIDE)
    side, level, kind, number, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down":  # block 0 is conv_in; each level holds its ResNet blocks, then its downsampler
        before = (sizes["down", i, "resnets"] + sizes["down", i, "downsamplers"] for i in range(level))
        stack, start, sampler = "input_blocks", 1 + sum(before), "op"
    else:
        stack, start, sampler = "output_blocks", sum(sizes["up", i, "resnets"] for i in range(level)), "conv"
    if kind == "resnets":
        return f"{stack}.{start + number}.0.{_swap(inner, _UNET_RESNET)}"
    if kind == "attentions":
        return f"{stack}.{start + number}.1.{inner}"
    last = start + sizes[side, level, "resnets"]
    if kind == "downsamplers":
        return f"{stack}.{last}.0.{_swap(inner, {'conv': sampler})}"
    # the upsampler sits in its level's last block, behind the attention where there is one
    place = 2 if sizes["up", level, "attentions"] else 1
    return f"{stack}.{last - 1}.{place}.{_swap(inner, {'conv': sampler})}"


def _vae_name(key: str, sizes: Sizes) -> str:
    if key.startswith(("quant_conv.", "post_quant_conv.")):
        return key
    half, _, inside = key.partition(".")
    if half not in ("encoder", "decoder"):
        raise KeyError(key)
    return f"{half}.{_vae_half_name(inside, sizes)}"


def _vae_half_name(key: str, sizes: Sizes) -> str:
    if match := _MIDDLE.fullmatch(key):
        place, inner = match.groups()
        table = _VAE_RESNET if place.startswith("resnets") else _VAE_ATTENTION
        return f"{_VAE_MIDDLE[place]}.{_swap(inner, table)}"
    if not (match := _BLOCK.fullmatch(key)):
        return _swap(key, _VAE_OUTSIDE)
    side, level, kind, number, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "up":  # CompVis counts the decoder's levels from the finest
        level = max(i for where, i, _ in sizes if where == "up") - level
    if kind == "resnets":
        return f"{side}.{level}.block.{number}.{_swap(inner, _VAE_RESNET)}"
    if kind == "attentions":
        return f"{side}.{level}.attn.{number}.{_swap(inner, _VAE_ATTENTION)}"
    return f"{side}.{level}.{side}sample.{inner}"


def _text_name(key: str, sizes: Sizes) -> str:
    name = key.removeprefix("text_model.")  # transformers 5 saves without it
    if not name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        raise KeyError(key)
    return name


_RENAMERS: dict[str, tuple[str, Callable[[str, Sizes], str]]] = {
    "unet": (UNET, _unet_name),
    "vae": (VAE, _vae_name),
    "text_encoder": (TEXT, _text_name),
}
