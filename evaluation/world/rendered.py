"""The rendered world as images, and as a data set of captioned images that are drawn when they are asked for.

Palette and textures are muted, so that a diffusion model has to decide them late, after layout and shape: that order
is this world's by construction.

Shapes: N images, F factors in the order of `FACTORS`, R pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from evaluation.world import shapes
from evaluation.world.attributes import FACTORS, RESOLUTION, caption, random_attributes
from evaluation.world.shapes import CENTRES, srgb

CROP = RESOLUTION // 2  # pixels a side
CHUNK_PIXELS = 1 << 16  # images drawn at a time: few enough to stay in the processor's cache


def render(attributes: Tensor, seeds: Sequence[int] | Tensor, resolution: int = RESOLUTION) -> Tensor:
    """Draw images, float32 (N, 3, R, R) in [-1, 1], sRGB, of attributes (N, F).

    Exact place, size, angle, texture phase and hue vary a little with the seed. Image n depends on its own row and
    seed only, not on the batch.
    """
    seeds = torch.as_tensor(seeds, dtype=torch.long)
    step = max(1, CHUNK_PIXELS // resolution**2)
    chunks = [_render(attributes[i : i + step], seeds[i : i + step], resolution) for i in range(0, len(seeds), step)]
    return torch.cat(chunks) if chunks else torch.empty(0, 3, resolution, resolution)


def _render(attributes: Tensor, seeds: Tensor, resolution: int) -> Tensor:
    """Draw one chunk.

    The numbers of each image are doubles, rounded to float before they meet the pixels: the last bit of a
    vectorised cosine or power depends on its place in the batch.
    """
    position, size, shape, texture, colour, background = attributes.unbind(1)
    jitter = _uniform(seeds, 10)  # (N, 10) in [-1, 1)
    centre = _table(CENTRES)[position] + 0.035 * jitter[:, 0:2]
    radius = _table(shapes.RADII)[size] * (1 + 0.05 * jitter[:, 2])
    angle = 0.12 * jitter[:, 3]

    # The object's coordinates: shift, turn, divide by the radius.
    axis = (torch.arange(resolution) + 0.5) * (2 / resolution) - 1
    dx, dy = axis[None, None, :] - _column(centre[:, 0]), -axis[None, :, None] - _column(centre[:, 1])
    cos, sin = _column(angle.cos() / radius), _column(angle.sin() / radius)
    x, y = dx * cos + dy * sin, dy * cos - dx * sin  # (N, R, R)
    pixel = _column((2 / resolution) / radius)
    # Larger objects have a slightly larger texture. A period is 7 to 9 of 64 pixels.
    period = _column((0.12 + 0.30 * radius) / radius * (1 + 0.05 * jitter[:, 4]))
    shift = 0.15 * period
    shifted = x + shift * _column(jitter[:, 5]), y + shift * _column(jitter[:, 6])
    tone = shapes.apply_by_number(shapes.TEXTURES.values(), texture, *shifted, period, pixel)
    outline = shapes.apply_by_number(shapes.OUTLINES.values(), shape, x, y)
    inside = (0.5 - outline / pixel).clamp_(0, 1)

    lightness, chroma, hue = _table(shapes.COLOURS)[colour].unbind(1)
    lightness, hue = lightness + 0.01 * jitter[:, 7], hue.deg2rad() + 0.06 * jitter[:, 8]
    dark = srgb(lightness - shapes.TEXTURE_CONTRAST / 2, chroma, hue)
    light = srgb(lightness + shapes.TEXTURE_CONTRAST / 2, chroma, hue)
    lightness, chroma, hue = _table(shapes.BACKGROUNDS)[background].unbind(1)
    ground = srgb(lightness + 0.01 * jitter[:, 9], chroma, hue.deg2rad())
    dark, light, ground = (rgb.float()[:, :, None, None] for rgb in (dark, light, ground))
    painted = dark + (light - dark) * tone[:, None]  # (N, 3, R, R)
    return ground + (painted - ground) * inside[:, None]


def _uniform(seeds: Tensor, count: int) -> Tensor:
    """Return uniform numbers in [-1, 1), double (N, count); row n depends on seeds[n] only (splitmix64 counters)."""
    x = (seeds.long()[:, None] * count + torch.arange(1, count + 1)) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return (x & 0xFFFFFF).double() / (1 << 23) - 1


def _table(values: Mapping[str, float] | Mapping[str, tuple[float, ...]]) -> Tensor:
    return torch.tensor(list(values.values()), dtype=torch.double)


def _column(values: Tensor) -> Tensor:
    return values.float()[:, None, None]  # (N, 1, 1)


@dataclass(eq=False, repr=False)
class RenderedWorld(Dataset):
    """Captioned images, drawn when they are asked for.

    Sample numbers run on past the length: epoch n // size shows all images in a fixed order of its own, and the
    omissions and errors of sample n's caption are a function of (seed, n) only. With `with_images` set to False
    the samples come without images.
    """

    size: int = 50000  # number of different images
    seed: int = 0  # chooses attributes, images, order and captions
    resolution: int = RESOLUTION  # R
    held_out: bool | None = False  # only held-out (shape, texture, colour) triples (True), only others, or all (None)
    empty: float = 0.1  # probability that the whole caption is empty
    drop: float = 0.1  # of omitted words, see `caption`
    wrong: float = 0.0  # of wrong words, see `caption`
    errors_from: int = 0  # sample number from which captions have omissions and errors
    crop_until: int = 0  # samples before this number show only CROP x CROP pixels around the object

    flips = False  # left and right have a meaning
    in_memory = True

    def __post_init__(self) -> None:
        chances = (self.empty, self.drop, self.wrong)
        if self.size < 1 or min(self.seed, *chances) < 0 or max(chances) > 1:
            raise ValueError("need size >= 1, seed >= 0, and probabilities empty, drop, wrong in 0..1")
        self.num_images, self.with_images = self.size, True
        self.attributes = random_attributes(self.size, self.seed, self.held_out)  # long (size, F)

    def __len__(self) -> int:
        return self.size

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return images, float32 (N, 3, R, R) in [-1, 1], for N image numbers below `size`."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return render(self.attributes[indices], (self.seed << 32) + indices, self.resolution)

    def image(self, i: int, flipped: bool = False) -> Tensor:
        """Return image number i, float32 (3, R, R) in [-1, 1], never flipped (see `flips`)."""
        return self.images([i])[0]

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample n >= 0: image float32 (R, R, 3) in [-1, 1], attributes (F,), caption, image_number, flipped."""
        return self.__getitems__([n])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return several samples at once, as `DataLoader` asks for them: the images are drawn together."""
        samples = [self._captioned(n) for n in numbers]
        if self.with_images:
            for sample, image in zip(samples, self.images([sample["image_number"] for sample in samples]), strict=True):
                sample["image"] = self._view(sample["sample"], sample["image_number"], image)
        return samples

    def _captioned(self, n: int) -> dict[str, Any]:
        """Return sample n without its image."""
        epoch, place = divmod(n, self.size)
        i = int(_order(self.seed, epoch, self.size)[place])
        rng = np.random.default_rng((self.seed, n, 1))
        errors = (self.drop, self.wrong) if n >= self.errors_from else (0.0, 0.0)
        text = "" if rng.random() < self.empty else caption(self.attributes[i], rng, *errors)
        return {"caption": text, "image_number": i, "flipped": False, "sample": n, "attributes": self.attributes[i]}

    def _view(self, n: int, i: int, image: Tensor) -> Tensor:
        """Return what sample n shows of image i (3, R, R): all of it, or a part around the object; (·, ·, 3)."""
        if n < self.crop_until:
            x, y = CENTRES[FACTORS["position"][self.attributes[i, 0]]]
            middle = np.array([(1 - y) / 2, (1 + x) / 2]) * self.resolution  # row, column
            shift = np.random.default_rng((self.seed, n, 2)).uniform(-0.25, 0.25, 2) * CROP
            top, left = np.clip(middle + shift - CROP / 2, 0, self.resolution - CROP).astype(int)
            image = image[:, top : top + CROP, left : left + CROP]
        return image.permute(1, 2, 0).contiguous()


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order in which an epoch shows the images."""
    return np.random.default_rng((seed, epoch)).permutation(size)
