"""An image as editing needs it: latents, and the features that learned values are a function of.

Shapes: H W in pixels, T tokens of features, D width of the text transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.files.images import to_tensor
from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.models.first_stage import mode_of

SIDE, PATCHES = 224, 14  # pixels of a side, and patches, of CLIP's ViT-B/16
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
def image_latents(model: DiffusionModel, image: Image.Image) -> Tensor:
    """Return the scaled latents (1, C, H/f, W/f) of an RGB image: the mean of the posterior, nothing drawn."""
    return model.scale_factor * mode_of(model.encode_first_stage(to_tensor(image).unsqueeze(0)))


def psnr(found: Tensor, expected: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return float(10 * torch.log10(4 / (found.clamp(-1, 1) - expected).square().mean()))


def clip_input(image: Image.Image) -> Tensor:
    """Return (1, 3, 224, 224), normalised for CLIP: bicubic without antialiasing, as the reference's, and cropped."""
    x = to_tensor(image)[None] / 2 + 0.5
    height, width = x.shape[-2:]
    scale = SIDE / min(height, width)
    size = (max(SIDE, int(height * scale)), max(SIDE, int(width * scale)))
    x = F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=False)
    top, left = (round((side - SIDE) / 2) for side in size)
    x = x[..., top : top + SIDE, left : left + SIDE]
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


@torch.no_grad()
def clip_features(image: Image.Image, folder: str | Path) -> Tensor:
    """Return E(x), (1, 197, 768): all tokens of CLIP's ViT-B/16 behind its last norm, without the projection.

    Args:
        folder: of transformers' CLIP model, with its config.json and .safetensors.

    Raises:
        ValueError: there is none.
    """
    from transformers import CLIPVisionModel

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"There is no CLIP model in '{folder}'; give a folder with its config.json and .safetensors.")
    tower = CLIPVisionModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval()
    return tower_features(tower, clip_input(image))


def tower_features(tower: Any, pixels: Tensor) -> Tensor:
    """Return all tokens (1, T, D) of transformers' `CLIPVisionModel`, normalised as the class token is."""
    vision = getattr(tower, "vision_model", tower)
    return vision.post_layernorm(tower(pixel_values=pixels).last_hidden_state)


@torch.no_grad()
def patch_features(image: Image.Image, width: int) -> Tensor:
    """Return features (1, 197, D) where there is no CLIP: 14² patches and their mean, projected and normalised.

    The projection is drawn once and for all, from seed 0.
    """
    x = F.interpolate(to_tensor(image)[None], size=(SIDE, SIDE), mode="bicubic", antialias=True)
    patches = F.unfold(x, SIDE // PATCHES, stride=SIDE // PATCHES).transpose(1, 2)  # (1, 196, 768)
    projection = torch.randn(patches.shape[-1], width, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1) @ projection
    return F.layer_norm(tokens, (width,))
