"""Parameters of an image in the text chunks of its PNG file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.export.infotext import NEEDED, infotext
from ldm.files.images import image_info
from ldm.files.writing import replacing

PNG_KEY = "prospect"  # name of the PNG text chunk that holds the parameters


def save_png(image: Image.Image, path: str | Path, texts: Mapping[str, str]) -> None:
    """Save an image as PNG with text chunks.

    Raises:
        ValueError: the file is not called .png, the one format that keeps the texts.
        WriteError: no room or no right; nothing is left then.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise ValueError(f"'{path}' must end in .png, which keeps what repeats the image.")
    info = PngInfo()
    for name, text in texts.items():
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files need not be UTF-8
        if name == PNG_KEY:
            info.add_itxt(name, text)
        else:
            info.add_text(name, text)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_picture(image: Image.Image, path: str | Path) -> None:
    """Save as PNG with the parameters that `main` attached in a text chunk, readable with `read_parameters`.

    A second chunk, `parameters`, says it the way AUTOMATIC1111's web UI does, for other tools.

    Raises:
        ValueError: the file is not called .png, the one format that keeps the parameters.
        WriteError: no room or no right; nothing is left then.
    """
    texts = {PNG_KEY: image.info[PNG_KEY]} if PNG_KEY in image.info else {}
    record = json.loads(texts.get(PNG_KEY, "{}"))
    if record.keys() >= NEEDED:
        texts["parameters"] = infotext(record)
    save_png(image, path, texts)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Return the parameters that `save_picture` wrote into a PNG.

    Raises:
        ValueError: the image has none, or is none.
    """
    info = image_info(Path(path).expanduser())
    try:
        parameters = json.loads(str(info.get(PNG_KEY)))
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        what = "readable ProSpect parameters" if PNG_KEY in info else "ProSpect parameters"
        raise ValueError(f"'{path}' has no {what}; only PNG files saved by this program do.")
    return parameters
