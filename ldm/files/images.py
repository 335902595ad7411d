"""Pictures: any file that Pillow reads to RGB, RGB to tensors and back, several to one.

Tensors are float32 (3, H, W) in [-1, 1]; H and W are pixels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

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


class ImageError(ValueError):
    """A file that is not a usable picture; the message names it, the cause and the remedy."""


def open_image(path: str | Path, background: Colour = WHITE) -> Image.Image:
    """The picture in a file as 8-bit RGB, upright, the way an image viewer shows it.

    The EXIF orientation is applied, transparency is composited on `background`, 16-bit values are scaled to 8
    bits, an animation gives its first frame. Colour profiles are not applied.

    Raises:
        ImageError: the file is missing, is no picture, is damaged, too large or of an unusual kind.
    """
    with _opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image), background)


def picture_info(path: str | Path) -> dict[str, object]:
    """What a picture file says beside its pixels, such as the text chunks of a PNG; errors as of `open_image`."""
    with _opened(path) as image:
        return dict(image.info)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"There is no file '{path}'; check the path.") from error
    except IsADirectoryError as error:
        raise ImageError(f"'{path}' is a folder; give one picture file.") from error
    except PermissionError as error:
        raise ImageError(f"'{path}' may not be read ({error.strerror}); change its permissions.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"'{path}' is no picture that Pillow can read; save it as PNG or JPEG.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"'{path}' has too many pixels; scale it down first ({error}).") from error
    # Decoders meet damaged files with whatever goes wrong in them: SyntaxError, struct.error, IndexError, …
    except Exception as error:
        cause = str(error) or type(error).__name__
        raise ImageError(f"'{path}' cannot be read ({cause}); save it anew as PNG or JPEG.") from error


def is_picture(path: str | Path) -> bool:
    """Whether the file's beginning is that of a picture; nothing is decoded.

    A file that may not be read counts as one, so that `open_image` says so and it is not passed over.
    """
    try:
        with Image.open(path):
            return True
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, PermissionError):
        return True  # a picture, which `open_image` then refuses with its reason
    except Exception:
        return False


def to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16", "I;16B", …; Pillow also gives 16-bit pictures as 32-bit "I"
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """0 … 65535 to 0 … 255, rounded; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels are numbers from {values.min()} to {values.max()}, not 16-bit ones")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def fit(
    image: Image.Image,
    width: int,
    height: int,
    resize: str = "squash",
    interpolation: str = "bicubic",
    background: Colour = WHITE,
) -> Image.Image:
    """An RGB picture brought to width x height pixels.

    Args:
        resize: "squash" changes the proportions (the reference's way), "crop" cuts off what is too much on
            both sides, "pad" keeps everything and fills up with `background` on both sides.
        interpolation: one of `INTERPOLATIONS`.

    Raises:
        ValueError: unknown `resize` or `interpolation`, or a size below 1.
    """
    method = check_fit(width, height, resize, interpolation)
    if resize == "pad":
        return ImageOps.pad(image, (width, height), method=method, color=background)
    if resize == "crop":
        image = _centre_crop(image, width / height)
    return image.resize((width, height), resample=method)


def check_fit(width: int, height: int, resize: str, interpolation: str) -> Image.Resampling:
    """Pillow's name of the filter, or the `ValueError` that `fit` raises with these arguments."""
    if width < 1 or height < 1:
        raise ValueError(f"A picture needs at least 1 x 1 pixels, not {width} x {height}.")
    if resize not in RESIZES:
        raise ValueError(f"Unknown resize '{resize}'; known: {', '.join(RESIZES)}.")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"Unknown interpolation '{interpolation}'; known: {', '.join(INTERPOLATIONS)}.")
    return INTERPOLATIONS[interpolation]


def _centre_crop(image: Image.Image, aspect: float) -> Image.Image:
    """The largest centred part with width / height = aspect, in whole pixels.

    For a square it is the part that the reference's `center_crop` takes.
    """
    width, height = image.size
    crop_width = max(1, min(width, round(height * aspect)))
    crop_height = max(1, min(height, round(width / aspect)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 (3, H, W) in [-1, 1]: value / 127.5 - 1."""
    values = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
    return bytes_to_tensor(values.permute(2, 0, 1).contiguous())


def bytes_to_tensor(values: Tensor) -> Tensor:
    """uint8 0 … 255 to float32 in [-1, 1], any shape."""
    return values.to(torch.float32) / 127.5 - 1


def to_pil(tensor: Tensor) -> Image.Image:
    """A tensor (3, H, W) as an RGB picture: clamped to [-1, 1] and rounded to the nearest of 256 values.

    Raises:
        ValueError: another shape.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"A picture is a tensor (3, H, W), not {tuple(tensor.shape)}.")
    values = ((tensor.detach().cpu().to(torch.float32) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


def make_grid(
    pictures: Sequence[Image.Image],
    columns: int | None = None,
    padding: int = 0,
    background: Colour = BLACK,
) -> Image.Image:
    """Pictures of one size side by side, row by row; places left over at the end are `background`.

    Args:
        columns: pictures in a row; default: a grid as square as possible, wider rather than higher.
        padding: pixels between two pictures.

    Raises:
        ValueError: no pictures, pictures of different sizes, or columns below 1.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"A grid needs pictures of one size, not {sorted(sizes) or 'none'}.")
    if columns is None:
        columns = math.ceil(math.sqrt(len(pictures)))
    if columns < 1:
        raise ValueError(f"A grid needs at least 1 column, not {columns}.")
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = (side + padding for side in sizes.pop())
    grid = Image.new("RGB", (columns * width - padding, rows * height - padding), background)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        grid.paste(picture.convert("RGB"), (column * width, row * height))
    return grid
