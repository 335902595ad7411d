"""Images: any file that Pillow reads to RGB, RGB to tensors and back, several to one.

Tensors are float32 (3, H, W) in [-1, 1]; H and W are pixels.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.files.kinds import foreign_kind, is_heic
from ldm.files.texts import no_file

logger = logging.getLogger(__name__)

Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
INTERPOLATIONS = {
    "linear": Image.Resampling.BILINEAR,  # the reference's name for it
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZES = ("squash", "crop", "pad")
LARGEST = 16384  # pixels of a side
_NOT_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # known to Pillow, which cannot read them by itself
# What is left of a mode without its transparency; the others are as they are.
_OPAQUE = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBa": "RGB", "LA": "L", "La": "L", "1": "L"}
_SAME = 2  # of 255: a profile that changes no value by more is sRGB's


class ImageError(ValueError):
    """A file that is not a usable image; the message names it, the cause and the remedy."""


def open_image(path: str | Path, background: Colour = WHITE) -> Image.Image:
    """Read an image file as 8-bit RGB, upright, the way an image viewer shows it.

    The EXIF orientation is applied, colour profiles are converted to sRGB, transparency is composited on
    `background`, 16-bit values are scaled to 8 bits, an animation gives its first frame.

    Raises:
        ImageError: the file is missing, is no image, is damaged, too large or of an unusual kind.
    """
    with _opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image), background)


def image_info(path: str | Path) -> dict[str, Any]:
    """Return what an image file says beside its pixels, such as the text chunks of a PNG; errors as of `open_image`."""
    with _opened(path) as image:
        return {str(key): value for key, value in image.info.items()}


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    path = Path(path).expanduser()
    if problem := no_file(path):  # a pipe would be waited for
        raise ImageError(f"{problem}; check the path.")
    try:
        with Image.open(path) as image:
            if image.format in _NOT_IMAGES:
                raise UnidentifiedImageError
            yield image
    # Decoders meet damaged files with whatever goes wrong in them: SyntaxError, struct.error, IndexError, …
    except Exception as error:
        raise ImageError(f"'{path}' {_reason(path, error)}.") from error


def _reason(path: Path, error: Exception) -> str:
    """Return what is wrong with a file that could not be read, and the remedy."""
    if isinstance(error, UnidentifiedImageError):
        if is_heic_file(path):
            return "is a HEIC image, which Pillow does not read; save it as PNG or JPEG"
        return foreign_kind(_head(path)) or "is no image that Pillow can read; save it as PNG or JPEG"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has too many pixels; scale it down first ({error})"
    remedy = "change its permissions" if isinstance(error, PermissionError) else "save it anew as PNG or JPEG"
    return f"cannot be read ({getattr(error, 'strerror', None) or error or type(error).__name__}); {remedy}"


def is_heic_file(path: str | Path) -> bool:
    """Return whether a file begins like an image of an iPhone, which Pillow does not read."""
    return is_heic(_head(path))


def _head(path: str | Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(512)


def is_image_file(path: str | Path) -> bool:
    """Return whether a file begins like an image; nothing is decoded.

    One that cannot be opened counts as an image, so that it is not passed over and `open_image` gives the reason.
    """
    try:
        with _opened(path):
            return True
    except ImageError as error:
        return not isinstance(error.__cause__, UnidentifiedImageError)


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """Return an image of any mode as 8-bit RGB in sRGB; see `open_image`.

    Raises:
        ValueError: its pixels are numbers of unknown range.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers of unknown range")
    if image.mode.startswith("I"):  # "I;16", "I;16B", …; Pillow also gives 16-bit images as 32-bit "I"
        return _from_16_bit(image, background)
    if image.info.get("icc_profile"):
        image = _in_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    return image.convert("RGB")


def _in_srgb(image: Image.Image) -> Image.Image:
    """Apply an image's colour profile; one that is sRGB's, or cannot be used, changes nothing."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    opaque = image.convert(_OPAQUE.get(image.mode, image.mode))
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        name = ImageCms.getProfileDescription(profile).strip()
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), opaque.mode, "RGB")
        converted = transform.apply(opaque)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        _tell(f"A colour profile could not be used for an image of mode {image.mode} ({error}); it is read as sRGB.")
        return image
    extrema = ImageChops.difference(converted, opaque.convert("RGB")).getextrema()  # (least, most) of each channel
    if np.max(extrema) <= _SAME:
        return image
    _tell(f"Images with the colour profile '{name}' are converted to sRGB.")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.cache
def _tell(message: str) -> None:
    """Log a warning, once for all images that it is true of."""
    logger.warning("%s", message)


def _from_16_bit(image: Image.Image, background: Colour) -> Image.Image:
    """Scale 0 … 65535 to 0 … 255, rounded; Pillow's own conversion clips everything above 255 to white."""
    if image.info.get("icc_profile"):
        _tell("The colour profiles of 16-bit images are not applied; their values are read as sRGB.")
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels are numbers from {values.min()} to {values.max()}, not 16-bit ones")
    pixels = np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    if isinstance(transparent := image.info.get("transparency"), int):
        pixels[values == transparent] = background
    return Image.fromarray(pixels)


