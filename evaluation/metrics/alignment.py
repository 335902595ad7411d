"""CLIP alignment as Textual Inversion, NeTI and CatVersion compute it: raw cosines, no factor of 2.5, no clamping.

Shapes: N references, M generated images, D width of the features.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional import pairwise_cosine_similarity

from evaluation.metrics.backbones import Backbone

logger = logging.getLogger(__name__)

BACKGROUNDS = {"black": (0, 0, 0), "mean": (123, 116, 104)}  # RGB; the second is CLIP's mean


@torch.no_grad()
def alignment(
    backbone: Backbone, references: Sequence[Image.Image], generated: Sequence[Image.Image], text: str
) -> dict[str, Tensor]:
    """Return `image`, cosines (N, M) of all pairs of RGB images, and `text`, cosines (M,) with the text."""
    made = backbone.image_features(generated)
    return {
        "image": pairwise_cosine_similarity(backbone.image_features(references), made, zero_diagonal=False),
        "text": pairwise_cosine_similarity(made, backbone.encode_text([text]), zero_diagonal=False)[:, 0],
    }


def geometric_mean(text: float, image: float) -> float:
    """Return the square root of text · image (CatVersion's overall score); NaN where one of them is negative."""
    return math.sqrt(text * image) if text >= 0 and image >= 0 else math.nan


def without_placeholder(prompt: str, placeholder: str = "*", keep_blanks: bool = False) -> str:
    """Return what a prompt says beside the concept: Textual Inversion's evaluator removes the placeholder.

    Args:
        keep_blanks: as it does: 'a photo of *' becomes 'a photo of ' with a blank at its end.
    """
    text = prompt.replace("{}", placeholder).replace(placeholder, "")
    return text if keep_blanks else re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", text)).strip()


def cut_out(image: Image.Image, mask: Image.Image, background: str = "black") -> Image.Image:
    """Return an RGB image whose pixels outside its mask (those of value 0) are `background`."""
    inside = mask.convert("L").point(lambda value: 255 if value else 0)
    if inside.getextrema()[1] == 0:
        logger.warning("A mask is empty; its image is compared as %s alone, which is like any other such.", background)
    return Image.composite(image, Image.new("RGB", image.size, BACKGROUNDS[background]), inside)


def masked_alignment(
    backbone: Backbone,
    references: Mapping[str, Image.Image],
    generated: Mapping[str, Image.Image],
    masks: Mapping[str, Image.Image],
    text: str,
    background: str = "black",
) -> dict[str, Tensor]:
    """Return `alignment` of images without their backgrounds, in both sets.

    Args:
        references, generated: by name, each with a mask of that name.

    Raises:
        ValueError: masks are missing, all of which are named, or have another size.
    """
    if missing := [name for name in (*references, *generated) if name not in masks]:
        raise ValueError(f"There are no masks for {', '.join(missing)}; a score without them would be another one.")
    for name, image in (*references.items(), *generated.items()):
        if image.size != masks[name].size:
            sizes = f"the image has {image.size} pixels and its mask {masks[name].size}"
            raise ValueError(f"'{name}': {sizes}; make the mask at its size.")
    one, two = (
        [cut_out(image, masks[name], background) for name, image in images.items()]
        for images in (references, generated)
    )
    return alignment(backbone, one, two, text)
