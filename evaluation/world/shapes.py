"""Draw the words of the rendered world: places, sizes, outlines (signed distances), textures and colours.

Every outline and texture takes x and y, two tensors of one shape (N, H, W), in the object's own coordinates:
x to the right, y upwards, the object inside about [-1, 1] x [-1, 1]. Distances are in the same units. An
outline is negative inside and positive outside; a texture gives the tone, 0 dark to 1 light, antialiased.
The formulas for heart and star are Inigo Quilez's (https://iquilezles.org/articles/distfunctions2d).
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Outline = Callable[[Tensor, Tensor], Tensor]
Texture = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.8, 0.8)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y + 0.22
    return torch.maximum(x.abs() * math.cos(math.pi / 6) + y * 0.5, -y) - 0.59


def star(x: Tensor, y: Tensor, radius: float = 1.1, inner: float = 0.5) -> Tensor:
    """Draw five points; the plane is folded onto half of one point, which is a line segment."""
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x = x.abs()
    for side in (1.0, -1.0):
        fold = 2 * (side * cos * x - sin * y).clamp_min(0)
        x, y = x - fold * side * cos, y + fold * sin
    x, y = x.abs(), y - radius
    edge_x, edge_y = inner * sin, inner * cos - 1
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, radius)
    distance = torch.hypot(x - edge_x * along, y - edge_y * along)
    return torch.where(y * edge_x > x * edge_y, distance, -distance)


def heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 1.75
    x, y = x.abs() / scale, y / scale + 0.53
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    along = 0.5 * (x + y).clamp_min(0)
    tip = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - along, y - along))
    return scale * torch.where(x + y > 1, lobe, torch.where(x > y, tip, -tip))


def cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.36), _box(x, y, 0.36, 1.0))


OUTLINES: dict[str, Outline] = {f.__name__: f for f in (circle, square, triangle, star, heart, cross)}


def _tone(distance: Tensor, pixel: Tensor) -> Tensor:
    """Light where the distance is positive, dark where it is negative, a one pixel wide ramp between."""
    return (0.5 + distance / pixel).clamp_(0, 1)


def _wave(x: Tensor, period: Tensor) -> Tensor:
    """Return the distance to the edge of the nearest band: bands of half a period, positive around multiples of it."""
    return 0.25 * period - (x - (x / period).round() * period).abs()


def plain(x: Tensor, y: Tensor, period: Tensor, pixel: Tensor) -> Tensor:
    return torch.full_like(x, 0.5)


def striped(x: Tensor, y: Tensor, period: Tensor, pixel: Tensor) -> Tensor:
    return _tone(_wave((x + y) * math.sqrt(0.5), period), pixel)


def dotted(x: Tensor, y: Tensor, period: Tensor, pixel: Tensor) -> Tensor:
    spacing = 1.15 * period
    x, y = x - (x / spacing).round() * spacing, y - (y / spacing).round() * spacing
    return _tone(torch.hypot(x, y) - 0.31 * spacing, pixel)


def checkered(x: Tensor, y: Tensor, period: Tensor, pixel: Tensor) -> Tensor:
    across, along = _wave(x, 1.4 * period), _wave(y, 1.4 * period)
    return _tone(torch.minimum(across.abs(), along.abs()) * (across * along).sign(), pixel)


def ringed(x: Tensor, y: Tensor, period: Tensor, pixel: Tensor) -> Tensor:
    return _tone(_wave(torch.hypot(x, y), period), pixel)


def shiny(x: Tensor, y: Tensor, period: Tensor, pixel: Tensor) -> Tensor:
    """Return a highlight at the upper left that fades to a dark lower right."""
    return (1.15 - 0.75 * torch.hypot(x + 0.4, y - 0.4)).clamp_(0, 1)


# (x, y, period, pixel) -> tone in [0, 1], 0 dark and 1 light; period and pixel (N, 1, 1) in units of x and y.
TEXTURES: dict[str, Texture] = {f.__name__: f for f in (plain, striped, dotted, checkered, ringed, shiny)}

# Centre of the object, in coordinates where the image is [-1, 1] x [-1, 1] and y points upwards.
CENTRES: dict[str, tuple[float, float]] = {
    "left": (-0.40, 0.0), "right": (0.40, 0.0), "top": (0.0, 0.40), "bottom": (0.0, -0.40), "centre": (0.0, 0.0)
}  # fmt: skip
RADII: dict[str, float] = {"large": 0.50, "small": 0.34}

# (lightness, chroma, hue in degrees) in Oklab, https://bottosson.github.io/posts/oklab. Pure sRGB red
# has chroma 0.26. Backgrounds are lighter or darker than both tones of every object.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.62, 0.145, 25.0),
    "yellow": (0.70, 0.135, 95.0),
    "green": (0.64, 0.125, 148.0),
    "blue": (0.61, 0.130, 255.0),
    "purple": (0.61, 0.135, 318.0),
    "grey": (0.64, 0.000, 0.0),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.98, 0.000, 0.0),
    "pink": (0.91, 0.065, 0.0),
    "mint": (0.94, 0.075, 165.0),
    "black": (0.12, 0.000, 0.0),
    "navy": (0.26, 0.100, 265.0),
    "maroon": (0.27, 0.090, 15.0),
}
TEXTURE_CONTRAST = 0.36  # light minus dark tone, in Oklab lightness


def apply_by_number(functions: Iterable[Callable[..., Tensor]], choice: Tensor, *fields: Tensor) -> Tensor:
    """Return rows, of which row n is function number choice[n] of row n of the fields."""
    result = torch.empty_like(fields[0])
    for number, function in enumerate(functions):
        rows = (choice == number).nonzero()[:, 0]
        if len(rows):
            result[rows] = function(*(field[rows] for field in fields))
    return result


def srgb(lightness: Tensor, chroma: Tensor, hue: Tensor) -> Tensor:
    """Return sRGB (N, 3) in [-1, 1], clipped, of Oklab lightness, chroma and hue (radians), each (N,)."""
    a, b = chroma * hue.cos(), chroma * hue.sin()
    l_ = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m_ = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s_ = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * l_ - 3.3077115913 * m_ + 0.2309699292 * s_
    green = -1.2684380046 * l_ + 2.6097574011 * m_ - 0.3413193965 * s_
    blue = -0.0041960863 * l_ - 0.7034186147 * m_ + 1.7076147010 * s_
    linear = torch.stack([red, green, blue], dim=1).clamp(0, 1)
    encoded = torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return 2 * encoded - 1