def fit(
    image: Image.Image, width: int, height: int, resize: str = "squash", interpolation: str = "bicubic"
) -> Image.Image:
    """Bring an RGB image to width x height pixels.

    Args:
        resize: "squash" changes the proportions (the reference's way), "crop" cuts off what is too much on
            both sides, "pad" keeps everything and adds white on both sides.
        interpolation: one of `INTERPOLATIONS`.

    Raises:
        ValueError: unknown `resize` or `interpolation`, or a size that is out of range.
    """
    check_fit(width, height, resize, interpolation)
    method = INTERPOLATIONS[interpolation]
    if resize == "pad":
        return ImageOps.pad(image, (width, height), method=method, color=WHITE)
    if resize == "crop":
        image = _centre_crop(image, width / height)
    return image.resize((width, height), resample=method)


def check_fit(width: int, height: int, resize: str, interpolation: str) -> None:
    """Raise the `ValueError` of `fit` with these arguments."""
    if not (1 <= width <= LARGEST and 1 <= height <= LARGEST):
        limits = f"at least 1 x 1 pixels and at most {LARGEST} x {LARGEST}"
        raise ValueError(f"An image needs {limits}, not {width} x {height}.")
    for kind, name, known in (("resize", resize, RESIZES), ("interpolation", interpolation, INTERPOLATIONS)):
        if name not in known:
            raise ValueError(f"Unknown {kind} '{name}'; known: {', '.join(known)}.")


def _centre_crop(image: Image.Image, aspect: float) -> Image.Image:
    """Return the largest centred part with width / height = aspect, in whole pixels.

    For a square it is the part that the reference's `center_crop` takes.
    """
    width, height = image.size
    crop_width = max(1, min(width, round(height * aspect)))
    crop_height = max(1, min(height, round(width / aspect)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as float32 (3, H, W) in [-1, 1]: value / 127.5 - 1."""
    values = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
    return bytes_to_tensor(values.permute(2, 0, 1).contiguous())


def bytes_to_tensor(values: Tensor) -> Tensor:
    """Return uint8 0 … 255 as float32 in [-1, 1], any shape."""
    return values.to(torch.float32) / 127.5 - 1


def to_pil(tensor: Tensor) -> Image.Image:
    """Return a tensor (3, H, W) as an RGB image: clamped to [-1, 1] and rounded to the nearest of 256 values."""
    values = ((tensor.detach().cpu().to(torch.float32) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


def make_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Put images of one size side by side, row by row; places left over at the end are black.

    Args:
        columns: images in a row; default: a grid as square as possible, wider rather than higher.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(image.convert("RGB"), (column * width, row * height))
    return grid


def label_grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], columns: Sequence[str] = (), size: int = 14
) -> Image.Image:
    """Put rows of images below each other, with a label left of each row and above each column.

    Args:
        rows: images; a column is as wide as its widest, smaller ones stand at the upper left of their place.
        size: of the letters, in pixels.
    """
    widths = [max(image.width for image in column if image) for column in zip_longest(*rows)]
    height = max(image.height for row in rows for image in row)
    font, gap = ImageFont.load_default(size), size // 2
    widest = max(int(font.getlength(label)) for label in labels)
    left, top = min(widest, max(*widths, 8 * size)) + 2 * gap, 2 * size if columns else gap
    *starts, right = accumulate(widths, lambda x, width: x + width + gap, initial=left)
    sheet = Image.new("RGB", (right, top + len(rows) * (height + gap)), WHITE)
    draw = ImageDraw.Draw(sheet)
    for x, label in zip(starts, columns, strict=False):
        draw.text((x, gap), label, BLACK, font)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + number * (height + gap)
        lines = _wrapped(label, left - 2 * gap, font)[: max(1, height // (size + 4))]
        draw.multiline_text((gap, y), "\n".join(lines), BLACK, font)
        for x, image in zip(starts, row, strict=False):
            sheet.paste(image.convert("RGB"), (x, y))
    return sheet


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """Return a text in lines of at most `width` pixels, a longer word in a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
