"""How a picture was made, written into its PNG file and read from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.export.infotext import NEEDED, infotext
from ldm.files.images import picture_info
from ldm.files.writing import replacing, writing_to

PNG_KEY = "prospect"  # name of the PNG text chunk that holds the parameters


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Save as PNG with the parameters that `main` attached in a text chunk, readable with `read_parameters`.

    A second chunk, `parameters`, says it the way AUTOMATIC1111's web UI does, for other tools.

    Raises:
        ValueError: the file is not called .png, the one format that keeps the parameters.
        WriteError: no room or no right; nothing is left then.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"'{path}' must end in .png, which keeps what repeats the picture.")
    info = PngInfo()
    if PNG_KEY in picture.info:
        info.add_itxt(PNG_KEY, picture.info[PNG_KEY])
        record = json.loads(picture.info[PNG_KEY])
        if record.keys() >= NEEDED:
            info.add_text("parameters", infotext(record))
    path = Path(path)
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The parameters that `save_picture` wrote into a PNG.

    Raises:
        ValueError: the picture has none, or is none.
    """
    info = picture_info(path)
    if PNG_KEY not in info:
        raise ValueError(f"'{path}' has no ProSpect parameters; only PNG files saved by this program do.")
    try:
        parameters = json.loads(info[PNG_KEY])
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(f"'{path}' has no readable ProSpect parameters; use another copy of it.")
    return parameters
