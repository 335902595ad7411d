"""Two small charts as SVG: a curve over steps, and a bar for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate

WIDTH, HEIGHT = 640, 180
LEFT, BOTTOM, TOP, RIGHT = 44, 24, 10, 14
SMOOTH = 0.85  # weight of what was before, in the running mean


def curve(points: Sequence[tuple[int, float]], last: int) -> str:
    """The values by step, faint, and their running mean; the axis reaches to step `last`."""
    if not points:
        return ""
    steps, values = zip(*points, strict=True)
    means = accumulate(values, lambda mean, value: SMOOTH * mean + (1 - SMOOTH) * value)
    high = max(values) or 1.0
    lines = ""
    for look, line in (("faint", values), ("strong", means)):
        places = (f"{_x(step / max(1, last)):.1f},{_y(v / high):.1f}" for step, v in zip(steps, line, strict=True))
        lines += f'<polyline class="{look}" points="{" ".join(places)}"/>'
    axis = "".join(_text(_x(part), HEIGHT - 6, f"{round(part * last)}") for part in (0, 0.5, 1))
    return _svg(high, axis + lines, f"Loss by step: {values[-1]:.3f} at step {steps[-1]} of {last}")


def bars(values: Mapping[int, float], num_stages: int) -> str:
    """A bar for each stage, the start of generation on the left."""
    if not values:
        return ""
    high = max(values.values()) or 1.0
    room = (WIDTH - LEFT) / num_stages
    parts = ""
    for place, stage in enumerate(reversed(range(num_stages))):
        x = LEFT + place * room
        parts += _text(x + room / 2, HEIGHT - 6, str(stage))
        if stage in values:
            top, hue = _y(values[stage] / high), stage_hue(stage, num_stages)
            size = f'width="{room - 8:.1f}" height="{_y(0) - top:.1f}" rx="4"'
            parts += f'<rect x="{x + 4:.1f}" y="{top:.1f}" {size} style="--hue: {hue:.0f}"/>'
    return _svg(high, parts, "Mean loss of each stage, the start of generation on the left")


def stage_hue(stage: int, num_stages: int) -> float:
    """The colour of a stage, degrees in OKLCH: violet at the start of generation, orange at its end."""
    return 30 + (285 - 30) * stage / max(1, num_stages - 1)


def _x(part: float) -> float:
    return LEFT + part * (WIDTH - LEFT - RIGHT)


def _y(part: float) -> float:
    return HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _svg(high: float, content: str, label: str) -> str:
    grid = ""
    for part in (0, 0.5, 1):
        grid += f'<line x1="{LEFT}" x2="{WIDTH}" y1="{_y(part):.1f}" y2="{_y(part):.1f}"/>'
        grid += _text(LEFT - 8, _y(part) + 4, f"{part * high:.2g}", "end")
    shape = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="chart" {shape}>{grid}{content}</svg>'
