"""From requests to image files: single images, grids, and how the files are called."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.files.shipped import name_of
from ldm.files.texts import file_name
from ldm.files.writing import writing_to
from ldm.request import PLACEHOLDER, Request

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.latent_diffusion import DiffusionModel

logger = logging.getLogger(__name__)

TEXTS = ("prompt", "prospect_words", "preset")
Layout = tuple[str, str, str]
OWN_LAYOUT: Layout = ("{stem}-{seed}", "{stem}-{seed}-grid", ".png")
# Where other programs leave an image and its grid: templates of paths, and the format.
LAYOUTS = {
    "neti": ("{prompt}/{seed}{truncated}", "{prompt}{truncated}", ".png"),
    "catversion": ("{dashed}/{dashed}_{seed}", "{dashed}/{dashed}", ".jpg"),
}


@dataclass(frozen=True)
class Drawing:
    """What makes image files of requests.

    Args:
        recorded: the record of the image that is repeated; empty without one.
        setup: configuration, checkpoint and precision of the model, for the records.
        folder: where the files go.
        layout: how they are called.
    """

    model: DiffusionModel
    recorded: Mapping[str, Any]
    setup: Mapping[str, str]
    folder: Path
    layout: Layout = OWN_LAYOUT

    def draw(self, request: Request, with_grid: bool = True) -> list[Path]:
        """Generate what a request asks for and write it; a grid of its images is the first of the files.

        Raises:
            KeyboardInterrupt: Ctrl-C, with a sentence where some batches are finished; these are written.
        """
        from ldm.generate import Interrupted, generate_image

        single, grid, suffix = self.layout
        place = (self.recorded, self.setup, self.folder, (single, grid if with_grid else "", suffix))
        try:
            image = generate_image(request, self.model)
        except Interrupted as stop:
            paths = save_images(stop.image, *place)
            kept = "is kept" if len(paths) == 1 else f"and the {len(paths) - 1} images in it are kept"
            raise KeyboardInterrupt(f"stopped by Ctrl-C; what was finished, '{paths[0]}', {kept}") from stop
        return save_images(image, *place)

    def draw_grouped(self, requests: Sequence[Request]) -> list[Path]:
        """Write the images of all requests, and a grid of those whose grid has the same name in the layout.

        Returns:
            The grids, then the single images.
        """
        from PIL import Image

        from ldm.files.images import make_grid

        _, grid, suffix = self.layout
        groups: dict[str, list[Path]] = {}
        for request in requests:
            paths = self.draw(request, with_grid=False)
            groups.setdefault(grid.format(**_names(_record(paths[0]))), []).extend(paths)
        grids = []
        for name, paths in groups.items():
            record = {"cells": [[path.relative_to(self.folder).as_posix() for path in paths]]}
            grids.append(_write(make_grid([Image.open(path) for path in paths]), self.folder / name, suffix, record))
        return [*grids, *chain.from_iterable(groups.values())]

    def draw_sheet(self, rows: Sequence[Request], columns: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Write an image for each row and column, and a labelled grid, which is the first of the files."""
        from PIL import Image

        from ldm.files.images import label_grid

        written: list[list[list[Path]]] = []
        for row in rows:
            written.append([])
            for column in columns:
                written[-1].append(self._cell(replace(row, **column), sum(map(len, written))))
        cells = [[paths[0] for paths in row] for row in written]
        names = [f"{row.prompt} ({row.preset})" if row.preset else row.prompt or "no prompt" for row in rows]
        heads = [", ".join(f"{name} {value}" for name, value in column.items()) for column in columns]
        grid = label_grid([[Image.open(path) for path in row] for row in cells], names, heads if any(heads) else [])
        stem = f"{_stem(_record(cells[0][0]))}-{'prompts' if len(rows) > 1 else 'seeds'}"
        record = {"cells": [[path.name for path in row] for row in cells]}
        return [_write(grid, self.folder / stem, ".png", record), *chain.from_iterable(chain.from_iterable(written))]

    def _cell(self, request: Request, done: int) -> list[Path]:
        try:
            return self.draw(request)
        except KeyboardInterrupt as stop:
            if not done or str(stop):
                raise
            raise KeyboardInterrupt(f"stopped by Ctrl-C; {done} images in '{self.folder}' are kept") from stop


