"""Networks that turn images and texts into features of one space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluation.networks.clip import CLIP
from ldm.checkpoint import load_weights, read_state_dict
from ldm.config import load_config
from ldm.files.shipped import shipped

if TYPE_CHECKING:
    from transformers import CLIPModel

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
SMALL = "configs/demo/text.yaml", "models/demo/clip.safetensors", "models/demo/model.safetensors"


@dataclass(frozen=True)
class Backbone:
    """A network that images and texts are compared by; features need not be of length 1."""

    name: str  # for the report, as is the next: without them a score means nothing
    preprocessing: str
    prepare: Callable[[Image.Image], Tensor]  # an RGB image -> its pixels (3, R, R)
    encode_image: Callable[[Tensor], Tensor]  # pixels (B, 3, R, R) -> features (B, D)
    encode_text: Callable[[Sequence[str]], Tensor]  # B texts -> features (B, D)

    def image_features(self, images: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Return features (N, D) of N images, each prepared alone."""
        parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return torch.cat([self.encode_image(torch.stack([self.prepare(image) for image in part])) for part in parts])


def clip_pixels(image: Image.Image, antialias: bool = True, side: int = 224) -> Tensor:
    """Return what CLIP reads of an image (3, side, side): shorter side resized, bicubic, and the middle cut out.

    The steps and their order are those of OpenAI's preprocessing: transparency is dropped after the resize, so give
    it a background before.

    Args:
        antialias: False as Textual Inversion's evaluator with an older torchvision, which resized tensors without.
    """
    width, height = (int(side * edge / min(image.size)) for edge in image.size)
    if antialias:
        resized = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
        x = _values(resized)
    else:
        x = F.interpolate(_values(image)[None], size=(height, width), mode="bicubic", antialias=False)[0]
    top, left = round((height - side) / 2.0), round((width - side) / 2.0)
    x = x[:, top : top + side, left : left + side]
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _values(image: Image.Image) -> Tensor:
    """Return an image as RGB (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def open_clip_folder(folder: str | Path) -> CLIPModel:
    """Return transformers' CLIP from a folder on this machine, in float32.

    Raises:
        ValueError: there is none.
    """
    from transformers import CLIPModel

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"There is no CLIP model in '{folder}'; give a folder with its config.json and .safetensors.")
    model = CLIPModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def clip_backbone(folder: str | Path, antialias: bool = True) -> Backbone:
    """Return OpenAI's CLIP, or another one of that form, from a folder with its weights and tokenizer.

    Raises:
        ValueError: the folder holds no CLIP, or, later, a text is longer than its positions.
    """
    from transformers import CLIPTokenizer

    model: Any = open_clip_folder(folder)
    tokenizer: Any = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    side, longest = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def encode_text(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        if tokens["input_ids"].shape[1] > longest:
            raise ValueError(f"'{max(texts, key=len):.60}…' has more than {longest} tokens; shorten it.")
        return projected(model.get_text_features(**tokens))

    resize = f"PIL RGB, shorter side {side} bicubic, centre crop" + ("" if antialias else ", no antialiasing")
    return Backbone(
        name=f"CLIP {Path(folder).name}",
        preprocessing=f"{resize}, CLIP mean and std",
        prepare=lambda image: clip_pixels(image, antialias, side),
        encode_image=lambda pixels: projected(model.get_image_features(pixel_values=pixels)),
        encode_text=encode_text,
    )


def projected(features: Any) -> Tensor:
    """Return the projected features, which newer transformers wrap."""
    return getattr(features, "pooler_output", features)


def small_backbone() -> Backbone:
    """Return the contrastive towers that the small model's text transformer was trained in.

    They know the words of the rendered world only; scores by them compare with nothing that is published.
    """
    config, weights, model = map(shipped, SMALL)
    params = load_config(config).model.params
    towers: Any = CLIP(**params).eval().requires_grad_(False)
    text = {name: x for name, x in read_state_dict(model).items() if name.startswith("cond_stage_model.")}
    load_weights(towers, {name: x.float() for name, x in (text | dict(read_state_dict(weights))).items()}, weights)

    def prepare(image: Image.Image) -> Tensor:
        return _values(image.resize((params.resolution,) * 2, Image.Resampling.BOX)) * 2 - 1

    return Backbone(
        name=f"the small model's towers ({Path(weights).name}; no CLIP, of the rendered world only)",
        preprocessing=f"PIL RGB, squashed to {params.resolution} by averaging, [-1, 1]",
        prepare=prepare,
        encode_image=towers.encode_image,
        encode_text=towers.encode_text,
    )
