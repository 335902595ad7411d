"""Two small charts as SVG: a curve over steps, and a bar for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 180
LEFT, BOTTOM, TOP = 44, 24, 10
SMOOTH = 0.85  # weight of what was before, in the running mean


def curve(points: Sequence[tuple[int, float]], last: int) -> str:
    """The values by step, faint, and their running mean; the axis reaches to step `last`."""
    if not points:
        return ""
    high = max(value for _, value in points) or 1.0
    means, mean = [], points[0][1]
    for step, value in points:
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        means.append((step, mean))

    def line(values: Sequence[tuple[int, float]], look: str) -> str:
        places = (f"{_x(step / max(1, last)):.1f},{_y(value / high):.1f}" for step, value in values)
        return f'<polyline class="{look}" points="{" ".join(places)}"/>'

    steps = "".join(_text(_x(part), HEIGHT - 6, f"{round(part * last)}", "middle") for part in (0, 0.5, 1))
    text = f"Loss by step: {points[-1][1]:.3f} at step {points[-1][0]} of {last}"
    return _svg(_grid(high) + steps + line(points, "faint") + line(means, "strong"), text)


def bars(values: Mapping[int, float], num_stages: int) -> str:
    """A bar for each stage, the start of generation on the left."""
    if not values:
        return ""
    high = max(values.values()) or 1.0
    room = (WIDTH - LEFT) / num_stages
    parts = []
    for place, stage in enumerate(reversed(range(num_stages))):
        x = LEFT + place * room
        parts.append(_text(x + room / 2, HEIGHT - 6, str(stage), "middle"))
        if stage in values:
            top = _y(values[stage] / high)
            hue = 285 + (30 - 285) * place / max(1, num_stages - 1)
            parts.append(
                f'<rect x="{x + 4:.1f}" y="{top:.1f}" width="{room - 8:.1f}" height="{_y(0) - top:.1f}" rx="4" '
                f'style="--hue: {hue:.0f}"/>'
            )
    return _svg(_grid(high) + "".join(parts), "Mean loss of each stage, the start of generation on the left")


def _x(part: float) -> float:
    return LEFT + part * (WIDTH - LEFT - 14)


def _y(part: float) -> float:
    return HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)


def _grid(high: float) -> str:
    lines = (f'<line x1="{LEFT}" x2="{WIDTH}" y1="{_y(part):.1f}" y2="{_y(part):.1f}"/>' for part in (0, 0.5, 1))
    labels = (_text(LEFT - 8, _y(part) + 4, f"{part * high:.2g}", "end") for part in (0, 0.5, 1))
    return "".join((*lines, *labels))


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(content: str, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{content}</svg>'