def _record(file: Path) -> dict[str, Any]:
    from PIL import Image

    from ldm.files.records import PNG_KEY

    return json.loads(Image.open(file).info[PNG_KEY])


def save_images(
    image: Image.Image,
    repeated: Mapping[str, Any],
    setup: Mapping[str, str],
    folder: Path,
    layout: Layout = OWN_LAYOUT,
) -> list[Path]:
    """Write the image, or a grid and its single images, each with what repeats it."""
    from ldm.files.records import PNG_KEY

    record = json.loads(image.info[PNG_KEY])
    _warn_of_changes(repeated, record)
    if repeated.get("preset") and "preset" not in record and all(record[n] == repeated.get(n) for n in TEXTS[:2]):
        record |= {key: value for key, value in repeated.items() if key.startswith("preset")}
    record |= {name: name_of(value) for name, value in setup.items()}
    single, grid, suffix = layout
    height, width, seed = record["height"], record["width"], record["seed"]
    names = _names(record)
    count = record["n_iter"] * record["n_samples"]
    written: list[Path] = []
    if grid and (count > 1 or layout != OWN_LAYOUT):
        written = [_write(image, folder / grid.format(seed=seed, **names), suffix, record)]
    for i in range(count):
        row, column = divmod(i, image.width // width)
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        alone = record | {"seed": seed + i, "n_iter": 1, "n_samples": 1, "n_rows": 0}
        file = folder / single.format(seed=seed + i, **names)
        written.append(_write(image.crop(box), file, suffix, record if count == 1 else alone))
    return written


def _warn_of_changes(repeated: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Warn where files of the image of `--from` are others now."""
    was, is_now = repeated.get("concept_hashes"), record["concept_hashes"]
    if isinstance(was, Mapping) and isinstance(repeated.get("concepts"), Mapping):
        for name, file in record["concepts"].items():
            if repeated["concepts"].get(name) == file and name in was and was[name] != is_now.get(name):
                logger.warning(
                    "The concept '%s' (%s) is another file than the one that the image was made with.", name, file
                )
    content, was = record["content_dir"], repeated.get("content_hash")
    if content and was and content == repeated.get("content_dir") and was != record["content_hash"]:
        logger.warning("The content image '%s' is another than the one that was edited.", content)


def _stem(record: Mapping[str, Any]) -> str:
    """A file name for an image: of its prompt, its preset and its truncation."""
    words = next((word for word in record["prospect_words"] or [] if isinstance(word, str)), "")
    name = re.sub(r"\W+", "-", record["prompt"].replace(PLACEHOLDER, words))[:40].strip("-") or "image"
    if (preset := record.get("preset")) and isinstance(preset, str):
        name = f"{name}-{re.sub(r'[^a-z]+', '-', preset)}"
    return name if record.get("truncation") is None else f"{name}-truncation-{record['truncation']}"


def _names(record: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the templates of a layout."""
    prompt, truncation = record["prompt"], record.get("truncation")
    truncated = "" if truncation is None else f"_truncation_{truncation}"
    kept = r'[/\\<>:"|?*\x00-\x1f]|[. ]+$' if os.name == "nt" else r"[/\x00-\x1f\x7f]"
    names = {"stem": _stem(record), "truncated": truncated}
    return names | {"dashed": file_name(prompt, r"[\s/\\:\x00-\x1f\x7f]"), "prompt": file_name(prompt, kept)}


def _write(image: Image.Image, path: Path, suffix: str, record: Mapping[str, Any]) -> Path:
    from ldm.files.writing import replacing
    from ldm.generate import PNG_KEY, save_picture

    image.info[PNG_KEY] = json.dumps(record)
    file = new_file(path, suffix)
    try:
        if suffix == ".png":
            save_picture(image, file)
        else:
            with replacing(file) as temporary:
                image.save(temporary, format="JPEG")
    except BaseException:  # Ctrl-C, too
        file.unlink(missing_ok=True)
        raise
    return file


def new_file(path: Path, suffix: str = ".png") -> Path:
    """An empty file made at `path` with the suffix, or with the first free number before it."""
    number = 1
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.with_name(f"{path.name}{suffix}" if number == 1 else f"{path.name}-{number}{suffix}")
            try:
                file.touch(exist_ok=False)  # so that two programs at once do not take the same name
                return file
            except FileExistsError:
                number += 1
