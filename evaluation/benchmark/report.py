"""Measurements as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.benchmark.measure import Measurement
from ldm.files.writing import replace_text

HEADER = ("", "ms", "from", "to", "per s", "peak MB", "GFLOP", "GFLOP/s", "of ceiling", "deviation", "times first")


@dataclass
class Row:
    """One way to do the work: medians, and how far its result lies from the oracle's."""

    name: str
    ms: float
    ms_from: float
    ms_to: float
    per_second: float
    peak_mb: float | None
    gflop: float | None
    gflop_per_second: float | None
    of_ceiling: float | None
    deviation: float | None
    times_first: float
    details: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        numbers = (self.ms, self.ms_from, self.ms_to, self.per_second, self.peak_mb, self.gflop, self.gflop_per_second)
        share = "-" if self.of_ceiling is None else f"{self.of_ceiling:.0%}"
        deviation = "-" if self.deviation is None else f"{self.deviation:.1e}"
        return (self.name, *map(significant, numbers), share, deviation, f"{self.times_first:.2f}")


def significant(number: float | None) -> str:
    """Three significant digits, without exponent."""
    if number is None:
        return "-"
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


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
    """`ceiling` in FLOP per millisecond; `times_first` is how many times as fast as the first row this one is."""
    ms = measurement.median(clock)
    low, high = measurement.spread(clock)
    rate = measurement.flop / ms if measurement.flop else None
    return Row(
        name,
        ms,
        low,
        high,
        1e3 * samples / ms,
        None if measurement.peak_bytes is None else measurement.peak_bytes / 1e6,
        measurement.flop / 1e9 if measurement.flop else None,
        None if rate is None else rate / 1e6,
        rate / ceiling if rate and ceiling else None,
        deviation,
        first.median(clock) / ms,
        dict(details or {}),
    )


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; names to the left, numbers to the right."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def write_json(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**about, "rows": [asdict(row) for row in rows]}
    replace_text(path, json.dumps(content, indent=1) + "\n")
