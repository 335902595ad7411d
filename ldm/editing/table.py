"""Lists of edits as CSV files, with the columns of StyleDiffusion's own."""

from __future__ import annotations

import ast
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.editing.request import Edit, grid_of

COLUMNS = ("case_number", "prompt", "image_path")
EDITING = ("target", "blend_word", "eq_params", "tau_v", "tau_c", "tau_s", "tau_u", "edit_type")
KIND_OF = {"Replacement": "replace", "Refinement": "refine", "replace": "replace", "refine": "refine"}


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
        given: dict[str, Any] = {name: tau for name in EDITING[3:7] if (tau := self._literal(name)) is not None}
        if (kind := self.cells.get("edit_type")) and kind not in KIND_OF:
            raise ValueError(f"edit_type must be one of {', '.join(KIND_OF)}, not '{kind}'.")
        blend, weights = self._literal("blend_word"), self._literal("eq_params")
        if weights is not None:
            if len(weights) != 2 or len(weights[0]) != len(weights[1]):
                raise ValueError(f"eq_params must be [(words), (their weights)], not {self.cells['eq_params']}.")
            weights = dict(zip(*weights, strict=True))
        return grid_of(self.cells["target"], kind=KIND_OF[kind or "Replacement"], blend=blend, weights=weights, **given)

    def _literal(self, column: str) -> Any:
        text = (self.cells.get(column) or "").strip()
        if not text:
            return None
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{column} must be a Python literal such as [.5,], not '{text}'.") from error


def read_rows(path: str | Path, first: int | None = None, end: int | None = None) -> list[Row]:
    """Return the rows with `first` <= case_number < `end`, in the file's order.

    Images are looked for beside the file, and else from the current folder.

    Raises:
        ValueError: no such file, or a column is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; check the path given with --csv.")
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f"'{path}' has no column {', '.join(lacking)}; it needs {', '.join(COLUMNS)}.")
        rows = [_row(path, cells) for cells in reader]
    return [row for row in rows if (first is None or row.case >= first) and (end is None or row.case < end)]


def _row(path: Path, cells: dict[str, str]) -> Row:
    number = cells["case_number"] or ""
    if not number.strip().isdecimal():
        raise ValueError(f"'{path}': case_number must be a whole number, not '{number}'.")
    image = Path(cells["image_path"] or "")
    beside = path.parent / image
    return Row(int(number), cells["prompt"], beside if beside.exists() else image, cells)
