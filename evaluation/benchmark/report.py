"""Measurements as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmark.measure import Measurement
from ldm.files.writing import replace_text

Row = dict[str, Any]  # one way to do the work: its numbers, of which those that are not known are None
HEADER = {
    "name": "", "ms": "ms", "ms_from": "from", "ms_to": "to", "per_second": "per s", "peak_mb": "peak MB",
    "gflop": "GFLOP", "gflop_per_second": "GFLOP/s", "of_ceiling": "of ceiling", "deviation": "deviation",
    "times_first": "times first",
}  # fmt: skip
FORMATS = {"name": "{}", "of_ceiling": "{:.0%}", "deviation": "{:.1e}", "times_first": "{:.2f}"}


def make_row(
    name: str,
    measurement: Measurement,
    first: Measurement,
    clock: str,
    samples: int = 1,
    ceiling: float | None = None,
    deviation: float | None = None,
    details: Mapping[str, Any] | None = None,
) -> Row:
    """Return a row; `times_first` is how many times as fast as the first one it is. `ceiling` is in FLOP per ms."""
    ms, times = measurement.median(clock), measurement.times(clock)
    rate = measurement.flop / ms if measurement.flop else None
    return {
        "name": name, "ms": ms, "ms_from": min(times), "ms_to": max(times), "per_second": 1e3 * samples / ms,
        "peak_mb": measurement.peak_bytes and measurement.peak_bytes / 1e6,
        "gflop": measurement.flop / 1e9 if measurement.flop else None,
        "gflop_per_second": rate and rate / 1e6, "of_ceiling": rate and ceiling and rate / ceiling,
        "deviation": deviation, "times_first": first.median(clock) / ms, "details": dict(details or {}),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return aligned columns; names to the left, numbers to the right."""
    lines = [list(HEADER.values()), *([_cell(key, row[key]) for key in HEADER] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    significant = "{:.0f}" if key != "name" and abs(value) >= 100 else "{:.3g}"  # three digits, without exponent
    return FORMATS.get(key, significant).format(value)


def write_json(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({**about, "rows": list(rows)}, indent=1) + "\n")
