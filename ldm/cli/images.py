"""From requests to image files: single images, grids, and how the files are called."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.files.shipped import name_of
from ldm.files.texts import file_name
from ldm.files.writing import writing_to
from ldm.request import PLACEHOLDER, Request

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.latent_diffusion import DiffusionModel

logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Templates of the paths of an image and its grid, and the format."""

    single: str
    grid: str
    suffix: str = ".png"


OWN_LAYOUT = Layout("{stem}-{seed}", "{stem}-{seed}-grid")
LAYOUTS = {
    "neti": Layout("{prompt}/{seed}{truncated}", "{prompt}{truncated}"),
    "catversion": Layout("{dashed}/{dashed}_{seed}", "{dashed}/{dashed}", ".jpg"),
}


@dataclass(frozen=True)
class Drawing:
    """What makes image files of requests.

    Args:
        setup: configuration, checkpoint and precision of the model, for the records.
        folder: where the files go.
        recorded: the record of the image that is repeated; empty without one.
        layout: how files are called.
    """

    model: DiffusionModel
    setup: Mapping[str, str]
    folder: Path
    recorded: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = OWN_LAYOUT

    def draw(self, request: Request, with_grid: bool = True) -> list[Path]:
        """Generate what a request asks for and write it; a grid of its images is the first of the files.

        Raises:
            KeyboardInterrupt: Ctrl-C, with a sentence where some batches are finished; these are written.
        """
        from ldm.generate import Interrupted, generate_image

        try:
            image = generate_image(request, self.model)
        except Interrupted as stop:
            paths = self.save(stop.image, with_grid)
            kept = "is kept" if len(paths) == 1 else f"and the {len(paths) - 1} images in it are kept"
            raise KeyboardInterrupt(f"stopped by Ctrl-C; what was finished, '{paths[0]}', {kept}") from stop
        return self.save(image, with_grid)

    def draw_grouped(self, requests: Sequence[Request]) -> list[Path]:
        """Write the images of all requests, and a grid of those whose grid has the same name in the layout.

        Returns:
            The grids, then the single images.
        """
        from PIL import Image

        from ldm.files.images import make_grid
        from ldm.files.records import read_parameters

        groups: dict[str, list[Path]] = {}
        for request in requests:
            paths = self.draw(request, with_grid=False)
            groups.setdefault(self.layout.grid.format(**_names(read_parameters(paths[0]))), []).extend(paths)
        grids = []
        for name, paths in groups.items():
            record = {"cells": [[path.relative_to(self.folder).as_posix() for path in paths]]}
            grids.append(self._write(make_grid([Image.open(path) for path in paths]), name, record))
        return [*grids, *chain.from_iterable(groups.values())]

    def draw_sheet(self, rows: Sequence[Sequence[Request]], columns: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Write an image for each row and column, and a labelled grid, which is the first of the files.

        Args:
            columns: what is written above them.
        """
        from PIL import Image

        from ldm.files.images import label_grid
        from ldm.files.records import read_parameters

        written: list[list[Path]] = []
        for request in chain.from_iterable(rows):
            try:
                written.append(self.draw(request))
            except KeyboardInterrupt as stop:
                if not written or str(stop):
                    raise
                kept = f"{len(written)} images in '{self.folder}' are kept"
                raise KeyboardInterrupt(f"stopped by Ctrl-C; {kept}") from stop
        shown, width = [paths[0] for paths in written], len(columns)
        cells = [shown[i : i + width] for i in range(0, len(shown), width)]
        named = [row[0] for row in rows]
        names = [f"{row.prompt} ({row.preset})" if row.preset else row.prompt or "no prompt" for row in named]
        heads = [", ".join(f"{name} {value}" for name, value in column.items()) for column in columns]
        grid = label_grid([[Image.open(path) for path in row] for row in cells], names, heads if any(heads) else [])
        stem = f"{_names(read_parameters(shown[0]))['stem']}-{'prompts' if len(rows) > 1 else 'seeds'}"
        record = {"cells": [[path.name for path in row] for row in cells]}
        return [self._write(grid, stem, record), *chain.from_iterable(written)]

    def save(self, image: Image.Image, with_grid: bool = True) -> list[Path]:
        """Write the image, or a grid and its single images, each with what repeats it."""
        from ldm.files.records import PNG_KEY

        record, repeated = json.loads(image.info[PNG_KEY]), self.recorded
        _warn_of_changes(repeated, record)
        is_same = all(record[name] == repeated.get(name) for name in ("prompt", "prospect_words"))
        if repeated.get("preset") and "preset" not in record and is_same:
            record |= {key: value for key, value in repeated.items() if key.startswith("preset")}
        record |= {name: name_of(value) for name, value in self.setup.items()}
        height, width, seed, names = record["height"], record["width"], record["seed"], _names(record)
        count = record["n_iter"] * record["n_samples"]
        written: list[Path] = []
        if with_grid and (count > 1 or self.layout != OWN_LAYOUT):
            written.append(self._write(image, self.layout.grid.format(seed=seed, **names), record))
        for i in range(count):
            row, column = divmod(i, image.width // width)
            alone = image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
            own = record if count == 1 else record | {"seed": seed + i, "n_iter": 1, "n_samples": 1, "n_rows": 0}
            written.append(self._write(alone, self.layout.single.format(seed=seed + i, **names), own))
        return written

    def _write(self, image: Image.Image, name: str, record: Mapping[str, Any]) -> Path:
        from ldm.files.writing import replacing
        from ldm.generate import PNG_KEY, save_picture

        image.info[PNG_KEY] = json.dumps(record)
        file = new_file(self.folder / name, self.layout.suffix)
        try:
            if file.suffix == ".png":
                save_picture(image, file)
            else:
                with replacing(file) as temporary:
                    image.save(temporary, format="JPEG")
        except BaseException:  # Ctrl-C, too
            file.unlink(missing_ok=True)
            raise
        return file


def _warn_of_changes(repeated: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Warn where files of the image of `--from` are others now."""
    was, files = repeated.get("concept_hashes"), repeated.get("concepts")
    if isinstance(was, Mapping) and isinstance(files, Mapping):
        for name, file in record["concepts"].items():
            if files.get(name) == file and name in was and was[name] != record["concept_hashes"].get(name):
                logger.warning(
                    "The concept '%s' (%s) is another file than the one that the image was made with.", name, file
                )
    content, content_was = record["content_dir"], repeated.get("content_hash")
    if content and content_was and content == repeated.get("content_dir") and content_was != record["content_hash"]:
        logger.warning("The content image '%s' is another than the one that was edited.", content)


def _names(record: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the templates of a layout."""
    prompt, truncation = record["prompt"], record.get("truncation")
    first_word = next((word for word in record["prospect_words"] or [] if isinstance(word, str)), "")
    stem = re.sub(r"\W+", "-", prompt.replace(PLACEHOLDER, first_word))[:40].strip("-") or "image"
    if isinstance(preset := record.get("preset"), str) and preset:
        stem = f"{stem}-{re.sub(r'[^a-z]+', '-', preset)}"
    if truncation is not None:
        stem = f"{stem}-truncation-{truncation}"
    unusable = r'[/\\<>:"|?*\x00-\x1f]|[. ]+$' if os.name == "nt" else r"[/\x00-\x1f\x7f]"
    return {
        "stem": stem,
        "truncated": "" if truncation is None else f"_truncation_{truncation}",
        "dashed": file_name(prompt, r"[\s/\\:\x00-\x1f\x7f]"),
        "prompt": file_name(prompt, unusable),
    }


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
