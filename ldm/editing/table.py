"""Lists of edits as CSV files, with the columns of StyleDiffusion's own."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.editing.request import TAUS, Edit, grid_of
from ldm.files.texts import read_table
from ldm.request import shown

COLUMNS = ("case_number", "prompt", "image_path")
KIND_OF = {"Replacement": "replace", "Refinement": "refine"}  # by StyleDiffusion's names; ours are taken, too


@dataclass(frozen=True)
class Row:
    """A line of the file: an image with its prompt, and what is asked for.

    Args:
        case: its number.
        cells: by column.
    """

    case: int
    prompt: str
    image: Path
    cells: dict[str, str]

    def edits(self) -> list[Edit]:
        """Return the edits, one for each combination of taus; none where no target is given.

        Raises:
            ValueError: a cell that cannot be used.
        """
        if not self.cells.get("target"):
            return []
        given: dict[str, Any] = {name: tau for name in TAUS if (tau := self._literal(name)) is not None}
        if kind := self.cells.get("edit_type"):
            given["kind"] = KIND_OF.get(kind, kind)
        if (pairs := self._literal("eq_params")) is not None:
            given["weights"] = _weights(pairs, self.cells["eq_params"])
        return grid_of(self.cells["target"], blend=self._literal("blend_word"), **given)

    def _literal(self, column: str) -> Any:
        text = (self.cells.get(column) or "").strip()
        if not text:
            return None
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{column} must be a Python literal such as [.5,], not {shown(text)}.") from error


def _weights(pairs: Any, text: str) -> dict[str, Any]:
    """Return words with their weights from [(words), (weights)]."""
    try:
        words, weights = pairs
        return dict(zip(words, weights, strict=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"eq_params must be [(words), (their weights)], not {shown(text)}.") from error


def read_rows(path: str | Path, first: int | None = None, end: int | None = None) -> list[Row]:
    """Return the rows with `first` <= case_number < `end`, in the file's order.

    Images are looked for beside the file, and else from the current folder.

    Raises:
        ValueError: no such file, or a column is missing.
    """
    rows = [_row(Path(path), line, cells) for line, cells in read_table(path, "--csv", COLUMNS)]
    return [row for row in rows if (first is None or row.case >= first) and (end is None or row.case < end)]


def _row(path: Path, line: int, cells: dict[str, str]) -> Row:
    number, image = cells["case_number"].strip(), cells["image_path"]
    if not re.fullmatch(r"\d{1,9}", number) or not image.strip():
        wanted = "case_number must be a whole number, and image_path an image's"
        raise ValueError(f"'{path}', line {line}: {wanted}, not {shown(number)} and {shown(image)}.")
    beside = path.parent / image
    return Row(int(number), cells["prompt"], beside if os.path.exists(beside) else Path(image), cells)
